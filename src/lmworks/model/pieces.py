"""Tensors in pieces: files of which each holds a part of some tensors, and reading any part of them.

A checkpoint of several ranks has one file per rank. Its header says where in the whole tensor each piece lies, so a
reader with other ranks, or one process that wants everything, reads just the bytes that it needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmworks.core.errors import CheckpointError

BOXES = "boxes"
"""The key of a file's header under which the boxes of its pieces stand, as JSON: name -> [whole shape, offsets]."""


@dataclass(frozen=True, kw_only=True)
class Box:
    """A part of a whole tensor: `lengths` entries from `offsets` on, dim by dim."""

    whole: tuple[int, ...]
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def index(self) -> tuple[slice, ...]:
        """whole[index] is the part."""
        return tuple(slice(o, o + n) for o, n in zip(self.offsets, self.lengths, strict=True))

    @property
    def empty(self) -> bool:
        """Whether there is nothing in it: more ranks than rows."""
        return 0 in self.lengths

    def narrowed(self, dim: int, offset: int, length: int) -> Box:
        """The part of this part from `offset` on along `dim`."""
        offsets, lengths = list(self.offsets), list(self.lengths)
        offsets[dim] += offset
        lengths[dim] = length
        return Box(whole=self.whole, offsets=tuple(offsets), lengths=tuple(lengths))

    def of(self, shape: Sequence[int], values: tuple[int, ...]) -> Box | None:
        """The box of a tensor of this shape that has an entry for each of `values`, or for each run along their last
        dim; None for any other tensor, and where this box cuts a run. `values` are `lengths`, or all of `whole`."""
        run = run_between(shape, values)
        if run in (None, 1):
            return self if run else None
        ends = self.whole[-1], self.offsets[-1], self.lengths[-1]
        if any(end % run for end in ends):
            return None
        whole, offsets, lengths = ((*of[:-1], of[-1] // run) for of in (self.whole, self.offsets, self.lengths))
        return Box(whole=whole, offsets=offsets, lengths=lengths)

    def common(self, other: Box) -> Box | None:
        """What both hold; None when nothing."""
        starts = [max(a, b) for a, b in zip(self.offsets, other.offsets, strict=True)]
        stops = [min(a.stop, b.stop) for a, b in zip(self.index, other.index, strict=True)]
        lengths = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
        if any(length <= 0 for length in lengths):
            return None
        return Box(whole=self.whole, offsets=tuple(starts), lengths=lengths)

    def inside(self, other: Box) -> tuple[slice, ...]:
        """other's tensor[this] is this box, which lies in it."""
        return tuple(
            slice(o - base, o - base + n) for o, base, n in zip(self.offsets, other.offsets, self.lengths, strict=True)
        )


def run_between(shape: Sequence[int], values: Sequence[int]) -> int | None:
    """Of how many values along the last dim a tensor of this shape has one entry; None when it is not so laid out."""
    if tuple(shape) == tuple(values):
        return 1
    if not shape or tuple(shape[:-1]) != tuple(values[:-1]) or not shape[-1] or values[-1] % shape[-1]:
        return None
    return values[-1] // shape[-1]


def whole_box(shape: Sequence[int]) -> Box:
    """All of a tensor."""
    return Box(whole=tuple(shape), offsets=(0,) * len(shape), lengths=tuple(shape))


def header(boxes: Mapping[str, Box]) -> dict[str, str]:
    """What a file of these pieces carries in its header; nothing where all are whole."""
    parts = {name: [box.whole, box.offsets] for name, box in boxes.items() if box.lengths != box.whole}
    return {BOXES: json.dumps(parts)} if parts else {}


class Pieces:
    """The tensors of one or more files. Raises CheckpointError for a file that is missing, damaged or cut short."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._found: dict[str, list[tuple[Path, Box]]] = {}
        self._kinds: dict[str, torch.dtype] = {}
        for path in paths:
            with opened(path) as file:
                places = json.loads((file.metadata() or {}).get(BOXES, "{}"))
                for name in file.keys():  # noqa: SIM118  (not a dict)
                    lengths = tuple(file.get_slice(name).get_shape())
                    whole, offsets = places.get(name, (lengths, (0,) * len(lengths)))
                    box = Box(whole=tuple(whole), offsets=tuple(offsets), lengths=lengths)
                    self._found.setdefault(name, []).append((path, box))
                    if name not in self._kinds:
                        few = file.get_slice(name)[:0] if lengths else file.get_tensor(name)
                        self._kinds[name] = few.dtype

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and whole shape of every tensor."""
        return {name: pieces[0][1].whole for name, pieces in self._found.items()}

    def kind(self, name: str, box: Box) -> Tensor:
        """A tensor on meta of the type and shape that reading a box gives."""
        return torch.empty(box.lengths, dtype=self._kinds[name], device="meta")

    def must_cover(self, name: str, box: Box) -> None:
        """Raise CheckpointError when the pieces do not cover a part of a tensor. Reads headers only."""
        wanted = torch.Size(box.lengths).numel()
        common = (box.common(piece) for _, piece in self._found[name])
        found = [torch.Size(part.lengths).numel() for part in common if part is not None]
        if box.lengths and wanted and wanted not in found and sum(found) != wanted:
            text = f"{sum(found)} of {wanted} values of {name} are there"
            raise CheckpointError(text, where=str(self._found[name][0][0].parent))

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """A part of a tensor, or all of it. Raises CheckpointError when the pieces do not cover it."""
        box = box or whole_box(self._found[name][0][1].whole)
        self.must_cover(name, box)
        out = torch.empty(box.lengths, dtype=self._kinds[name])
        for path, piece in self._found[name]:
            common = box.common(piece) if box.lengths else piece  # a scalar is whole wherever it is
            if common is None:
                continue
            with opened(path) as file:
                values: Tensor = file.get_slice(name)[common.inside(piece)] if box.lengths else file.get_tensor(name)
            if common.lengths == box.lengths:
                return values.contiguous()
            out[common.inside(box)] = values
        return out

    def read_for(self, name: str, box: Box) -> Tensor:
        """What a box of a parameter needs of a tensor that belongs to the parameter, and may be laid out as its values.

        Of one entry for a run of values: the runs, or, where the box cuts some, an entry for each value. Of any other
        tensor: all of it.
        """
        need, run = self.needed(name, box)
        found = self.read(name, need)
        if run is None:
            return found
        start = box.offsets[-1] - need.offsets[-1] * run
        return found.repeat_interleave(run, -1)[..., start : start + box.lengths[-1]].contiguous()

    def kind_for(self, name: str, box: Box) -> Tensor:
        """A tensor on meta of the type and shape that `read_for` gives."""
        need, run = self.needed(name, box)
        found = self.kind(name, need)
        return found if run is None else found.new_empty(box.lengths)

    def needed(self, name: str, box: Box) -> tuple[Box, int | None]:
        """The part of a parameter's tensor that a box of the parameter needs; and, where the box cuts runs of values
        with one entry each, their length: each entry then stands for that many."""
        shape = self._found[name][0][1].whole
        run = run_between(shape, box.whole)
        if run is None:
            return whole_box(shape), None
        lies = box.of(shape, box.whole)
        if lies is not None:
            return lies, None
        first, stop = box.offsets[-1] // run, -(-(box.offsets[-1] + box.lengths[-1]) // run)
        return Box(whole=shape, offsets=(*box.offsets[:-1], first), lengths=(*box.lengths[:-1], stop - first)), run

    def all(self) -> dict[str, Tensor]:
        """Every tensor, whole."""
        return {name: self.read(name) for name in self._found}


def opened(path: Path) -> Any:
    """A safetensors file, for reading."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise CheckpointError("is missing", where=str(path)) from error
    except SafetensorError as error:
        raise CheckpointError(f"is damaged or cut short: {error}", where=str(path)) from error
