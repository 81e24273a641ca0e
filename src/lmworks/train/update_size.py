"""How far an update moves the weights, as a share of their length, from a sample of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lmworks.parallel.shard import local
from lmworks.train.probe import Probe

COLUMN = "update_ratio"
MOST_VALUES = 4096
"""Of one parameter are kept over the update, at even distances."""


class UpdateSize:
    """The length of an update over that of the weights before it, on this rank's part, every so many updates.

    At most MOST_VALUES values of each parameter are looked at; each stands for those up to the next one.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], probe: Probe, *, every: int) -> None:
        self._parameters, self._probe, self._every = parameters, probe, every
        self._updates = 0

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Around an update: a note of the step where one is due."""
        self._updates += 1
        if self._updates % self._every:
            yield
            return
        before = [x.clone() for x, _ in self._samples()]
        yield
        moved = whole = 0.0
        lengths = [
            (stride * (x - old).double().square().sum(), stride * old.double().square().sum())
            for (x, stride), old in zip(self._samples(), before, strict=True)
        ]
        if lengths:
            moved, whole = (float(torch.stack(list(column)).sum()) for column in zip(*lengths, strict=True))
        self._probe.note(COLUMN, math.sqrt(moved / whole) if whole > 0 else 0.0)

    @torch.no_grad()
    def _samples(self) -> list[tuple[Tensor, int]]:
        """Some values of each parameter, and how many values each stands for."""
        found = []
        for parameter in self._parameters:
            flat = local(parameter.detach()).reshape(-1)
            stride = max(1, -(-flat.numel() // MOST_VALUES))
            found.append((flat[::stride], stride))
        return found
