"""The key/value cache: plain tensors and a length."""

from __future__ import annotations

import torch
from torch import Tensor


class BlockCache:
    """Keys and values of one block, in order, in two (B, G, room, h) tensors.

    A block with a window keeps only what the window can still see: when its room is used up, the last window - 1
    tokens move to the front.
    """

    def __init__(self, keys: Tensor, values: Tensor, window: int | None) -> None:
        self.keys = keys
        self.values = values
        self.window = window
        self.end = 0

    def append(self, keys_BTGh: Tensor, values_BTGh: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new tokens; give back all keys and values that they may see, as (B, G, K, h)."""
        new = keys_BTGh.shape[1]
        seen = self.end if self.window is None else min(self.end, self.window - 1)
        if self.end + new > self.keys.shape[2] and seen < self.end:
            for held in (self.keys, self.values):
                held[:, :, :seen] = held[:, :, self.end - seen : self.end].clone()
            self.end = seen
        stop = self.end + new
        if stop > self.keys.shape[2]:
            self._grow(stop)
        self.keys[:, :, self.end : stop] = keys_BTGh.transpose(1, 2)
        self.values[:, :, self.end : stop] = values_BTGh.transpose(1, 2)
        start, self.end = self.end - seen, stop
        return self.keys[:, :, start:stop], self.values[:, :, start:stop]

    def _grow(self, room: int) -> None:
        """Make room for a prompt that is longer than a window's own room."""
        batch, groups, _, head_dim = self.keys.shape
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(batch, groups, room, head_dim)
            new[:, :, : self.end] = old[:, :, : self.end]
            setattr(self, name, new)


class KVCache:
    """What a model remembers of the tokens it has read: one BlockCache per block, by block name, and their number.

    `documents_BK` is kept only when the model is called with document ids; padding on the left of a batch of prompts
    is a document of its own.
    """

    def __init__(self, blocks: dict[str, BlockCache], room: int) -> None:
        self.blocks = blocks
        self.room = room
        self.length = 0
        self.documents_BK: Tensor | None = None

    def note_documents(self, documents_BT: Tensor | None, batch: int, new: int) -> Tensor | None:
        """Add the ids of the new tokens; give back the ids of all tokens, or None when no id was ever given.

        Tokens that were read without ids count as document 0.
        """
        if documents_BT is None and self.documents_BK is None:
            return None
        device = documents_BT.device if documents_BT is not None else None
        if self.documents_BK is None:
            self.documents_BK = torch.zeros(batch, self.length, dtype=torch.int64, device=device)
        if documents_BT is None:
            documents_BT = self.documents_BK.new_zeros(batch, new)
        self.documents_BK = torch.cat((self.documents_BK, documents_BT), 1)
        return self.documents_BK
