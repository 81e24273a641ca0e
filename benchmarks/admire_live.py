"""Which way of searching a mixture finds more for the same seconds of training: on real text, with runs that are made.

    python benchmarks/admire_live.py RECIPE --runs FOLDER

RECIPE is one of `lmworks mix` with smaller sizes. A pool of mixtures is drawn, and each is trained once at every size,
by the runner that `lmworks mix` has: what is done already is not done again, so a run that was stopped goes on. A
size's cost is the mean of its measured seconds. Then each way searches the pool for the same seconds, several seeds:

    random            large runs, the best of those made is recommended
    regmix            one-shot: random runs of the smallest size that the budget pays, a log-linear law
    improvement       large runs one by one, by expected improvement
    entropy           runs of all sizes by information per second, linked sizes
    paper             the same with the paper's settings

Regret: the target of the recommended mixture at the largest size less the pool's best, as it was measured. It is seen
that sizes pay when entropy's mean regret at half of the budget is no more than improvement's at all of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from pathlib import Path
from typing import Any

import evidence_file
import numpy as np
import torch
from admire_replay import PLANS

from lmworks.cli.console import Reporter
from lmworks.cli.prove import Stages
from lmworks.core import recipe as recipes
from lmworks.core.errors import LmworksError
from lmworks.core.seeds import seed_for
from lmworks.methods.admire_bayesopt import AdmireBayesOpt
from lmworks.methods.admire_bayesopt.rounds import Round
from lmworks.mix.linear import LogLinear
from lmworks.mix.problem import TOP, Mixture, MixtureProblem
from lmworks.mix.runs import Run, RunTable, Trial
from lmworks.mix.sample import Sampler, draw
from lmworks.mix.swarm import Swarm

WAYS = {
    "improvement": PLANS["improvement, large runs only"],
    "entropy": PLANS["entropy, linked sizes"],
    "paper": PLANS["entropy, as in the paper"],
}
Pool = dict[str, dict[Mixture, Run]]
"""Size -> mixture -> run."""


def trained(options: argparse.Namespace) -> tuple[MixtureProblem, Pool]:
    """The pool's runs, made as far as they are not, and the problem with measured costs."""
    mix = recipes.load(options.recipe, verb="mix")
    swarm = Swarm(mix, options.runs, Stages(), Reporter().preparing)
    mixtures = [tuple(p) for p in draw(swarm.problem, options.pool, seed=0, sampler=Sampler()).tolist()]
    pool: Pool = {}
    for fidelity in swarm.problem.fidelities:
        made = swarm.make([Trial(mixture=p, fidelity=fidelity.name) for p in mixtures])
        pool[fidelity.name] = {run.trial.mixture: run for run in made if run.failed is None}
    seconds = {name: statistics.mean(run.seconds for run in runs.values()) for name, runs in pool.items()}
    measured = [dataclasses.replace(one, cost=seconds[one.name] / seconds[TOP]) for one in swarm.problem.fidelities]
    return dataclasses.replace(swarm.problem, fidelities=tuple(measured)), pool


def random_way(problem: MixtureProblem, pool: Pool, budget: float, seed: int) -> Mixture:
    """The best of as many large runs as the budget pays."""
    rng = np.random.default_rng(seed_for(seed, "random"))
    mixtures = sorted(pool[TOP])
    made = [mixtures[i] for i in rng.permutation(len(mixtures))[: max(1, int(budget))]]
    return min(made, key=lambda p: problem.value(pool[TOP][p].losses))


def regmix_way(problem: MixtureProblem, pool: Pool, budget: float, seed: int) -> Mixture | None:
    """The best by a law fitted to random runs of the smallest size; None where the budget does not pay enough."""
    rng = np.random.default_rng(seed_for(seed, "regmix"))
    smallest = problem.fidelities[0]
    mixtures = sorted(pool[smallest.name])
    made = [mixtures[i] for i in rng.permutation(len(mixtures))[: int(budget / smallest.cost)]]
    told = (Run(trial=Trial(mixture=p, fidelity=smallest.name), losses=pool[smallest.name][p].losses) for p in made)
    try:
        law = LogLinear().fit(RunTable(problem, told).to_learn(smallest.name))
    except LmworksError:
        return None
    finals = sorted(pool[TOP])
    return finals[int(law.predict(np.array(finals)).mean_N.argmin())]


def searched(problem: MixtureProblem, pool: Pool, settings: dict[str, Any], budget: float, seed: int) -> Mixture | None:
    """What a search recommends when the budget is spent."""
    plan = AdmireBayesOpt(budget=budget, **settings)
    trials = [Trial(mixture=p, fidelity=size) for size, runs in pool.items() for p in runs]
    table = RunTable(problem)
    while asked := plan.ask(problem, table, seed=seed, count=1, pool=trials):
        (trial,) = asked
        losses = pool[trial.fidelity][trial.mixture].losses
        table.tell(Run(trial=trial, losses=losses, cost=problem.fidelity(trial.fidelity).cost))
    return Round(plan, problem, table, seed=seed, pool=trials).chosen


def compared(problem: MixtureProblem, pool: Pool, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Regret of each way at half of the budget and at all of it."""
    best = min(problem.value(run.losses) for run in pool[TOP].values())
    found = []
    for way in ("random", "regmix", *WAYS):
        for budget in (options.budget / 2, options.budget):
            regrets = []
            for seed in range(options.seeds):
                if way in WAYS:
                    mixture = searched(problem, pool, WAYS[way], budget, seed)
                else:
                    mixture = (random_way if way == "random" else regmix_way)(problem, pool, budget, seed)
                regrets.append(None if mixture is None else problem.value(pool[TOP][mixture].losses) - best)
            known = [regret for regret in regrets if regret is not None]
            mean = statistics.mean(known) if known else None
            found.append({"way": way, "budget": budget, "mean_regret": mean, "regrets": regrets})
            print(f"{way:12} budget {budget:5.2f}  mean regret {mean}  of {[r and round(r, 4) for r in regrets]}")
    return found


def main() -> None:
    """Train the pool, compare, write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a recipe of lmworks mix with sizes, such as `sizes`")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs; kept, and gone on with")
    parser.add_argument("--pool", type=int, default=40, help="mixtures")
    parser.add_argument("--budget", type=float, default=10.0, help="of a search, in large runs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=evidence_file.FOLDER, help="folder of the evidence")
    options = parser.parse_args()
    torch.set_num_threads(1)
    problem, pool = trained(options)
    values = [problem.value(run.losses) for run in pool[TOP].values()]
    ranks = {name: _rank(problem, pool, name) for name in pool if name != TOP}
    costs = {one.name: one.cost for one in problem.fidelities}
    print(f"costs {costs}; targets {min(values):.4f} to {max(values):.4f}; rank correlation with the largest {ranks}")
    record = evidence_file.head("admire_live")
    record |= {"recipe": recipes.table_of(recipes.load(options.recipe, verb="mix")), "costs": costs, "agreement": ranks}
    record["pool"] = [
        {"size": size, "mixture": list(p), "target": problem.value(run.losses), "seconds": run.seconds}
        for size, runs in pool.items()
        for p, run in runs.items()
    ]
    record["results"] = compared(problem, pool, options)
    print(evidence_file.write(record, options.out))


def _rank(problem: MixtureProblem, pool: Pool, size: str) -> float:
    from lmworks.maths.ranks import spearman

    both = [p for p in pool[TOP] if p in pool[size]]
    return spearman(
        [problem.value(pool[size][p].losses) for p in both], [problem.value(pool[TOP][p].losses) for p in both]
    )


if __name__ == "__main__":
    main()
