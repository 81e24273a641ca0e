"""What to run next: random runs first, then the most telling ones, and a large one when it is due."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, final

import numpy as np
import torch
from torch import Tensor

from lmworks.core.errors import UsageError
from lmworks.core.seeds import seed_for
from lmworks.methods.admire_bayesopt.choose import Candidates, Scoring, best_run, polished, scoring
from lmworks.methods.admire_bayesopt.evidence import ENOUGH, Evidence, gather, told_apart
from lmworks.methods.admire_bayesopt.kernel import Points
from lmworks.methods.admire_bayesopt.learn import Learnt, learn
from lmworks.methods.admire_bayesopt.posterior import Unfit, agreement
from lmworks.methods.admire_bayesopt.worth import log_improvement
from lmworks.mix.problem import Floats, Mixture, MixtureProblem
from lmworks.mix.runs import RunTable, Trial
from lmworks.mix.search import draw_for, on_grid
from lmworks.mix.worth import seed_noise

if TYPE_CHECKING:
    from lmworks.methods.admire_bayesopt.part import AdmireBayesOpt

COMPARED = 128
"""Mixtures over which a size is held against the largest one."""


@final
class Round:
    """A table at one moment: what is known, what is believed, and what follows. Nothing of it is kept."""

    def __init__(
        self,
        settings: AdmireBayesOpt,
        problem: MixtureProblem,
        table: RunTable,
        *,
        seed: int,
        pool: Sequence[Trial] | None = None,
    ) -> None:
        """`pool`: the runs that can be made at all; None: any mixture within the bounds, at any size."""
        self.settings, self.problem, self.table, self.pool = settings, problem, table, pool
        self.seed = seed_for(seed, "admire-bayesopt", len(table))
        self.everything = gather(problem, table, inputs=settings.inputs, standardise=settings.standardise)

    # --- what is known ------------------------------------------------------------------------------------------

    @cached_property
    def candidates(self) -> Candidates:
        """Mixtures that are looked at, without runs that the table holds."""
        names = [one.name for one in self.problem.fidelities]
        if self.pool is None:
            drawn_CM = draw_for(self.problem, self.settings.candidates, seed=seed_for(self.seed, "candidates"))
            drawn_CM = np.vstack([self.problem.nearest(self.problem.natural), drawn_CM])
            mixtures = [_tuple(on_grid(p_M, self.problem)) for p_M in drawn_CM]
            trials = [(row, size) for size in range(len(names)) for row in range(len(mixtures))]
            final = list(range(len(mixtures)))
        else:
            for trial in self.pool:
                self.problem.must_be_feasible(trial.mixture)
            mixtures = sorted({trial.mixture for trial in self.pool})
            number = {mixture: i for i, mixture in enumerate(mixtures)}
            trials = [(number[trial.mixture], names.index(trial.fidelity)) for trial in self.pool]
            final = sorted({row for row, size in trials if size == len(names) - 1})
            if not final:
                raise UsageError(f"no run of the pool has the size '{names[-1]}', which the mixture is for")
        made = {(run.trial.mixture, names.index(run.trial.fidelity)) for run in self.table}
        left = [(row, size) for row, size in trials if (mixtures[row], size) not in made]
        return Candidates(
            np.array(mixtures, dtype=np.float64),
            torch.tensor([row for row, _ in left], dtype=torch.long),
            torch.tensor([size for _, size in left], dtype=torch.long),
            torch.tensor(final, dtype=torch.long),
            free=self.pool is None,
        )

    @cached_property
    def finals(self) -> Floats:
        """Mixtures of which one may be recommended: (F, M)."""
        found: Floats = self.candidates.mixtures_CM[self.candidates.final_F.numpy()]
        return found

    @cached_property
    def agreements(self) -> dict[int, tuple[float, float]]:
        """Correlation of each smaller size with the largest, and its deviation, once there are runs to tell it by."""
        evidence = self.everything
        told = [size for size in range(evidence.top) if evidence.count(size) >= ENOUGH]
        if not told or evidence.count(evidence.top) <= ENOUGH or self._all_learnt.posterior is None:
            return {}
        x_NM = evidence.seen(self.candidates.mixtures_CM[:: max(1, len(self.candidates.mixtures_CM) // COMPARED)])
        try:
            return {size: agreement(self._all_learnt.posterior, x_NM, size, evidence.top, self.seed) for size in told}
        except Unfit:
            return {}

    @cached_property
    def dropped(self) -> set[int]:
        """Sizes that do not rank mixtures as the largest one does."""
        return {size for size, (mean, _) in self.agreements.items() if mean < self.settings.least_agreement}

    @cached_property
    def evidence(self) -> Evidence:
        """What is learnt from: everything but runs of sizes that are dropped, which would mislead."""
        if not self.dropped:
            return self.everything
        settings = self.settings
        inputs, standardise = settings.inputs, settings.standardise
        return gather(self.problem, self.table, inputs=inputs, standardise=standardise, without=self.dropped)

    @cached_property
    def learnt(self) -> Learnt:
        """What is believed."""
        return self._learnt_from(self.evidence) if self.dropped else self._all_learnt

    @cached_property
    def _all_learnt(self) -> Learnt:
        return self._learnt_from(self.everything)

    def _learnt_from(self, evidence: Evidence) -> Learnt:
        settings = self.settings
        apart = settings.standardise == "size"
        return learn(evidence, kernel=settings.kernel, engine=settings.engine, apart=apart, seed=self.seed)

    @cached_property
    def alike(self) -> str | None:
        """Why mixtures cannot be told apart."""
        noise = self.settings.noise or seed_noise(self.table, self.problem.top.name)
        return told_apart(self.evidence, noise)

    @cached_property
    def gain(self) -> float:
        """What one more run of the largest size is expected to better the target by, at best; inf while unknown."""
        found = self.learnt.at_top(self.finals)
        at_top = self.evidence.runs[self.evidence.size_N == self.evidence.top]
        if found is None or len(at_top) <= ENOUGH or self.learnt.posterior is None:
            return math.inf
        best = float(self.learnt.posterior.mean(at_top).max())
        return self.evidence.scale * math.exp(float(log_improvement(*found, best).max()))

    # --- what follows -------------------------------------------------------------------------------------------

    def why_stop(self) -> str | None:
        """Why no more runs are worth it; None while some are."""
        if self.alike is not None:
            return f"mixtures cannot be told apart: {self.alike}"
        if len(self.everything) >= self.settings.starts and self.gain < self.settings.least_gain:
            return f"one more run of the largest size is expected to gain {self.gain:.3g} at best"
        return None

    def next(self, pending: Sequence[Trial]) -> Trial | None:
        """The next run, when the pending ones are under way; None: the search is done."""
        affordable = self._affordable(pending)
        return self._telling(pending, affordable) if affordable and self.why_stop() is None else None

    def _affordable(self, pending: Sequence[Trial]) -> set[int]:
        """Sizes that what is left of the budget pays for."""
        costs = [self.problem.fidelity(trial.fidelity).cost for trial in pending]
        left = self.settings.budget * self.problem.top.cost - self.table.spent() - math.fsum(costs)
        return {i for i, one in enumerate(self.problem.fidelities) if one.cost <= left * (1 + 1e-9)}

    def _telling(self, pending: Sequence[Trial], affordable: set[int]) -> Trial | None:
        """A random run while too little is known; then the one that tells most, among the sizes that may be."""
        taken = {trial.key for trial in pending}
        entropy, top = self.settings.by == "entropy", self.evidence.top
        generator = torch.Generator().manual_seed(seed_for(self.seed, "ask", len(pending)))
        start = min(affordable) if entropy else top
        if start not in affordable:
            return None
        if self._made(pending, start) < self.settings.starts or not len(self.everything):
            return self._random({start}, taken, generator)
        sizes = affordable - self.dropped if entropy else {top}
        if entropy and top in affordable and self._large_is_due(pending) and len(self._open({top}, taken).row_K):
            sizes = {top}
        if not sizes:
            return None
        try:
            return self._best(pending, sizes, taken, generator)
        except Unfit:
            return self._random({min(sizes)}, taken, generator)

    def _made(self, pending: Sequence[Trial], size: int) -> int:
        """Runs of a size, failed and pending ones too."""
        name = self.problem.fidelities[size].name
        return sum(run.trial.fidelity == name for run in self.table) + sum(one.fidelity == name for one in pending)

    def _large_is_due(self, pending: Sequence[Trial]) -> bool:
        """Whether smaller runs were many, or dear, for as few large ones."""
        large = self._made(pending, self.evidence.top) + 1
        smaller = [self._made(pending, size) for size in range(self.evidence.top)]
        costs = math.fsum(n * float(c) for n, c in zip(smaller, self.evidence.fidelity_S, strict=False))
        every, after = self.settings.large_every, self.settings.large_after
        return (every is not None and costs >= every * large) or (after is not None and sum(smaller) >= after * large)

    def _open(self, sizes: set[int], taken: set[str]) -> Candidates:
        """Candidates of these sizes that are not under way."""
        found = self.candidates
        keep_K = torch.tensor([int(size) in sizes for size in found.size_K], dtype=torch.bool)
        if taken:
            pairs = zip(found.row_K.tolist(), found.size_K.tolist(), strict=True)
            keep_K &= torch.tensor([self._trial(found.mixtures_CM[r], s).key not in taken for r, s in pairs])
        return found.only(keep_K)

    def _random(self, sizes: set[int], taken: set[str], generator: torch.Generator) -> Trial | None:
        open_ones = self._open(sizes, taken)
        if not len(open_ones.row_K):
            return None
        k = int(torch.randint(len(open_ones.row_K), (1,), generator=generator))
        return self._trial(open_ones.mixtures_CM[int(open_ones.row_K[k])], int(open_ones.size_K[k]))

    def _best(
        self, pending: Sequence[Trial], sizes: set[int], taken: set[str], generator: torch.Generator
    ) -> Trial | None:
        """The run of the highest score. Raises Unfit."""
        open_ones = self._open(sizes, taken)
        if not len(open_ones.row_K):
            return None
        score = self._score(pending, generator)
        if score is None:
            return self._by_stand_in(open_ones, sizes, taken, generator)
        k = best_run(score, open_ones, self.evidence)
        mixture_M, size = open_ones.mixtures_CM[int(open_ones.row_K[k])], int(open_ones.size_K[k])
        plain = self._trial(mixture_M, size)
        if not open_ones.free:
            return plain
        uphill_M = on_grid(polished(score, mixture_M, size, self.evidence, self.problem), self.problem)
        better = self._trial(uphill_M, size)
        return plain if better.key in taken or self.table.has(better) else better

    def _score(self, pending: Sequence[Trial], generator: torch.Generator) -> Scoring | None:
        posterior = self.learnt.posterior
        if posterior is None:
            return None
        return scoring(
            posterior.expecting(self._points(pending)),
            self.evidence,
            self.finals,
            entropy=self.settings.by == "entropy",
            draws=self.settings.maxima,
            generator=generator,
        )

    def _by_stand_in(
        self, open_ones: Candidates, sizes: set[int], taken: set[str], generator: torch.Generator
    ) -> Trial | None:
        """Without a process: the largest size where the stand-in hopes most; a random run where there is none."""
        size = max(sizes)
        rows_K = open_ones.row_K[open_ones.size_K == size]
        found = self.learnt.at_top(open_ones.mixtures_CM[rows_K.numpy()]) if len(rows_K) else None
        if found is None:
            return self._random({min(sizes)}, taken, generator)
        k = int(log_improvement(*found, float(found[0].median())).argmax())
        return self._trial(open_ones.mixtures_CM[int(rows_K[k])], size)

    def _points(self, trials: Sequence[Trial]) -> Points:
        mixtures = np.array([one.mixture for one in trials]).reshape(len(trials), len(self.problem.sources))
        names = [one.name for one in self.problem.fidelities]
        sizes_N = torch.tensor([names.index(one.fidelity) for one in trials], dtype=torch.long)
        return Points(self.evidence.seen(mixtures), sizes_N)

    def _trial(self, mixture_M: Floats, size: int) -> Trial:
        return Trial(mixture=_tuple(mixture_M), fidelity=self.problem.fidelities[size].name)

    # --- what is recommended ------------------------------------------------------------------------------------

    @cached_property
    def chosen(self) -> Mixture | None:
        """The mixture of the best expected result at the largest size; None where nothing can be told."""
        found = self.learnt.at_top(self.finals) if len(self.evidence) else None
        if found is None:
            return None
        best_M = self.finals[int(found[0].argmax())]
        posterior = self.learnt.posterior
        if posterior is not None and self.candidates.free:
            best_M = on_grid(
                polished(posterior.mean, best_M, self.evidence.top, self.evidence, self.problem), self.problem
            )
        return _tuple(best_M)

    def verified(self, mixture: Mixture) -> bool:
        """Whether a run of the largest size was made with it, to its end."""
        name = self.problem.top.name
        runs = self.table.chosen(lambda run: run.trial.fidelity == name)
        return any(max(abs(a - b) for a, b in zip(run.trial.mixture, mixture, strict=True)) < 1e-9 for run in runs)


def _tuple(p_M: Floats) -> Mixture:
    return tuple(float(p) for p in p_M)


def spread_of_best(round_: Round, draws: int, generator: torch.Generator) -> Tensor:
    """Mixtures that are best in draws of what is believed: (draws, M). Raises Unfit."""
    posterior, evidence = round_.learnt.posterior, round_.evidence
    assert posterior is not None, "asked for where there is one"
    points = evidence.points(round_.finals, evidence.top)
    hopeful_H = (posterior.mean(points) + 2 * posterior.variance(points).sqrt()).argsort(descending=True)[:400]
    drawn_DH = posterior.draws(points[hopeful_H], draws, generator)
    mixtures_FM = torch.from_numpy(np.array(round_.finals, dtype=np.float64))
    return mixtures_FM[hopeful_H[drawn_DH.argmax(1)]]
