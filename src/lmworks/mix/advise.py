"""From a table of runs to a recommended mixture, with all that is known against it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from lmworks.mix import worth as worths
from lmworks.mix.asking import Recommendation
from lmworks.mix.learn import Learnt, learn, rank_of_unseen, resampled
from lmworks.mix.problem import Floats, MixtureProblem
from lmworks.mix.runs import RunTable
from lmworks.mix.search import draw_for, on_grid, search
from lmworks.mix.slices import slice_of
from lmworks.mix.surrogate import Fitted

REFIT_DRAWS = 20_000
"""Drawn mixtures that each refit chooses among."""
PROPOSED = 3
"""Further runs that are proposed where none was made near the answer."""


@final
@dataclass(frozen=True, kw_only=True)
class Asked:
    """How a recommendation is made."""

    surrogate: str = "auto"
    simulated: int = 100_000
    """Drawn mixtures."""
    top: int = 128
    """How many of the best are averaged."""
    pull: float = 0.0
    """Weight of KL(mixture || natural) beside the target."""
    resamples: int = 20
    """Refits to resampled runs, for spreads."""
    seed: int = 0


def advise(table: RunTable, fidelity: str, asked: Asked) -> Recommendation:
    """The mixture with the best predicted target, learnt from the runs of a size.

    The natural mixture where runs cannot tell mixtures apart, or where none is predicted to be better. Raises
    LmworksError when fewer than M + 2 runs can be learnt from.
    """
    problem = table.problem
    learnt = learn(table, fidelity, surrogate=asked.surrogate, seed=asked.seed)
    natural_M = on_grid(problem.nearest(problem.natural), problem)
    drawn_NM = draw_for(problem, asked.simulated, seed=asked.seed)
    found = search(learnt.joint, problem, drawn_NM, top=asked.top, pull=asked.pull)
    refits = resampled(learnt, asked.resamples, seed=asked.seed)
    chosen_M, rule = found.mixture_M, f"{found.rule}, by {_named(learnt)}"
    gain = _gain(learnt.joint, refits, natural_M, chosen_M)
    blind = worths.cannot_tell(table, fidelity)
    if blind is not None or gain[0] <= 0:
        why = blind or "no mixture is predicted to be better than it"
        chosen_M, rule, gain = natural_M, f"the natural mixture: {why}", (0.0, 0.0)
    unseen = rank_of_unseen(learnt, table, fidelity)
    told = list(worths.warnings(learnt, table, chosen_M, unseen=unseen))
    if gain[0] > 0 and gain[0] < 2 * gain[1]:
        told.append(
            f"the gain over the natural mixture, {gain[0]:.3g}, is less than twice its standard deviation over refits,"
            f" {gain[1]:.3g}"
        )
    at = learnt.joint.predict(chosen_M[None])
    far = worths.too_far(learnt, chosen_M) is not None
    facts = {
        "size": fidelity,
        "surrogates": learnt.as_json(),
        "unseen": {"runs": unseen[0], "spearman": unseen[1] if math.isfinite(unseen[1]) else None},
        "seed_noise": worths.seed_noise(table, fidelity),
        "worth": worths.as_json(worths.worth(learnt.joint, refits, problem, chosen_M)),
        "worst": found.worst_M.tolist(),
        "predicted": _predicted(learnt.joint, problem, chosen_M, natural_M, found.worst_M),
        "slice": slice_of(learnt.joint, problem, chosen_M, learnt.mixtures),
        "proposed": _proposed(refits, problem, drawn_NM, chosen_M, asked) if far else [],
    }
    return Recommendation(
        mixture=tuple(chosen_M.tolist()),
        rule=rule,
        predicted=float(at.mean_N[0]),
        sd=float(at.sd_N[0]),
        spread=_spread(refits, problem, drawn_NM, asked),
        gain=gain,
        warnings=tuple(told),
        facts=facts,
    )


def _named(learnt: Learnt) -> str:
    kinds = dict.fromkeys(one.name for one in learnt.surrogates.values())
    return " and ".join(kinds)


def _gain(predicts: Fitted, refits: Sequence[Fitted], natural_M: Floats, chosen_M: Floats) -> tuple[float, float]:
    """Predicted target of the natural mixture minus that of the chosen one, and its standard deviation over refits."""
    pair = np.stack([natural_M, chosen_M])

    def gain(one: Fitted) -> float:
        y = one.predict(pair).mean_N
        return float(y[0] - y[1])

    again = [gain(one) for one in refits]
    return gain(predicts), float(np.std(again, ddof=1)) if len(again) > 1 else 0.0


def _predicted(
    predicts: Fitted, problem: MixtureProblem, chosen: Floats, natural: Floats, worst: Floats
) -> dict[str, float]:
    """The target of the mixtures that a verification may run, by name."""
    m = len(chosen)
    uniform = on_grid(problem.nearest(np.full(m, 1 / m)), problem)
    named = {"chosen": chosen, "natural": natural, "uniform": uniform, "worst": worst}
    return dict(zip(named, predicts.predict(np.stack(list(named.values()))).mean_N.tolist(), strict=True))


def _bests(refits: Sequence[Fitted], problem: MixtureProblem, drawn_NM: Floats, asked: Asked) -> Floats:
    """The mixture that each refit would have chosen, (refits, M)."""
    few = drawn_NM[:: max(1, len(drawn_NM) // REFIT_DRAWS)]
    top = max(1, asked.top * len(few) // len(drawn_NM))
    return np.array([search(one, problem, few, top=top, pull=asked.pull).mixture_M for one in refits])


def _spread(
    refits: Sequence[Fitted], problem: MixtureProblem, drawn_NM: Floats, asked: Asked
) -> tuple[tuple[float, float], ...]:
    if len(refits) < 2:
        return ()
    low, high = np.quantile(_bests(refits, problem, drawn_NM, asked), [0.05, 0.95], axis=0)
    return tuple(zip(low.tolist(), high.tolist(), strict=True))


def _proposed(
    refits: Sequence[Fitted], problem: MixtureProblem, drawn_NM: Floats, chosen_M: Floats, asked: Asked
) -> list[list[float]]:
    """The answer, and what the first refits would have answered: where a few more runs would tell most."""
    others = _bests(refits[: PROPOSED - 1], problem, drawn_NM, asked) if refits else np.empty((0, len(chosen_M)))
    return [chosen_M.tolist(), *others.tolist()]
