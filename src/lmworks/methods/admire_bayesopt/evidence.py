"""Runs as the kernel sees them: the larger the better, scaled, one row a run; and what is wrong with them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor

from lmworks.core.errors import LmworksError
from lmworks.methods.admire_bayesopt.kernel import Points
from lmworks.mix.problem import Floats, MixtureProblem
from lmworks.mix.runs import RunTable

Inputs = Literal["root", "share"]
Standardise = Literal["size", "all"]
OFFSET = 1.0
"""Deviation of a size's level about the mean of its runs, in scaled values."""
ENOUGH = 3
"""Runs from which a size says something of its own."""
PER_CENT = 20.0
"""Scores this many times others of the same target are told in another unit."""


@final
@dataclass(frozen=True)
class Evidence:
    """What may be learnt from. S sizes, N runs."""

    mixtures_NM: Floats
    size_N: Tensor
    value_N: Tensor
    """Minus the target, scaled."""
    fidelity_S: Tensor
    """Cost of a run of each size over that of the largest: the kernel's coordinate, and the divisor of what is won."""
    scale: float
    """What 1 of the scaled values is, in units of the target: the spread within sizes, pooled. A few large runs, all
    near the best, would alone make more of their differences than there is."""
    centre: float
    """The target at the largest size for which the scaled value is 0."""
    inputs: Inputs

    def __len__(self) -> int:
        return len(self.size_N)

    @property
    def top(self) -> int:
        """The largest size."""
        return len(self.fidelity_S) - 1

    def seen(self, mixtures_NM: Floats) -> Tensor:
        """Mixtures as the kernel sees them: (N, M)."""
        p_NM = torch.from_numpy(np.array(mixtures_NM, dtype=np.float64))
        return p_NM.clamp(min=0).sqrt() if self.inputs == "root" else p_NM

    def points(self, mixtures_NM: Floats, size: int) -> Points:
        """Mixtures at a size."""
        return Points(self.seen(mixtures_NM), torch.full((len(mixtures_NM),), size))

    @property
    def runs(self) -> Points:
        """All runs."""
        return Points(self.seen(self.mixtures_NM), self.size_N)

    def target(self, value: float) -> float:
        """A scaled value at the largest size, in units of the target."""
        return self.centre - self.scale * value

    def count(self, size: int) -> int:
        """Runs of a size."""
        return int((self.size_N == size).sum())


def gather(
    problem: MixtureProblem,
    table: RunTable,
    *,
    inputs: Inputs,
    standardise: Standardise,
    without: Collection[int] = (),
) -> Evidence:
    """The runs that may be learnt from, those of some sizes left out. Raises LmworksError for scores in two units."""
    rows = [table.to_learn(one.name).to_fit() for one in problem.fidelities]
    same_unit([values for _, values in rows])
    rows = [(p[:0], values[:0]) if i in without else (p, values) for i, (p, values) in enumerate(rows)]
    mixtures = np.concatenate([mixture for mixture, _ in rows])
    sizes = torch.cat([torch.full((len(values),), i) for i, (_, values) in enumerate(rows)])
    raw = [torch.from_numpy(-values) for _, values in rows]
    everything = torch.cat(raw)
    if standardise == "size":
        centres = [float(values.mean()) if len(values) else 0.0 for values in raw]
    else:
        centres = [float(everything.mean()) if len(everything) else 0.0] * len(raw)
    centred = [values - centre for values, centre in zip(raw, centres, strict=True)]
    spread = _spread(torch.cat(centred))
    costs = torch.tensor([one.cost / problem.top.cost for one in problem.fidelities], dtype=torch.float64)
    return Evidence(mixtures, sizes, torch.cat(centred) / spread, costs, spread, -centres[-1], inputs)


def _spread(values: Tensor) -> float:
    """Standard deviation about 0; 1 where there is none to tell."""
    found = float((values * values).mean().sqrt()) if len(values) else 0.0
    return found if found > 1e-12 else 1.0


def same_unit(values_by_size: list[Floats]) -> None:
    """Raise LmworksError when some scores are fractions and others of the same target per cent."""
    values = np.sort(np.abs(np.concatenate([*values_by_size, np.zeros(0)])))
    values = values[values > 0]
    if len(values) < 2 or values[-1] > 100:
        return
    ratios = values[1:] / values[:-1]
    cut = int(ratios.argmax())
    low, high = values[: cut + 1], values[cut + 1 :]
    alike = high.min() / 5 <= low.min() * 100 and low.max() * 100 <= high.max() * 5
    if ratios[cut] >= PER_CENT and low.max() <= 1 < high.min() and alike:
        raise LmworksError(
            f"{len(low)} scores from {low.min():.4g} to {low.max():.4g} and {len(high)} from {high.min():.4g} to "
            f"{high.max():.4g}: some are fractions, others per cent",
            next_step="multiply the fractions by 100 in the run table",
        )


def told_apart(evidence: Evidence, noise: float | None) -> str | None:
    """Why the mixtures at the largest size cannot be told apart; None when they can, or when it is too early to say.

    `noise`: standard deviation of the target between runs of one mixture; None where it is not known.
    """
    values = evidence.value_N[evidence.size_N == evidence.top] * evidence.scale
    if len(values) <= ENOUGH:
        return None
    spread = float(values.std())
    if spread <= 1e-12 * max(1.0, abs(evidence.centre)):
        return f"all {len(values)} runs of the largest size are equal"
    if noise is not None and spread < 2 * noise:
        return f"{len(values)} runs of the largest size differ by {spread:.3g}, seeds alone by {noise:.3g}"
    return None
