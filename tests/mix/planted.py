"""Made-up problems whose answer is known: losses c + exp(a.p), with or without noise."""

from __future__ import annotations

import numpy as np

from lmworks.mix.problem import Fidelity, Floats, MixtureProblem, Source
from lmworks.mix.runs import Rows, Run, RunTable, Trial
from lmworks.mix.sample import Sampler, draw

SIZE = "proxy"


def problem(
    sources: int = 4,
    *,
    target: dict[str, float] | None = None,
    tokens: list[int] | None = None,
    budget: int | None = None,
    max_epochs: float | None = None,
    bounds: dict[str, tuple[float, float]] | None = None,
) -> MixtureProblem:
    """Sources s0, s1, ... of 400, 300, 200, 100 tokens and so on; the target is the first one's loss."""
    counts = tokens or [100 * (sources - i) for i in range(sources)]
    return MixtureProblem(
        sources=tuple(Source(name=f"s{i}", tokens=count) for i, count in enumerate(counts)),
        target=target or {"s0": 1.0},
        fidelities=(Fidelity(name=SIZE, cost=0.1), Fidelity(name="target", cost=1.0)),
        budget=budget,
        max_epochs=max_epochs,
        bounds=bounds or {},
    )


def truth(sources: int, column: int = 0) -> tuple[float, Floats]:
    """c and a_M of a column: its own source helps most, the others less and less."""
    a_M = np.array([0.9 - 0.25 * ((i - column) % sources == 1) + 0.1 * i for i in range(sources)])
    a_M[column] = -1.2
    return 2.0 + 0.1 * column, a_M


def losses(mixtures_NM: Floats, *, noise: float = 0.0, seed: int = 0) -> dict[str, Floats]:
    """Of every source, for each mixture."""
    rng = np.random.default_rng(seed)
    m = mixtures_NM.shape[1]
    found = {}
    for j in range(m):
        c, a_M = truth(m, j)
        found[f"s{j}"] = c + np.exp(mixtures_NM @ a_M) + noise * rng.standard_normal(len(mixtures_NM))
    return found


def mixtures(of: MixtureProblem, count: int, seed: int = 0) -> Floats:
    """Drawn as RegMix draws."""
    return draw(of, count, seed=seed, sampler=Sampler())


def rows(of: MixtureProblem, count: int, *, noise: float = 0.0, seed: int = 0) -> Rows:
    """Mixtures and the first source's loss."""
    p_NM = mixtures(of, count, seed)
    return Rows(p_NM, losses(p_NM, noise=noise, seed=seed)["s0"])


def table(of: MixtureProblem, count: int, *, unseen: int = 0, noise: float = 0.0, seed: int = 0) -> RunTable:
    """As many runs of the small size, and some that are held out."""
    p_NM = mixtures(of, count + unseen, seed)
    values = losses(p_NM, noise=noise, seed=seed)
    found = RunTable(of)
    for i, mixture in enumerate(p_NM.tolist()):
        trial = Trial(mixture=tuple(mixture), fidelity=SIZE, seed=seed, purpose="proxy" if i < count else "unseen")
        found.tell(Run(trial=trial, losses={k: float(v[i]) for k, v in values.items()}, cost=0.1, seconds=1.0))
    return found
