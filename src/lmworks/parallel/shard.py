"""Where each tensor of this rank lies in the whole one: the one fact that filling, saving and resuming need.

A whole tensor is cut into boxes: first by tp along the dim of a model axis (`tensor.py`), then by FSDP along dim 0.
Every rank can tell the box of each of its tensors without asking anybody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lmworks.model.pieces import Box, whole_box
from lmworks.parallel.layout import Layout
from lmworks.parallel.wire import Wire


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How tp or ep cuts one parameter: the part of `dim`, which has `whole` entries, from `offset` on."""

    dim: int
    whole: int
    offset: int
    length: int
    axis: str = "tp"


def shares(size: int, ranks: int) -> list[tuple[int, int]]:
    """(offset, length) of each rank's share of `size` entries: the first ones are longer by one where it is uneven."""
    lengths = [size // ranks + (rank < size % ranks) for rank in range(ranks)]
    return [(sum(lengths[:rank]), length) for rank, length in enumerate(lengths)]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One rank's rows of several: `length` from `start` on. Every rank has room for `chunk` of them."""

    start: int
    length: int
    chunk: int


def part_of(rows: int, ranks: int, place: int) -> Part:
    """As FSDP cuts along dim 0: equal chunks, rounded up; the last ranks have fewer, or none."""
    chunk = -(-rows // ranks)
    start = min(place * chunk, rows)
    return Part(start=start, length=min(chunk, rows - start), chunk=chunk)


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Where a rank's finer parts lie in its rows of a weight that a placement of states divides."""

    rows: int
    """Of the weight, on this rank."""
    gradients: Part
    """Of those rows: its sums of gradients."""
    optimizer: Part
    """Of the rows of those sums: what its optimizer steps."""

    @property
    def start(self) -> int:
        """The first row that its optimizer steps, among the rows of the weight."""
        return self.gradients.start + self.optimizer.start


def slice_of(rows: int, layout: Layout, rank: int) -> Slice:
    """The finer parts of so many rows, which this rank holds of some weight."""
    gradients = part_of(rows, layout.size("gradients"), layout.place(rank, "gradients"))
    optimizer = part_of(gradients.length, layout.size("optimizer"), layout.place(rank, "optimizer"))
    return Slice(rows=rows, gradients=gradients, optimizer=optimizer)


def is_divided(x: Tensor) -> bool:
    """Whether FSDP divides a tensor."""
    return isinstance(x, DTensor)


def local(x: Tensor) -> Tensor:
    """This rank's values of a tensor that FSDP divides, as a plain tensor that shares its memory."""
    return x.to_local() if isinstance(x, DTensor) else x


def divide(model: nn.Module, cuts: Mapping[str, Cut]) -> None:
    """Make a model on meta this rank's part of itself: parameters that are cut become smaller."""
    for name, cut in cuts.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        whole = getattr(module, leaf)
        shape = list(whole.shape)
        shape[cut.dim] = cut.length
        setattr(module, leaf, nn.Parameter(torch.empty(shape, dtype=whole.dtype, device="meta")))
        if isinstance(module, nn.Linear) and leaf == "weight":
            module.out_features, module.in_features = shape


def like(parameter: Tensor, x: Tensor) -> Tensor:
    """This rank's values x, divided as a parameter is."""
    if not isinstance(parameter, DTensor):
        return x
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(x, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())


def boxes(model: nn.Module, cuts: Mapping[str, Cut], wire: Wire) -> dict[str, Box]:
    """The box of every parameter of this rank, by name."""
    found = {}
    axis = "fsdp" if wire.layout.state is None else "weights"
    for name, parameter in model.named_parameters():
        shape = list(parameter.shape)  # of a tensor that FSDP divides: as it was before
        cut = cuts.get(name)
        if cut is not None:
            shape[cut.dim] = cut.whole
        box = whole_box(shape)
        if cut is not None:
            box = box.narrowed(cut.dim, cut.offset, cut.length)
        if isinstance(parameter, DTensor):
            part = part_of(parameter.shape[0], wire.size(axis), wire.place(axis))
            box = box.narrowed(0, part.start, part.length)
        found[name] = box
    return found
