"""FlexAttention's block mask for causal rows of documents and windows, worked out block by block.

torch's `create_block_mask` first writes down a byte for each pair of tokens: 1 GB for a row of 32,768, in every step. A
block of pairs can be told by its edges: the first and the last token of its queries and keys, and the least and the
greatest document among each. Three kinds: all pairs are seen (no mask is applied), some may be (the kernel asks `seen`
for each pair), none is (skipped).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Queries and keys of a block."""


def block_mask(
    batch: int, length: int, window: int | None, documents_BT: Tensor | None, device: torch.device
) -> BlockMask:
    """FlexAttention's block mask for a causal, possibly windowed and packed, square."""
    from torch.nn.attention.flex_attention import BlockMask as Mask  # noqa: PLC0415  (GPU only)

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed = k <= q
        if window is not None:
            allowed = allowed & (k > q - window)
        if documents_BT is not None:
            allowed = allowed & (documents_BT[b, q] == documents_BT[b, k])
        return allowed

    some_BSS, all_BSS = blocks_seen(length, window, documents_BT, device)
    partly, wholly = _listed(some_BSS & ~all_BSS), _listed(all_BSS)
    return Mask.from_kv_blocks(*partly, *wholly, BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(length, length))


def blocks_seen(
    length: int, window: int | None, documents_BT: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Of which blocks some pairs may be seen, and of which all: two (B or 1, S, S) booleans, queries by keys.

    'May be' is exact where each document lies together. A block that is cut off by the row's end is never seen whole.
    """
    first_S = torch.arange(0, length, BLOCK, device=device)
    last_S = (first_S + BLOCK - 1).clamp(max=length - 1)
    q_first, q_last, k_first, k_last = first_S[:, None], last_S[:, None], first_S[None], last_S[None]
    whole_S = last_S - first_S == BLOCK - 1
    some_SS, all_SS = k_first <= q_last, (k_last <= q_first) & whole_S[:, None] & whole_S[None]
    if window is not None:
        some_SS, all_SS = some_SS & (k_last > q_first - window), all_SS & (k_first > q_last - window)
    if documents_BT is None:
        return some_SS[None], all_SS[None]
    missing = len(first_S) * BLOCK - length
    padded = F.pad(documents_BT[:, None].double(), (0, missing), mode="replicate")[:, 0]  # ids are exact below 2^53
    least_BS, most_BS = padded.view(len(padded), -1, BLOCK).aminmax(dim=2)
    q_least, q_most, k_least, k_most = least_BS[:, :, None], most_BS[:, :, None], least_BS[:, None], most_BS[:, None]
    one_document = (q_least == q_most) & (k_least == k_most) & (q_least == k_least)
    return some_SS & (q_least <= k_most) & (k_least <= q_most), all_SS & one_document


def _listed(chosen_BSS: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of blocks how many are chosen, and their numbers in front of the others: (B, 1, S), (B, 1, S, S)."""
    count = chosen_BSS.sum(-1, dtype=torch.int32)
    order = chosen_BSS.byte().argsort(dim=-1, descending=True, stable=True).int()
    return count[:, None].contiguous(), order[:, None].contiguous()
