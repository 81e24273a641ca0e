"""What autograd holds in the place of saved tensors, and how they become tensors again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmworks.train.ledger import Kept, Lease, edited
from lmworks.train.moved import Parcel, Piece

if TYPE_CHECKING:
    from lmworks.train.offload import TensorCache


class Handle:
    """Of a tensor that goes out."""

    __slots__ = ("_cache", "_counter", "_dtype", "_parcel", "_piece", "_shape", "_version")

    def __init__(self, cache: TensorCache, x: Tensor, parcel: Parcel, piece: Piece) -> None:
        self._cache, self._parcel, self._piece = cache, parcel, piece
        self._shape = x.shape, x.stride(), x.storage_offset()
        self._dtype, self._counter, self._version = x.dtype, counter(x), x._version

    def tensor(self) -> Tensor:
        """The tensor again, as it was."""
        if self._counter._version != self._version:
            raise edited(self._parcel.scope)
        storage = self._cache.take(self._parcel, self._piece)
        bare = torch.empty(0, dtype=self._dtype, device=self._parcel.device)
        return bare.set_(storage, self._shape[2], *self._shape[:2])

    def __del__(self) -> None:
        self._cache.release(self._parcel)


class Stays:
    """Of a tensor that stays: it tells the cache that its piece has been reached."""

    __slots__ = ("_cache", "_kept", "_piece", "lease")

    def __init__(self, cache: TensorCache, x: Tensor, scope: str, piece: Piece) -> None:
        self._cache, self._piece, self.lease = cache, piece, Lease(cache.ledger, x, scope)
        self._kept = Kept(x, scope, self.lease)

    def tensor(self) -> Tensor:
        """The tensor itself."""
        self._cache.enter(self._piece)
        return self._kept.tensor


def unpack(handle: Any) -> Tensor:
    """The tensor of a handle; what is none is the tensor itself."""
    result: Tensor = handle.tensor() if isinstance(handle, Handle | Stays) else handle
    return result


def counter(x: Tensor) -> Tensor:
    """x's count of edits, without its values."""
    bare = x.detach()
    bare.data = torch.empty(0, dtype=x.dtype, device=x.device)
    return bare
