"""Host memory for the first stage of a checkpoint: the state is copied here, and written while training goes on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Tensors = Mapping[str, Mapping[str, Tensor]]
"""By file and name."""


class Staging:
    """Memory that is taken once and kept from one checkpoint to the next, page-locked where tensors come from a GPU."""

    def __init__(self) -> None:
        self._rooms: dict[tuple[str, str], Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return sum(room.nbytes for room in self._rooms.values())

    def copy(self, tensors: Tensors) -> dict[str, dict[str, Tensor]]:
        """A copy that training cannot change, until the next one is made. All of it is there when this returns; from a
        GPU the tensors travel one behind the other, and are waited for once."""
        rooms: dict[tuple[str, str], Tensor] = {}
        held: dict[str, dict[str, Tensor]] = {file: {} for file in tensors}
        from_gpu = False
        for file, named in tensors.items():
            for name, x in named.items():
                room = self._room((file, name), x)
                room.copy_(x.detach(), non_blocking=x.is_cuda)
                rooms[file, name] = held[file][name] = room
                from_gpu = from_gpu or x.is_cuda
        if from_gpu:
            torch.cuda.current_stream().synchronize()
        self._rooms = rooms  # of tensors that are no more, nothing is kept
        return held

    def _room(self, key: tuple[str, str], x: Tensor) -> Tensor:
        room = self._rooms.get(key)
        if room is None or room.shape != x.shape or room.dtype != x.dtype:
            room = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        return room
