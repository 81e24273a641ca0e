"""A checkpoint on the ranks of a layout: one of those that hold the same reads it from disk, and tells the others.

All ranks go through the same names in one order, so that no two of them wait for each other. Whether the pieces are
all there is seen in the files' headers, which every rank has read: a gap is an error on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from torch import Tensor

from lmworks.model.pieces import Box, Pieces
from lmworks.parallel.apply import Placement
from lmworks.parallel.spread import place_on


def load(placement: Placement, stored: Pieces) -> None:
    """Give this rank its parts of a model's tensors. All ranks call it together."""

    def value(name: str, box: Box) -> Tensor:
        stored.must_cover(name, box)
        axes = _with_weight(placement, name)
        return _once(placement, axes, partial(stored.read, name, box), stored.kind(name, box))

    placement.fill(value)
    with torch.no_grad():
        for name, buffer in placement.values().items():
            if name not in placement.boxes:
                buffer.copy_(stored.read(name))


def states(placement: Placement, stored: Pieces, parameters: Collection[str]) -> dict[str, Tensor]:
    """This rank's parts of an optimizer's tensors, 'parameter/state'; `parameters`: names in the whole model. All ranks
    call it together."""
    found = {}
    for name in sorted(stored.shapes()):
        parameter = name.rpartition("/")[0]
        if parameter in placement.boxes:
            box = placement.boxes[parameter]
            need, _ = stored.needed(name, box)
            stored.must_cover(name, need)
            axes = [axis for axis, ranks in placement.others_alike(parameter).items() if ranks > 1]
            found[name] = _once(placement, axes, partial(stored.read_for, name, box), stored.kind_for(name, box))
        elif parameter not in parameters:
            found[name] = stored.read(name)
    return found


def _with_weight(placement: Placement, name: str) -> list[str]:
    """The axes along which other ranks are given the same values of a weight. Beside masters, which are finer, these
    are more than hold the same master."""
    axes = placement.others_alike(name)
    if placement.ladder is not None and name in placement.ladder.masters:
        axes = {axis: ranks for axis, ranks in axes.items() if axis != "copies"}
        axes |= {axis: placement.wire.size(axis) for axis in ("gradients", "optimizer", "copies")}
    return [axis for axis, ranks in axes.items() if ranks > 1]


def _once(placement: Placement, axes: Sequence[str], read: Callable[[], Tensor], kind: Tensor) -> Tensor:
    """What the first of the ranks along some axes reads, on all of them. `kind`: a tensor on meta like it."""
    if not axes or not kind.numel():
        return read()
    places = [place_on(placement, axis) for axis in axes]
    if any(places):
        x = torch.empty(kind.shape, dtype=kind.dtype, device=placement.device)
    else:
        x = read().to(placement.device)
    for i, axis in enumerate(axes):
        if not any(places[i + 1 :]):
            placement.wire.broadcast(x.view(-1).view(torch.uint8), "pp" if _is_pair(placement, axis) else axis)
    return x


def _is_pair(placement: Placement, axis: str) -> bool:
    """Whether the ends of a pipeline are all of it: they have no group of their own then."""
    return axis == "ends" and placement.wire.size("pp") == 2
