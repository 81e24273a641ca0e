"""What is believed after the runs of a table: a Gaussian process, or what stands in where none can be fitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor

from lmworks.core.errors import LmworksError
from lmworks.methods.admire_bayesopt.evidence import OFFSET, Evidence
from lmworks.methods.admire_bayesopt.fit import Kernel, fit, fit_botorch
from lmworks.methods.admire_bayesopt.posterior import Posterior, Unfit
from lmworks.mix.linear import LogLinear
from lmworks.mix.problem import Floats
from lmworks.mix.runs import Rows
from lmworks.mix.surrogate import Fitted

Engine = Literal["own", "botorch"]
REFITS = 8
"""Of the stand-in, each to as many runs drawn with replacement."""


@final
@dataclass(frozen=True)
class Learnt:
    """Means and spreads at the largest size, scaled, the larger the better."""

    evidence: Evidence
    posterior: Posterior | None
    """None: the process could not be fitted."""
    refits: tuple[Fitted, ...] = ()
    """Stand-ins for it, of the scaled target of runs of `size`; none where there are too few runs for one."""
    size: int = 0
    why: str | None = None
    """Why there is no posterior."""

    def at_top(self, mixtures_NM: Floats) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation of each mixture; None where nothing at all was learnt."""
        if self.posterior is not None:
            points = self.evidence.points(mixtures_NM, self.evidence.top)
            return self.posterior.mean(points), self.posterior.variance(points).sqrt()
        if not self.refits:
            return None
        found_RN = torch.from_numpy(np.stack([one.predict(mixtures_NM).mean_N for one in self.refits]))
        return -found_RN.mean(0), found_RN.std(0)


def learn(evidence: Evidence, *, kernel: Kernel, engine: Engine, apart: bool, seed: int) -> Learnt:
    """Fit the process; a log-linear law on resampled runs where that fails. Never fails itself."""
    try:
        if engine == "botorch":
            belief = fit_botorch(evidence.runs, evidence.value_N, evidence.fidelity_S, offset=OFFSET, apart=apart)
        else:
            belief = fit(evidence.runs, evidence.value_N, evidence.fidelity_S, kernel, offset=OFFSET, apart=apart)
        return Learnt(evidence, Posterior(belief, evidence.runs, evidence.value_N))
    except Unfit as error:
        return _stand_in(evidence, str(error), seed)


def _stand_in(evidence: Evidence, why: str, seed: int) -> Learnt:
    """A log-linear law, refitted to resampled runs of the largest size that has enough of them."""
    law = LogLinear()
    least = law.least(evidence.mixtures_NM.shape[1])
    draw = np.random.default_rng(seed)
    for size in range(evidence.top, -1, -1):
        chosen_N = (evidence.size_N == size).numpy()
        rows = Rows(evidence.mixtures_NM[chosen_N], -evidence.value_N.numpy()[chosen_N])
        if len(rows) < least:
            continue
        refits: list[Fitted] = []
        for _ in range(REFITS):
            try:
                refits.append(law.fit(rows.take(draw.integers(len(rows), size=len(rows)))))
            except LmworksError:
                continue
        if len(refits) > 1:
            return Learnt(evidence, None, tuple(refits), size, why)
    return Learnt(evidence, None, (), 0, why)
