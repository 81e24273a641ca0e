"""Who attends to whom, and the layer that does it.

`Reach` is worked out once per forward and window, and shared by all blocks. There are eight kinds:

    all       one new token behind a cache: it sees every key, no mask
    causal    one document per row: the fused kernel's own causal order, no mask
    tiles     on a CPU, up to some hundred keys per query: tile by tile, whatever the documents and windows (`tiles.py`)
    spans     long packed documents on a CPU: each is attended alone, so the work is sum(length^2), not T^2
    blocks    packed or windowed rows on a GPU: FlexAttention with a block mask
    mask      everything else: a boolean mask
    by        some keys are not here: whoever divided the tokens of the rows computes it
    apart     it is computed on several ranks, and can be waited for: begun, served, ended
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmworks.model import ops
from lmworks.model.block_mask import block_mask
from lmworks.model.cache import BlockCache
from lmworks.model.layers import Linear, RMSNorm
from lmworks.model.sizes import BlockSizes
from lmworks.model.tiles import Tile, attend_tiles, tiles_for

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

FLEX_FROM = 128
"""Tokens from which FlexAttention pays on a GPU; its blocks are 128 wide."""
Span = tuple[int, int, int]
"""Row, first token, one past the last token of a document."""


class Pending(Protocol):
    """Attention that is under way. Other work may be done before each of its two parts."""

    def serve(self) -> None:
        """Compute what this rank was asked for, and send it off."""
        ...

    def end(self) -> Tensor:
        """(B, T, N, h): what was found for this rank's own queries."""
        ...


@dataclass(frozen=True, kw_only=True)
class Reach:
    """Which keys each query sees; exactly one kind (see the module's table)."""

    causal: bool = False
    tiles: tuple[Tile, ...] | None = None
    spans: tuple[Span, ...] | None = None
    blocks: BlockMask | None = None
    mask: Tensor | None = None
    """(B or 1, 1, T, K) boolean, True = seen."""
    by: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """(B, T, N, h), (B, G, T, h), (B, G, T, h) of these tokens -> (B, T, N, h)."""
    apart: Callable[[Tensor, Tensor, Tensor], Pending] | None = None
    """Begins the same."""


def reach(
    *,
    batch: int,
    new: int,
    cached: int,
    window: int | None,
    documents_BK: Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Reach:
    """The reach of `new` tokens behind `cached` ones. `documents_BK` holds ids for all cached + new tokens."""
    kept = cached if window is None else min(cached, window - 1)
    keys = kept + new
    sees_all_before = window is None or keys <= window
    if documents_BK is None and new == 1:
        return Reach()
    if documents_BK is not None:
        documents_BK = documents_BK[:, -keys:]
    if cached == 0 and device.type == "cpu" and ops.own_forms():
        own = _cpu_reach(batch, new, None if sees_all_before else window, documents_BK, dtype)
        if own is not None:
            return own
    if documents_BK is None and sees_all_before and cached == 0:
        return Reach(causal=True)
    if cached == 0 and device.type == "cuda" and new >= FLEX_FROM:
        return Reach(blocks=block_mask(batch, new, window, documents_BK, device))
    return Reach(mask=boolean_mask(new, keys, window, documents_BK, device))


def _cpu_reach(
    batch: int, length: int, window: int | None, documents_BT: Tensor | None, dtype: torch.dtype
) -> Reach | None:
    """Tiles or spans; None where neither fits: a document that is interrupted, long rows without documents."""
    place_1T = torch.arange(length)[None]
    lowest_BT = torch.zeros_like(place_1T)
    if documents_BT is not None:
        changed_BT = documents_BT[:, 1:] != documents_BT[:, :-1]
        ordered_BT = documents_BT.sort(1).values
        if int(changed_BT.sum()) != int((ordered_BT[:, 1:] != ordered_BT[:, :-1]).sum()):
            return None
        first_BT = torch.nn.functional.pad(torch.where(changed_BT, place_1T[:, 1:], 0), (1, 0))
        lowest_BT = first_BT.cummax(1).values
    if window is not None:
        lowest_BT = torch.maximum(lowest_BT, place_1T - window + 1)
    tiles = tiles_for(lowest_BT.expand(batch, length), alike=documents_BT is None, dtype=dtype)
    if tiles is not None:
        return Reach(tiles=tiles)
    if documents_BT is not None and window is None:
        return Reach(spans=document_spans(lowest_BT))
    return None


def document_spans(first_BT: Tensor) -> tuple[Span, ...]:
    """Each document of packed rows as one run of tokens, from the place where each token's document begins."""
    spans: list[Span] = []
    for row, first in enumerate(first_BT.tolist()):
        starts = sorted(set(first))
        spans += [(row, start, stop) for start, stop in zip(starts, [*starts[1:], len(first)], strict=True)]
    return tuple(spans)


def boolean_mask(new: int, keys: int, window: int | None, documents_BK: Tensor | None, device: torch.device) -> Tensor:
    """(B or 1, 1, T, K): True where query t, at place keys - new + t, sees key k."""
    place_T1 = torch.arange(keys - new, keys, device=device)[:, None]
    place_1K = torch.arange(keys, device=device)[None]
    seen = place_1K <= place_T1
    if window is not None:
        seen = seen & (place_1K > place_T1 - window)
    if documents_BK is None:
        return seen[None, None]
    same = documents_BK[:, -new:, None] == documents_BK[:, None, :]
    return (seen & same)[:, None]


def attend(q_BTNh: Tensor, k_BGKh: Tensor, v_BGKh: Tensor, reach: Reach) -> Tensor:
    """softmax(q k^T / sqrt(h)) v within the reach: (B, T, N, h). Query head n reads group n // (N / G)."""
    if reach.by is not None:
        return reach.by(q_BTNh, k_BGKh, v_BGKh)
    if reach.apart is not None:
        pending = reach.apart(q_BTNh, k_BGKh, v_BGKh)
        pending.serve()
        return pending.end()
    if reach.tiles is not None:
        return attend_tiles(q_BTNh, k_BGKh.transpose(1, 2), v_BGKh.transpose(1, 2), reach.tiles)
    q_BNTh = q_BTNh.transpose(1, 2)
    grouped = q_BNTh.shape[1] != k_BGKh.shape[1]
    if reach.blocks is not None:
        mixed_BNTh = _flex(q_BNTh, k_BGKh, v_BGKh, reach.blocks, grouped)
    elif reach.spans is not None:
        mixed_BNTh = _span_by_span(q_BNTh, k_BGKh, v_BGKh, reach.spans)
    else:
        if grouped and q_BNTh.is_cuda and not takes_groups(q_BNTh, masked=reach.mask is not None):
            k_BGKh, v_BGKh, grouped = *_repeated(q_BNTh, k_BGKh, v_BGKh), False
        mixed_BNTh = F.scaled_dot_product_attention(
            q_BNTh, k_BGKh, v_BGKh, attn_mask=reach.mask, is_causal=reach.causal, enable_gqa=grouped
        )
    return mixed_BNTh.transpose(1, 2)


def takes_groups(q_BNTh: Tensor, *, masked: bool) -> bool:
    """Whether a fused kernel of GPUs lets several query heads read one head of keys.

    Only those for half precision without a mask and heads of up to 256 do (torch 2.11 to 2.13). For all else torch goes
    to its plain formula without a word, which writes down a score for each pair of tokens.
    """
    return q_BNTh.dtype in (torch.bfloat16, torch.float16) and not masked and q_BNTh.shape[-1] <= 256


def _repeated(q_BNTh: Tensor, k_BGKh: Tensor, v_BGKh: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with a head of their own for each query head: (B, N, K, h)."""
    times = q_BNTh.shape[1] // k_BGKh.shape[1]
    return k_BGKh.repeat_interleave(times, 1), v_BGKh.repeat_interleave(times, 1)


def _span_by_span(q_BNTh: Tensor, k_BGKh: Tensor, v_BGKh: Tensor, spans: tuple[Span, ...]) -> Tensor:
    """Causal attention inside each span; the spans cover every row in order."""
    batch, heads, length, head_dim = q_BNTh.shape
    parts = [
        F.scaled_dot_product_attention(
            q_BNTh[row : row + 1, :, start:stop],
            k_BGKh[row : row + 1, :, start:stop],
            v_BGKh[row : row + 1, :, start:stop],
            is_causal=True,
            enable_gqa=True,
        )
        for row, start, stop in spans
    ]
    return torch.cat(parts, 2).view(heads, batch, length, head_dim).transpose(0, 1)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention, compiled once per process: without it, the full square is computed."""
    from torch.nn.attention.flex_attention import flex_attention  # noqa: PLC0415  (GPU only)

    return torch.compile(flex_attention, dynamic=False)


def _flex(q_BNTh: Tensor, k_BGKh: Tensor, v_BGKh: Tensor, blocks: BlockMask, grouped: bool) -> Tensor:
    """FlexAttention; compiled on first use unless the whole model is being compiled already."""
    from torch.nn.attention.flex_attention import flex_attention  # noqa: PLC0415  (GPU only)

    run: Callable[..., Tensor] = flex_attention
    if q_BNTh.device.type == "cuda" and not torch.compiler.is_compiling():
        run = _compiled_flex()
    return run(q_BNTh, k_BGKh, v_BGKh, block_mask=blocks, enable_gqa=grouped)


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What all blocks of one forward share."""

    rope: tuple[Tensor, Tensor] | None
    """cos and sin, (B or 1, T, r) float32; None without rotary positions."""
    reaches: dict[int | None, Reach]
    """By window; none where there are halves."""
    halves: tuple[Frame, Frame] | None = None
    """The same for the first and the second half of the rows, where blocks take them in turns (`turns.py`)."""


class Attention(nn.Module):
    """Grouped-query attention; q, k and v are separate matrices in every family."""

    def __init__(
        self,
        width: int,
        sizes: BlockSizes,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.sizes = sizes
        self.enter: Callable[[Tensor], Tensor] = _as_it_is
        """What happens to the input first; a layout that divides the heads replaces it."""
        query, keys = sizes.n_heads * sizes.head_dim, sizes.n_kv_heads * sizes.head_dim
        self.q_proj = Linear(width, query, bias=qkv_bias)
        self.k_proj = Linear(width, keys, bias=qkv_bias)
        self.v_proj = Linear(width, keys, bias=qkv_bias)
        self.o_proj = Linear(query, width, bias=out_bias)
        self.q_norm = RMSNorm(sizes.head_dim, eps=qk_norm_eps) if qk_norm_eps is not None else None
        self.k_norm = RMSNorm(sizes.head_dim, eps=qk_norm_eps) if qk_norm_eps is not None else None

    def forward(self, x_BTD: Tensor, frame: Frame, cache: BlockCache | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D). Appends the new keys and values to `cache`, where there is one."""
        mixed_BTE = self.mix(*self._projected(x_BTD), frame, cache)
        result: Tensor = self.o_proj(mixed_BTE)
        return result

    def mix(self, q: Tensor, k: Tensor, v: Tensor, frame: Frame, cache: BlockCache | None = None) -> Tensor:
        """What lies between the products: (B, T, N h), (B, T, G h), (B, T, G h) -> (B, T, N h)."""
        q_BTNh, k_BTGh, v_BTGh = self._heads(q, k, v, frame)
        k_BGKh, v_BGKh = k_BTGh.transpose(1, 2), v_BTGh.transpose(1, 2)
        if cache is not None:
            k_BGKh, v_BGKh = cache.append(k_BTGh, v_BTGh)
        return attend(q_BTNh, k_BGKh, v_BGKh, frame.reaches[self.sizes.window]).flatten(2)

    def begin(self, x_BTD: Tensor, frame: Frame) -> Pending:
        """The first part of `forward`, where the reach is `apart`."""
        apart = frame.reaches[self.sizes.window].apart
        assert apart is not None, "only such attention is waited for"
        q_BTNh, k_BTGh, v_BTGh = self._heads(*self._projected(x_BTD), frame)
        return apart(q_BTNh, k_BTGh.transpose(1, 2), v_BTGh.transpose(1, 2))

    def end(self, pending: Pending) -> Tensor:
        """The last part: (B, T, D)."""
        result: Tensor = self.o_proj(pending.end().flatten(2))
        return result

    def _projected(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_BTD = self.enter(x_BTD)
        return self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)

    def _heads(self, q: Tensor, k: Tensor, v: Tensor, frame: Frame) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, N, h), (B, T, G, h), (B, T, G, h), normed and turned."""
        q_BTNh, k_BTGh, v_BTGh = (x.view(*x.shape[:2], -1, self.sizes.head_dim) for x in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNh, k_BTGh = self.q_norm(q_BTNh), self.k_norm(k_BTGh)
        if frame.rope is not None:
            q_BTNh, k_BTGh = ops.rotate(q_BTNh, *frame.rope), ops.rotate(k_BTGh, *frame.rope)
        return q_BTNh, k_BTGh, v_BTGh


def _as_it_is(x: Tensor) -> Tensor:
    return x
