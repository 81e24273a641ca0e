"""Attention on a CPU, tile by tile: a block of queries against the keys it can see, and no others.

Per tile: scores = q k^T, softmax, times v, as batched products over (row, group). At a few hundred keys this is faster
than PyTorch's fused kernel (benchmarks/log.md). The probabilities are kept for the backward pass, one value per query
head, token and key seen; so longer reaches are left to the fused kernel. Scores are float32 in bfloat16 models too:
rounded to 8 bits, they would lose most of the precision of the gradient where logits are large.

Letters as in `decoder.py`, and X = B * G products in a batch, Q = T * R query rows per product, ordered (t, r).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 128
"""Queries in a tile."""
MOST_KEYS = 640
"""Keys per query, on average over the tiles, up to which tiles are used."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Queries start..stop of rows first_row..last_row against keys first_key..stop."""

    first_row: int
    last_row: int
    start: int
    stop: int
    first_key: int
    masked_from: int
    """Keys before this one are seen by every query of the tile."""
    mask: Tensor
    """(stop - start, 1, stop - masked_from): 0 = seen, -inf = not."""


def tiles_for(lowest_BT: Tensor, *, alike: bool, dtype: torch.dtype) -> tuple[Tile, ...] | None:
    """Tiles for causal reaches: query t of row b sees keys lowest_BT[b, t]..t. None = too many keys for tiles.

    `alike`: every row has the reach of the first, so one tile serves all of them.
    """
    batch, length = lowest_BT.shape
    rows = lowest_BT[:1].tolist() if alike else lowest_BT.tolist()
    spans = [(start, min(start + TILE, length)) for start in range(0, length, TILE)]
    seen = sum((stop - start) * (stop - low[start]) for low in rows for start, stop in spans)
    if seen > MOST_KEYS * length * len(rows):
        return None
    dtype = torch.promote_types(dtype, torch.float32)
    square = _triangle(TILE, dtype)
    tiles = []
    for row, low in enumerate(rows):
        for start, stop in spans:
            width = stop - start
            first_key = low[start]
            whole = low[stop - 1] == first_key
            masked_from = start if whole else first_key
            tiles.append(
                Tile(
                    first_row=0 if alike else row,
                    last_row=batch if alike else row + 1,
                    start=start,
                    stop=stop,
                    first_key=first_key,
                    masked_from=masked_from,
                    mask=square[:width, :, :width]
                    if whole
                    else _band(lowest_BT[row, start:stop], start, first_key, stop, dtype),
                )
            )
    return tuple(tiles)


def kept_scores(length: int, window: int | None) -> int:
    """Scores that the tiles of one causal row keep for the backward pass, per head; 0 where tiles are not used."""
    kept = 0
    for start in range(0, length, TILE):
        stop = min(start + TILE, length)
        kept += (stop - start) * (stop - (0 if window is None else max(0, start - window + 1)))
    return kept if kept <= MOST_KEYS * length else 0


def _triangle(width: int, dtype: torch.dtype) -> Tensor:
    """(width, 1, width) causal mask of a tile that sees one document and no edge of a window."""
    return torch.full((width, width), -torch.inf, dtype=dtype).triu_(1)[:, None]


def _band(lowest_T: Tensor, start: int, first_key: int, stop: int, dtype: torch.dtype) -> Tensor:
    """(queries, 1, keys) mask of a tile whose queries do not all see the same first key."""
    query = torch.arange(start, stop)[:, None]
    key = torch.arange(first_key, stop)[None]
    hidden = (key > query) | (key < lowest_T[:, None])
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)[:, None]


def attend_tiles(q_BTNh: Tensor, k_BTGh: Tensor, v_BTGh: Tensor, tiles: Sequence[Tile]) -> Tensor:
    """softmax(q k^T / sqrt(h)) v over the tiles: (B, T, N, h), contiguous. Query head n reads group n // (N / G)."""
    result: Tensor = _TileAttention.apply(q_BTNh, k_BTGh, v_BTGh, tiles)  # type: ignore[no-untyped-call]
    return result


def _rows(x_BTNh: Tensor, groups: int, scale: float | None = None) -> Tensor:
    """(B, T, N, h) -> (B, G, T * R, h), contiguous; times `scale`, where there is one."""
    batch, length, heads, head_dim = x_BTNh.shape
    grouped = x_BTNh.reshape(batch, length, groups, heads // groups, head_dim).permute(0, 2, 1, 3, 4)
    out = torch.empty(grouped.shape, dtype=x_BTNh.dtype)
    if scale is None:
        out.copy_(grouped)
    else:
        torch.mul(grouped, scale, out=out)
    return out.view(batch, groups, -1, head_dim)


def _tokens(x_BGQh: Tensor, length: int) -> Tensor:
    """(B, G, T * R, h) -> (B, T, N, h) view."""
    batch, groups, rows, head_dim = x_BGQh.shape
    return x_BGQh.view(batch, groups, length, rows // length, head_dim).permute(0, 2, 1, 3, 4).flatten(2, 3)


class _TileAttention(torch.autograd.Function):
    """The products of `attend_tiles` and their gradients."""

    @staticmethod
    def forward(ctx: Any, q_BTNh: Tensor, k_BTGh: Tensor, v_BTGh: Tensor, tiles: Sequence[Tile]) -> Tensor:
        batch, length, heads, head_dim = q_BTNh.shape
        groups = k_BTGh.shape[2]
        per_group = heads // groups
        q_BGQh = _rows(q_BTNh, groups, 1.0 / math.sqrt(head_dim))
        k_BGKh, v_BGKh = _rows(k_BTGh, groups), _rows(v_BTGh, groups)
        out_BTNh = torch.empty((batch, length, heads, head_dim), dtype=q_BTNh.dtype)
        grouped_out = out_BTNh.view(batch, length, groups, per_group, head_dim).permute(0, 2, 1, 3, 4)
        wide_q_BGQh, wide_k_BGKh = ((x.float() if x.dtype.itemsize < 4 else x) for x in (q_BGQh, k_BGKh))
        kept = []
        for tile in tiles:
            wide_q, wide_k, v = _cut(tile, per_group, wide_q_BGQh, wide_k_BGKh, v_BGKh)
            scores = torch.bmm(wide_q, wide_k.transpose(1, 2))
            shaped = scores.view(-1, tile.stop - tile.start, per_group, tile.stop - tile.first_key)
            shaped[..., tile.masked_from - tile.first_key :].add_(tile.mask)
            weights = torch.softmax(scores, -1).to(v.dtype)
            rows = slice(tile.first_row, tile.last_row)
            mixed = torch.bmm(weights, v).view(-1, groups, tile.stop - tile.start, per_group, head_dim)
            grouped_out[rows, :, tile.start : tile.stop].copy_(mixed)
            kept.append(weights)
        ctx.tiles = tiles
        ctx.save_for_backward(q_BGQh, k_BGKh, v_BGKh, *kept)
        return out_BTNh

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTNh: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_BGQh, k_BGKh, v_BGKh, *kept = ctx.saved_tensors
        length, groups, head_dim = k_BGKh.shape[2], k_BGKh.shape[1], k_BGKh.shape[3]
        per_group = q_BGQh.shape[2] // length
        grad_BGQh = _rows(grad_BTNh, groups)
        dq_BGQh = torch.empty_like(q_BGQh)
        dk_BGKh, dv_BGKh = torch.zeros_like(k_BGKh), torch.zeros_like(v_BGKh)
        for tile, weights in zip(ctx.tiles, kept, strict=True):
            q, k, v = _cut(tile, per_group, q_BGQh, k_BGKh, v_BGKh)
            grad, dk, dv = _cut(tile, per_group, grad_BGQh, dk_BGKh, dv_BGKh)
            dq = _cut(tile, per_group, dq_BGQh, dk_BGKh, dv_BGKh)[0]
            dv.baddbmm_(weights.transpose(1, 2), grad)
            d_scores = torch._softmax_backward_data(torch.bmm(grad, v.transpose(1, 2)), weights, -1, weights.dtype)
            torch.mul(torch.bmm(d_scores, k), 1.0 / math.sqrt(head_dim), out=dq)
            dk.baddbmm_(d_scores.transpose(1, 2), q)
        return _tokens(dq_BGQh, length), _tokens(dk_BGKh, length), _tokens(dv_BGKh, length), None


def _cut(tile: Tile, per_group: int, q_BGQh: Tensor, k_BGKh: Tensor, v_BGKh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of what a tile works on: queries (X, tile * R, h), keys and values (X, keys, h)."""
    rows = slice(tile.first_row, tile.last_row)
    queries = slice(tile.start * per_group, tile.stop * per_group)
    keys = slice(tile.first_key, tile.stop)
    return (
        q_BGQh[rows, :, queries].flatten(0, 1),
        k_BGKh[rows, :, keys].flatten(0, 1),
        v_BGKh[rows, :, keys].flatten(0, 1),
    )
