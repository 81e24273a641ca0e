"""Who attends to whom, and the layer that does it.

`Reach` is worked out once per forward and window, and shared by all blocks. There are five kinds:

    all       one new token behind a cache: it sees every key, no mask
    causal    one document per row: the kernel's own causal order, no mask
    spans     packed rows on a CPU: each document is attended alone, so the work is sum(length^2), not T^2
    blocks    packed or windowed rows on a GPU: FlexAttention with a block mask
    mask      everything else: a boolean mask
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmworks.model import ops
from lmworks.model.cache import BlockCache
from lmworks.model.layers import Linear, RMSNorm
from lmworks.model.sizes import BlockSizes

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Span = tuple[int, int, int]
"""Row, first token, one past the last token of a document."""


@dataclass(frozen=True, kw_only=True)
class Reach:
    """Which keys each query sees; exactly one kind (see the module's table)."""

    causal: bool = False
    spans: tuple[Span, ...] | None = None
    blocks: BlockMask | None = None
    mask: Tensor | None = None
    """(B or 1, 1, T, K) boolean, True = seen."""


def reach(
    *, batch: int, new: int, cached: int, window: int | None, documents_BK: Tensor | None, device: torch.device
) -> Reach:
    """The reach of `new` tokens behind `cached` ones. `documents_BK` holds ids for all cached + new tokens."""
    kept = cached if window is None else min(cached, window - 1)
    keys = kept + new
    sees_all_before = window is None or keys <= window
    if documents_BK is None and sees_all_before and (cached == 0 or new == 1):
        return Reach(causal=new > 1)
    if documents_BK is not None:
        documents_BK = documents_BK[:, -keys:]
    if cached == 0 and device.type == "cuda" and new >= 128:
        return Reach(blocks=_block_mask(batch, new, window, documents_BK, device))
    if cached == 0 and sees_all_before and documents_BK is not None and not torch.compiler.is_compiling():
        spans = document_spans(documents_BK)
        if spans is not None:
            return Reach(spans=spans)
    return Reach(mask=boolean_mask(new, keys, window, documents_BK, device))


def boolean_mask(
    new: int, keys: int, window: int | None, documents_BK: Tensor | None, device: torch.device
) -> Tensor:
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


def document_spans(documents_BT: Tensor) -> tuple[Span, ...] | None:
    """Each document of a packed batch as one run of tokens; None where an id comes back after another one."""
    spans: list[Span] = []
    for row, ids in enumerate(documents_BT.tolist()):
        starts = [0, *(t for t in range(1, len(ids)) if ids[t] != ids[t - 1])]
        if len({ids[t] for t in starts}) != len(starts):
            return None
        spans += [(row, start, stop) for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True)]
    return tuple(spans)


def _block_mask(
    batch: int, length: int, window: int | None, documents_BT: Tensor | None, device: torch.device
) -> BlockMask:
    """FlexAttention's block mask for a causal, possibly windowed and packed, square."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed = k <= q
        if window is not None:
            allowed = allowed & (k > q - window)
        if documents_BT is not None:
            allowed = allowed & (documents_BT[b, q] == documents_BT[b, k])
        return allowed

    rows = batch if documents_BT is not None else None
    return create_block_mask(seen, rows, None, length, length, device=str(device))


def attend(q_BNTh: Tensor, k_BGKh: Tensor, v_BGKh: Tensor, reach: Reach) -> Tensor:
    """softmax(q k^T / sqrt(h)) v within the reach: (B, N, T, h). Query head n reads group n // (N / G)."""
    grouped = q_BNTh.shape[1] != k_BGKh.shape[1]
    if reach.blocks is not None:
        return _flex(q_BNTh, k_BGKh, v_BGKh, reach.blocks, grouped)
    if reach.spans is not None:
        return _span_by_span(q_BNTh, k_BGKh, v_BGKh, reach.spans)
    return F.scaled_dot_product_attention(
        q_BNTh, k_BGKh, v_BGKh, attn_mask=reach.mask, is_causal=reach.causal, enable_gqa=grouped
    )


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
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(q_BNTh: Tensor, k_BGKh: Tensor, v_BGKh: Tensor, blocks: BlockMask, grouped: bool) -> Tensor:
    """FlexAttention; compiled on first use unless the whole model is being compiled already."""
    from torch.nn.attention.flex_attention import flex_attention

    run: Callable[..., Tensor] = flex_attention
    if q_BNTh.device.type == "cuda" and not torch.compiler.is_compiling():
        run = _compiled_flex()
    return run(q_BNTh, k_BGKh, v_BGKh, block_mask=blocks, enable_gqa=grouped)


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What all blocks of one forward share."""

    rope: tuple[Tensor, Tensor] | None
    """cos and sin, (B or 1, T, r / 2) float32; None without rotary positions."""
    reaches: dict[int | None, Reach]
    """By window."""


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
        query, keys = sizes.n_heads * sizes.head_dim, sizes.n_kv_heads * sizes.head_dim
        self.q_proj = Linear(width, query, bias=qkv_bias)
        self.k_proj = Linear(width, keys, bias=qkv_bias)
        self.v_proj = Linear(width, keys, bias=qkv_bias)
        self.o_proj = Linear(query, width, bias=out_bias)
        self.q_norm = RMSNorm(sizes.head_dim, eps=qk_norm_eps) if qk_norm_eps is not None else None
        self.k_norm = RMSNorm(sizes.head_dim, eps=qk_norm_eps) if qk_norm_eps is not None else None

    def forward(self, x_BTD: Tensor, frame: Frame, cache: BlockCache | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D). Appends the new keys and values to `cache`, where there is one."""
        heads = (-1, self.sizes.head_dim)
        q_BTNh = self.q_proj(x_BTD).unflatten(-1, heads)
        k_BTGh = self.k_proj(x_BTD).unflatten(-1, heads)
        v_BTGh = self.v_proj(x_BTD).unflatten(-1, heads)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNh, k_BTGh = self.q_norm(q_BTNh), self.k_norm(k_BTGh)
        if frame.rope is not None:
            q_BTNh, k_BTGh = ops.rotate(q_BTNh, *frame.rope), ops.rotate(k_BTGh, *frame.rope)
        k_BGKh, v_BGKh = k_BTGh.transpose(1, 2), v_BTGh.transpose(1, 2)
        if cache is not None:
            k_BGKh, v_BGKh = cache.append(k_BTGh, v_BTGh)
        mixed_BNTh = attend(q_BTNh.transpose(1, 2), k_BGKh, v_BGKh, frame.reaches[self.sizes.window])
        result: Tensor = self.o_proj(mixed_BNTh.transpose(1, 2).flatten(2))
        return result
