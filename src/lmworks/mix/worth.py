"""What each source is worth at a mixture, and what a person must know before they believe a recommendation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import numpy as np

from lmworks.mix.learn import Learnt
from lmworks.mix.problem import Floats, MixtureProblem
from lmworks.mix.runs import RunTable
from lmworks.mix.surrogate import Fitted

POINT = 0.01
"""What is moved from all other sources to one: a hundredth of the tokens."""
GOOD_RANK = 0.8
"""Rank correlation below which unseen mixtures are told to be ordered badly."""
ALMOST_ALL = 0.8
"""Share of the target's own sources beyond which the target decides the answer."""
MANY_EPOCHS = 4.0
"""Tokens that are read more often than this are worth less each time."""
NEAR_BOUND = 1e-3


@final
@dataclass(frozen=True, kw_only=True)
class Worth:
    """One source at a mixture."""

    source: str
    natural: float
    """Its natural share."""
    share: float
    epochs: float | None
    """How often it is read in the run that the mixture is for."""
    point: float
    """What the target loses when one more hundredth of the tokens comes from it, taken from the others in proportion;
    positive is good."""
    point_sd: float | None
    """Over refits to resampled runs; None for fewer than two."""
    without: float
    """What the target gains when it is left out and the others take its place in proportion; positive: it is needed."""


def worth(predicts: Fitted, refits: Sequence[Fitted], problem: MixtureProblem, p_M: Floats) -> list[Worth]:
    """Each source, in order."""
    m = len(p_M)
    more = np.stack([_moved(p_M, j, p_M[j] + POINT) for j in range(m)])
    less = np.stack([_moved(p_M, j, 0.0) for j in range(m)])
    asked = np.vstack([p_M[None], more, less])

    def gains(one: Fitted) -> tuple[Floats, Floats]:
        y = one.predict(asked).mean_N
        return y[0] - y[1 : m + 1], y[m + 1 :] - y[0]

    point, without = gains(predicts)
    points = np.array([gains(one)[0] for one in refits]).reshape(len(refits), m)
    sds = points.std(axis=0, ddof=1).tolist() if len(refits) > 1 else [None] * m
    epochs, natural = problem.epochs(p_M), problem.natural
    return [
        Worth(
            source=name,
            natural=float(natural[j]),
            share=float(p_M[j]),
            epochs=epochs.get(name),
            point=float(point[j]),
            point_sd=sds[j],
            without=float(without[j]),
        )
        for j, name in enumerate(problem.names)
    ]


def as_json(found: Sequence[Worth]) -> list[dict[str, Any]]:
    """JSON values."""
    return [asdict(one) for one in found]


def cannot_tell(table: RunTable, fidelity: str) -> str | None:
    """Why the runs cannot tell mixtures apart: their values lie no further apart than twice what seeds make of one."""
    noise = seed_noise(table, fidelity)
    values = table.to_learn(fidelity).values_N
    if noise is None or len(values) < 2:
        return None
    spread = float(values.std(ddof=1))
    if spread >= 2 * noise:
        return None
    return f"mixtures cannot be told apart: the target's sd is {spread:.3g} between them, {noise:.3g} between seeds"


def seed_noise(table: RunTable, fidelity: str) -> float | None:
    """Standard deviation of the target over seeds of one mixture, pooled; None where no mixture was run twice."""
    groups: dict[tuple[float, ...], list[float]] = {}
    for run in table.chosen(lambda run: run.trial.fidelity == fidelity):
        groups.setdefault(run.trial.mixture, []).append(table.problem.value(run.losses))
    found = [np.array(values) for values in groups.values() if len(values) > 1 and np.isfinite(values).all()]
    degrees = sum(len(values) - 1 for values in found)
    if not degrees:
        return None
    return math.sqrt(sum(float(((values - values.mean()) ** 2).sum()) for values in found) / degrees)


def warnings(learnt: Learnt, table: RunTable, p_M: Floats, *, unseen: tuple[int, float]) -> Iterator[str]:
    """What speaks against a mixture that was found."""
    problem = table.problem
    for why, count in table.excluded().items():
        yield f"{count} run{'s' if count != 1 else ''} left out: {why}"
    if unseen[0] >= 3 and not unseen[1] >= GOOD_RANK:
        yield f"{unseen[0]} unseen mixtures are ordered badly: rank correlation {unseen[1]:.2f}, below {GOOD_RANK}"
    yield from _at_bounds(problem, p_M)
    if far := too_far(learnt, p_M):
        yield far
    own = [name for name, weight in problem.target.items() if weight > 0 and name in problem.names]
    if 0 < len(own) < len(problem.names):
        share = float(sum(p_M[problem.names.index(name)] for name in own))
        if share > ALMOST_ALL:
            yield f"{', '.join(own)}, the target itself, gets {share:.0%}: the choice of the target decides the answer"


def too_far(learnt: Learnt, p_M: Floats) -> str | None:
    """Whether no run was made near a mixture: nearer ones are usual between the runs themselves, 95 times of 100."""
    runs = np.unique(learnt.mixtures, axis=0)
    if len(runs) < 3:
        return None
    apart = np.linalg.norm(runs[:, None] - runs[None], axis=2)
    np.fill_diagonal(apart, np.inf)
    usual = float(np.quantile(apart.min(axis=1), 0.95))
    nearest = float(np.linalg.norm(runs - p_M, axis=1).min())
    if nearest <= usual:
        return None
    return f"no run was made near it: the nearest is {nearest:.2f} away, usual are up to {usual:.2f}. Make some there"


def _at_bounds(problem: MixtureProblem, p_M: Floats) -> Iterator[str]:
    epochs = problem.epochs(p_M)
    for name, share, low, high in zip(problem.names, p_M, problem.lower, problem.upper, strict=True):
        read = f", read {epochs[name]:.1f} times" if name in epochs else ""
        if high < 1 - NEAR_BOUND and share > high - NEAR_BOUND:
            yield f"'{name}' is at its cap of {high:.3f}{read}: more of it would be better still"
        elif low > 0 and share < low + NEAR_BOUND:
            yield f"'{name}' is at its least of {low:.3f}: less of it would be better still"
        elif epochs.get(name, 0.0) > MANY_EPOCHS:
            yield f"'{name}' is read {epochs[name]:.1f} times; beyond {MANY_EPOCHS:g} each time teaches less"


def _moved(p_M: Floats, j: int, share: float) -> Floats:
    """The mixture with another share of source j, the others in proportion."""
    share = min(1.0, max(0.0, share))
    rest = 1 - p_M[j]
    others = p_M / rest if rest > 1e-12 else np.full(len(p_M), 1 / max(1, len(p_M) - 1))
    moved: Floats = others * (1 - share)
    moved[j] = share
    return moved
