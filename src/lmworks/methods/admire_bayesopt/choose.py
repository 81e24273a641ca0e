"""Which run next: every candidate is scored by what it says per unit of cost, and the best one is made better still."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from torch import Tensor

from lmworks.methods.admire_bayesopt.evidence import Evidence
from lmworks.methods.admire_bayesopt.kernel import Points
from lmworks.methods.admire_bayesopt.posterior import Posterior
from lmworks.methods.admire_bayesopt.worth import information, log_improvement, maxima
from lmworks.mix.problem import Floats, MixtureProblem

POLISH = 25
"""Steps uphill from the best candidate."""


@final
@dataclass(frozen=True)
class Candidates:
    """Mixtures that are looked at, and runs that may be made of them."""

    mixtures_CM: Floats
    row_K: Tensor
    """Which mixture each possible run has."""
    size_K: Tensor
    """At which size."""
    final_F: Tensor
    """Mixtures that may be recommended."""
    free: bool
    """Whether any other mixture within the bounds will do too, or only these runs can be made."""

    def only(self, keep_K: Tensor) -> Candidates:
        """Some of the runs."""
        return replace(self, row_K=self.row_K[keep_K], size_K=self.size_K[keep_K])


@final
@dataclass(frozen=True)
class Scoring:
    """What a posterior says of runs. `best_K`: draws of f*, for information; the best so far, for improvement."""

    posterior: Posterior
    evidence: Evidence
    best_K: Tensor
    entropy: bool

    def __call__(self, at: Points) -> Tensor:
        """Log of what each run is worth per unit of cost: (N,)."""
        top = self.evidence.top
        own_N, top_N, both_N = self.posterior.pairs(at, top)
        mean_N = self.posterior.mean(Points(at.x_NM, torch.full_like(at.size_N, top)))
        if not self.entropy:
            return log_improvement(mean_N, top_N.clamp(min=1e-12).sqrt(), float(self.best_K[0]))
        sd_N = top_N.clamp(min=1e-12).sqrt()
        link_N = both_N / (sd_N * (own_N + self.posterior.belief.noise_S[at.size_N]).sqrt())
        gap_KN = (self.best_K[:, None] - mean_N) / sd_N
        told_KN = information(gap_KN.reshape(-1), link_N.expand_as(gap_KN).reshape(-1)).reshape(gap_KN.shape)
        return told_KN.mean(0).clamp(min=1e-300).log() - self.evidence.fidelity_S[at.size_N].log()


def scoring(
    posterior: Posterior, evidence: Evidence, final_FM: Floats, *, entropy: bool, draws: int, generator: torch.Generator
) -> Scoring:
    """What runs are scored by. `final_FM`: mixtures of which one will be recommended."""
    points = evidence.points(final_FM, evidence.top)
    mean_F, sd_F = posterior.mean(points), posterior.variance(points).sqrt()
    if entropy:
        return Scoring(posterior, evidence, maxima(mean_F, sd_F, draws, generator), entropy)
    at_top = posterior.runs[posterior.runs.size_N == evidence.top]
    best = posterior.mean(at_top).max() if len(at_top) else mean_F.median()
    return Scoring(posterior, evidence, best.reshape(1), entropy)


def best_run(score: Callable[[Points], Tensor], candidates: Candidates, evidence: Evidence) -> int:
    """The run of the highest score, by its number among the candidates."""
    x_KM = evidence.seen(candidates.mixtures_CM)[candidates.row_K]
    return int(score(Points(x_KM, candidates.size_K)).argmax())


def polished(
    value: Callable[[Points], Tensor], start_M: Floats, size: int, evidence: Evidence, problem: MixtureProblem
) -> Floats:
    """A mixture within the bounds that scores no less: uphill by the gradient, back to the nearest mixture there is."""
    best_M, step = problem.nearest(start_M), 0.1
    best, slope_M = _slope(value, best_M, size, evidence)
    for _ in range(POLISH):
        length = float(np.linalg.norm(slope_M))
        if length == 0 or not np.isfinite(length) or step < 1e-5:
            break
        x_M = evidence.seen(best_M[None])[0].numpy() + step * slope_M / length
        moved = np.clip(x_M, 0, None) ** 2 if evidence.inputs == "root" else x_M
        near_M = problem.nearest(moved)
        found, found_slope_M = _slope(value, near_M, size, evidence)
        if found > best:
            best, best_M, slope_M = found, near_M, found_slope_M
        else:
            step /= 2
    return best_M


def _slope(value: Callable[[Points], Tensor], mixture_M: Floats, size: int, evidence: Evidence) -> tuple[float, Floats]:
    """Score of a mixture, and its gradient by what the kernel sees."""
    x_1M = evidence.seen(mixture_M[None]).requires_grad_()
    found = value(Points(x_1M, torch.tensor([size])))[0]
    (slope_1M,) = torch.autograd.grad(found, x_1M)
    return float(found.detach()), slope_1M[0].numpy()
