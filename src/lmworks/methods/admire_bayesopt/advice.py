"""What is recommended in the end: the best expected mixture, how sure that is, and what a person must know of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch

from lmworks.core.errors import LmworksError
from lmworks.core.seeds import seed_for
from lmworks.methods.admire_bayesopt.posterior import Unfit
from lmworks.methods.admire_bayesopt.rounds import Round, spread_of_best
from lmworks.mix.asking import Recommendation
from lmworks.mix.problem import Floats, Mixture
from lmworks.mix.search import on_grid
from lmworks.mix.slices import slice_of
from lmworks.mix.surrogate import Prediction
from lmworks.mix.worth import as_json, worth

DRAWS = 64
"""Of what is believed, for the spread of each share."""


@final
@dataclass(frozen=True)
class Surface:
    """What is believed of the target's size, as a fitted surrogate: targets of mixtures, the smaller the better."""

    round_: Round

    def predict(self, mixtures_NM: Floats) -> Prediction:
        """Targets of N mixtures."""
        found = self.round_.learnt.at_top(mixtures_NM)
        assert found is not None, "asked for after a recommendation"
        evidence = self.round_.evidence
        return Prediction(evidence.centre - evidence.scale * found[0].numpy(), evidence.scale * found[1].numpy())


def recommend(round_: Round) -> Recommendation:
    """The recommendation after the runs of a round. Raises LmworksError when they tell too little."""
    problem = round_.problem
    if round_.alike is not None:
        natural = tuple(float(p) for p in problem.nearest(problem.natural))
        return Recommendation(
            mixture=natural,
            rule="the natural mixture: the runs cannot tell mixtures apart",
            predicted=None,
            sd=None,
            verified=round_.verified(natural),
            warnings=(round_.alike, *_of_failures(round_)),
            facts=_facts(round_),
        )
    mixture = round_.chosen
    if mixture is None:
        reason = f": {round_.learnt.why}" if len(round_.evidence) else ""
        raise LmworksError(
            f"{len(round_.evidence)} runs tell too little of {len(problem.sources)} sources{reason}",
            next_step="make more runs: a larger budget, or see why runs failed",
        )
    predicted, sd = _prediction(round_, mixture)
    return Recommendation(
        mixture=mixture,
        rule="the best expected target at the largest size, by " + _told_by(round_),
        predicted=predicted,
        sd=sd,
        spread=_spread(round_),
        gain=_gain(round_, mixture),
        verified=round_.verified(mixture),
        warnings=tuple(_warnings(round_, mixture)),
        facts={**_facts(round_), **_of_sources(round_, np.array(mixture))},
    )


def _told_by(round_: Round) -> str:
    if round_.learnt.posterior is not None:
        return f"a Gaussian process over {len(round_.evidence)} runs"
    return f"a log-linear law, refitted to resampled runs of '{round_.problem.fidelities[round_.learnt.size].name}'"


def _prediction(round_: Round, mixture: Mixture) -> tuple[float | None, float | None]:
    """Target and its deviation; None before a run of the largest size, whose level nobody knows."""
    evidence = round_.evidence
    found = round_.learnt.at_top(torch.tensor([mixture], dtype=torch.float64).numpy())
    if found is None or not evidence.count(evidence.top):
        return None, None
    return evidence.target(float(found[0][0])), evidence.scale * float(found[1][0])


def _gain(round_: Round, mixture: Mixture) -> tuple[float, float] | None:
    """By how much the natural mixture's target is expected to be larger, and the deviation of that."""
    posterior, evidence = round_.learnt.posterior, round_.evidence
    if posterior is None or not evidence.count(evidence.top):
        return None
    problem = round_.problem
    both = torch.tensor([mixture, problem.nearest(problem.natural).tolist()], dtype=torch.float64).numpy()
    points = evidence.points(both, evidence.top)
    mean_2, spread_22 = posterior.mean(points), posterior.spread(points, points)
    variance = float(spread_22[0, 0] + spread_22[1, 1] - 2 * spread_22[0, 1])
    return evidence.scale * float(mean_2[0] - mean_2[1]), evidence.scale * max(0.0, variance) ** 0.5


def _spread(round_: Round) -> tuple[tuple[float, float], ...]:
    """The 5th and 95th percentile of each share over what might be best."""
    if round_.learnt.posterior is None:
        return ()
    generator = torch.Generator().manual_seed(seed_for(round_.seed, "spread"))
    try:
        best_DM = spread_of_best(round_, DRAWS, generator)
    except Unfit:
        return ()
    ends_2M = torch.quantile(best_DM, torch.tensor([0.05, 0.95], dtype=best_DM.dtype), dim=0)
    return tuple((float(low), float(high)) for low, high in zip(*ends_2M, strict=True))


def _warnings(round_: Round, mixture: Mixture) -> Iterator[str]:
    problem, evidence = round_.problem, round_.evidence
    if not evidence.count(evidence.top):
        yield f"no run of '{problem.top.name}' at all: what is best there is taken from smaller sizes alone"
    if round_.learnt.why is not None:
        yield f"the Gaussian process could not be fitted ({round_.learnt.why}); a log-linear law stands in for it"
    for size in sorted(round_.dropped):
        mean, deviation = round_.agreements[size]
        name = problem.fidelities[size].name
        yield f"drop the size '{name}': it correlates {mean:.2f} +- {deviation:.2f} with '{problem.top.name}'"
    on_bound = [
        name
        for name, p, high in zip(problem.names, mixture, problem.upper, strict=True)
        if high < 1 and p >= high - 1e-3
    ]
    if on_bound:
        yield f"at the upper bound: {', '.join(on_bound)}"
    yield from _of_failures(round_)


def _of_failures(round_: Round) -> Iterator[str]:
    for reason, count in sorted(round_.table.excluded().items()):
        yield f"{count} run{'s' if count > 1 else ''} left out: {reason}"


def _of_sources(round_: Round, p_M: Floats) -> dict[str, Any]:
    """What each source is worth there, a slice to be drawn, and the mixtures that a verification may run."""
    problem, surface = round_.problem, Surface(round_)
    sources = len(problem.sources)
    finals_FM = round_.finals
    worst_M = finals_FM[int(surface.predict(finals_FM).mean_N.argmax())]
    uniform_M = on_grid(problem.nearest(np.full(sources, 1 / sources)), problem)
    natural_M = on_grid(problem.nearest(problem.natural), problem)
    named = {"chosen": p_M, "natural": natural_M, "uniform": uniform_M, "worst": worst_M}
    return {
        "worth": as_json(worth(surface, (), problem, p_M)),
        "slice": slice_of(surface, problem, p_M, round_.evidence.mixtures_NM),
        "worst": worst_M.tolist(),
        "predicted": dict(zip(named, surface.predict(np.stack(list(named.values()))).mean_N.tolist(), strict=True)),
    }


def _facts(round_: Round) -> dict[str, Any]:
    """JSON values for the report."""
    problem, evidence, posterior = round_.problem, round_.evidence, round_.learnt.posterior
    names = [one.name for one in problem.fidelities]
    facts: dict[str, Any] = {
        "runs": {name: round_.everything.count(size) for size, name in enumerate(names)},
        "spent": round_.table.spent() / problem.top.cost,
        "agreement": {names[size]: list(found) for size, found in round_.agreements.items()},
        "stopped": round_.why_stop(),
    }
    if posterior is not None:
        belief = posterior.belief
        facts["reach"] = dict(zip(problem.names, belief.lengths_M.tolist(), strict=True))
        facts["noise"] = float(belief.noise_S[evidence.top]) ** 0.5 * evidence.scale
    return facts
