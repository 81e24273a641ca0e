"""The key/value cache: plain tensors and a length."""

from __future__ import annotations

import torch
from torch import Tensor


def room_for(length: int, window: int | None) -> int:
    """Tokens that a block's cache has room for: all `length`, or the window and a little more.

    The little more (64 tokens or a quarter of the window, never more than the window) is what saves moving the window
    to the front at every token.
    """
    return length if window is None else min(length, window + max(window // 4, min(window, 64)))


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
        new, room = keys_BTGh.shape[1], self.keys.shape[2]
        seen = self.end if self.window is None else min(self.end, self.window - 1)
        if self.window is not None and self.window <= room < seen + new:
            return self._pass_through(keys_BTGh, values_BTGh, seen, self.window - 1)
        if self.end + new > room and seen < self.end:
            for held in (self.keys, self.values):
                held[:, :, :seen] = held[:, :, self.end - seen : self.end].clone()
            self.end = seen
        stop = self.end + new
        if stop > room:
            self._grow(stop)
        self.keys[:, :, self.end : stop] = keys_BTGh.transpose(1, 2)
        self.values[:, :, self.end : stop] = values_BTGh.transpose(1, 2)
        start, self.end = self.end - seen, stop
        return self.keys[:, :, start:stop], self.values[:, :, start:stop]

    def _pass_through(self, keys_BTGh: Tensor, values_BTGh: Tensor, seen: int, keep: int) -> tuple[Tensor, Tensor]:
        """A text longer than a window's room: all of it is given back, the last `keep` tokens are kept."""
        whole = []
        for held, x_BTGh in ((self.keys, keys_BTGh), (self.values, values_BTGh)):
            old = held[:, :, self.end - seen : self.end]
            joined = torch.cat((old, x_BTGh.transpose(1, 2).to(held.dtype)), 2)
            held[:, :, :keep] = joined[:, :, joined.shape[2] - keep :]
            whole.append(joined)
        self.end = keep
        return whole[0], whole[1]

    def _grow(self, room: int) -> None:
        """Make room for a text that is longer than was asked for."""
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
