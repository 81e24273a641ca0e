"""A model with an optimizer's moments, written by the ranks of one layout and read by those of another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmworks.model.init import first_value
from lmworks.model.pieces import Box, Pieces
from lmworks.parallel import restore, spread, world
from lmworks.parallel.apply import Placement, place
from lmworks.parallel.layout import Layout
from lmworks.parallel.shard import local
from lmworks.train import save
from tests.parallel.table import LENGTH, MODELS

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Read:
    """What a rank has after reading, where it lies, how often it went to the disk, and its bill of broadcasts."""

    values: dict[str, tuple[Box, np.ndarray]]
    reads: int
    calls: dict[str, int]


def placed(rank: int, layout: Layout, model: str) -> Placement:
    """The model's part of this rank; values are random by name."""
    wire = world.wire(layout, world.Seat(rank=rank, world=layout.ranks))
    placement = place(MODELS[model], wire, CPU, dtype=torch.float32, sequence=LENGTH)
    depth = MODELS[model].n_layers
    placement.fill(lambda name, box: first_value(name, box.whole, depth, 7)[box.index])
    return placement


def moments(placement: Placement) -> dict[str, Tensor]:
    """Such as Adam's: two of a parameter's shape, and a count of steps."""
    found = {}
    for name, parameter in placement.model.named_parameters():
        x = local(parameter).detach()
        found |= {f"{name}/exp_avg": x * 2, f"{name}/exp_avg_sq": x * x, f"{name}/step": torch.tensor(3.0)}
    return found


def write(rank: int, layout: Layout, model: str, folder: str) -> int:
    """Save as the trainer does; the bytes of this rank's tensors."""
    placement = placed(rank, layout, model)
    kept = {
        "model": spread.saved(placement, placement.values()),
        "optimizer": spread.saved(placement, moments(placement)),
    }
    tensors = {kind: mine for kind, (mine, _) in kept.items()}
    boxes = {kind: where for kind, (_, where) in kept.items()}
    save.write(Path(folder), save.Snapshot(tensors=tensors, state={}, boxes=boxes), (rank, layout.ranks))
    return sum(x.nbytes for mine in tensors.values() for x in mine.values())


def read(rank: int, layout: Layout, model: str, folder: str) -> Read:
    """Resume as the trainer does, into a model of zeros."""
    placement = placed(rank, layout, model)
    placement.fill(lambda name, box: torch.zeros(box.lengths))
    stored = save.Stored(Path(folder), (rank, layout.ranks))
    reads = 0
    plain = Pieces.read

    def counted(self: Pieces, *words: Any) -> Tensor:
        nonlocal reads
        reads += 1
        return plain(self, *words)

    Pieces.read = counted  # type: ignore[method-assign]
    try:
        weights = stored.pieces("model")
        restore.load(placement, weights)
        state = restore.states(placement, stored.pieces("optimizer"), weights.shapes())
    finally:
        Pieces.read = plain  # type: ignore[method-assign]
    values = {name: (placement.boxes[name], local(x).detach().numpy()) for name, x in placement.values().items()}
    for name, x in state.items():
        box = placement.boxes[name.rpartition("/")[0]]
        values[name] = (box if x.dim() else Box(whole=(), offsets=(), lengths=()), x.numpy())
    calls = {axis: bill.calls for (axis, kind), bill in placement.wire.bills.items() if kind == "broadcast"}
    return Read(values=values, reads=reads, calls=calls)


def torn(rank: int, layout: Layout, model: str, folder: str) -> str:
    """Reading where a piece is not there: what this rank is told."""
    try:
        read(rank, layout, model, folder)
    except Exception as error:  # noqa: BLE001  (compared)
        return str(error)
    return ""
