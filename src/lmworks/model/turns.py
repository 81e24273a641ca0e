"""The two halves of the rows through a block in turns: one is at work while the attention of the other is on its way.

    half 0    attn_norm, q k v    begin                       serve            end, rest of the block
    half 1                        attn_norm, q k v    begin            serve                           end, rest

Autograd runs this backwards, the end of half 1 first, so the backward pass takes turns in the same way. It is one call
of the block: whoever gathers its weights, runs it again or counts what it saves does so once for both.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from lmworks.model.attention import Attention, Frame


class Block(Protocol):
    """What a block is made of."""

    @property
    def attn(self) -> Attention:
        """Its attention."""
        ...

    @property
    def attn_norm(self) -> nn.Module:
        """The norm in front of it."""
        ...

    def behind(self, x_BTD: Tensor, normed_BTD: Tensor, mixed_BTD: Tensor) -> Tensor:
        """What follows attention: the block's input, what attention got, what it gave -> the block's output."""
        ...


def forward(block: Block, x_BTD: Tensor, halves: tuple[Frame, Frame]) -> Tensor:
    """(B, T, D) -> (B, T, D): a block over the first and the second half of the rows."""
    begun = []
    for half_BTD, frame in zip(x_BTD.chunk(2), halves, strict=True):
        normed_BTD = block.attn_norm(half_BTD)
        begun.append((half_BTD, normed_BTD, block.attn.begin(normed_BTD, frame)))
    for *_, pending in begun:
        pending.serve()
    return torch.cat([block.behind(half, normed, block.attn.end(pending)) for half, normed, pending in begun])
