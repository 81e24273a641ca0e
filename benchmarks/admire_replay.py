"""What it costs to find the best of finished runs: ADMIRE-BayesOpt on published tables of mixtures and losses.

    LMWORKS_REGMIX_DATA=FOLDER python benchmarks/admire_replay.py

FOLDER has the run tables of RegMix (github.com/sail-sg/regmix, data/, MIT): mixtures of 17 sources, validation losses
of proxies of 1M and 60M parameters, and of 1B where they are there. The pool is 48 runs of the largest size, drawn anew
for each seed, and all training runs of 1M, which are of other mixtures. A run costs its parameters over those of the
largest size. After each run the search recommends one of the pool's large mixtures; it is told nothing but the runs
that it bought. Reported: cost until the recommendation is the pool's best and stays it, whether or not that mixture was
run (adding the run that verifies it), cost until first, the rank in the end, and how many runs of which size were
bought.

Held against: large runs at random, where the best of those made is recommended (the mean over all orders is exact).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import evidence_file
import numpy as np
import torch

from lmworks.core.seeds import seed_for
from lmworks.methods.admire_bayesopt import AdmireBayesOpt
from lmworks.methods.admire_bayesopt.rounds import Round
from lmworks.mix import tables
from lmworks.mix.problem import Fidelity, MixtureProblem, Source
from lmworks.mix.runs import Run, RunTable, Trial

PARAMETERS = {"1m": 1.0, "60m": 60.0, "1b": 1000.0}
SPLIT = {"1m": "train", "60m": "test", "1b": "test"}
POOL = 48
PLANS: dict[str, dict[str, Any]] = {
    "improvement, large runs only": {"by": "improvement", "starts": 4},
    "entropy, linked sizes": {"by": "entropy", "kernel": "linked"},
    "entropy, truncated, guarded": {"by": "entropy", "kernel": "truncated"},
    "entropy, as in the paper": {
        "by": "entropy",
        "kernel": "truncated",
        "inputs": "share",
        "standardise": "all",
        "starts": 1,
        "large_every": None,
        "large_after": None,
        "least_agreement": -1.0,
    },
}
Table = dict[tuple[float, ...], float]


def table_of(folder: Path, split: str, size: str, target: str) -> tuple[tuple[str, ...], Table]:
    """Sources, and the loss of each mixture."""
    files = [folder / f"{split}_mixture_{size}.csv", folder / f"{split}_pile_loss_{size}.csv"]
    found = tables.read(files)
    (column,) = tables.target_of(found, [target])
    mixtures = [tuple(row) for row in found.mixtures_NM.tolist()]
    return found.sources, dict(zip(mixtures, found.losses[column].tolist(), strict=True))


def replay(
    problem: MixtureProblem, told: dict[str, Table], plan: AdmireBayesOpt, seed: int, steps: int
) -> dict[str, Any]:
    """One search among finished runs."""
    pool = [Trial(mixture=p, fidelity=size) for size, table in told.items() for p in table]
    top = told[problem.top.name]
    ranked = sorted(top, key=top.__getitem__)
    rank = {mixture: i for i, mixture in enumerate(ranked)}
    table, path = RunTable(problem), []
    for _ in range(steps):
        asked = plan.ask(problem, table, seed=seed, count=1, pool=pool)
        if not asked:
            break
        trial = asked[0]
        loss = told[trial.fidelity][trial.mixture]
        table.tell(Run(trial=trial, losses={"loss": loss}, cost=problem.fidelity(trial.fidelity).cost))
        chosen = Round(plan, problem, table, seed=seed, pool=pool).chosen
        if chosen is not None:
            path.append((table.spent(), rank[chosen], table.has(Trial(mixture=chosen, fidelity=problem.top.name))))
    right = [cost for cost, place, _ in path if place == 0]
    last_wrong = max((i for i, (_, place, _) in enumerate(path) if place), default=-1)
    stays = path[last_wrong + 1] if last_wrong + 1 < len(path) else None
    return {
        "seed": seed,
        "first_cost": right[0] if right else None,
        "stays_cost": None if stays is None else stays[0] + (0.0 if stays[2] else problem.top.cost),
        "last_rank": path[-1][1] + 1 if path else None,
        "spent": table.spent(),
        "runs": {size: sum(r.trial.fidelity == size for r in table) for size in told},
        "path": [[round(cost, 4), place + 1, int(made)] for cost, place, made in path],
    }


def main() -> None:
    """Replay every plan on every target, print a table, write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=os.environ.get("LMWORKS_REGMIX_DATA"), help="run tables of RegMix")
    parser.add_argument("--targets", nargs="+", default=["the_pile_pile_cc"])
    parser.add_argument("--plans", nargs="+", default=list(PLANS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=20.0, help="in runs of the largest size")
    parser.add_argument("--steps", type=int, default=60, help="runs at most")
    parser.add_argument("--out", type=Path, default=evidence_file.FOLDER, help="folder of the evidence; '' writes none")
    options = parser.parse_args()
    if not options.folder:
        sys.exit("say where the run tables are: --folder, or LMWORKS_REGMIX_DATA")
    torch.set_num_threads(1)
    folder = Path(options.folder)
    sizes = [size for size in PARAMETERS if (folder / f"{SPLIT[size]}_mixture_{size}.csv").is_file()]
    record = evidence_file.head("admire_replay")
    record["data"] = "RegMix run tables, sail-sg/regmix, MIT"
    record["sizes"], record["results"] = sizes, []
    print(f"sizes {', '.join(sizes)}; pool of {POOL} runs of {sizes[-1]}; at random {(POOL + 1) / 2:.1f} large runs")
    for target in options.targets:
        for name in options.plans:
            record["results"].append(one(folder, sizes, target, name, options))
    if str(options.out) != ".":
        print(evidence_file.write(record, options.out))


def one(folder: Path, sizes: list[str], target: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All seeds of a plan on a target."""
    cost = {size: PARAMETERS[size] / PARAMETERS[sizes[-1]] for size in sizes}
    found = {size: table_of(folder, SPLIT[size], size, target) for size in sizes}
    names, _ = found[sizes[0]]
    problem = MixtureProblem(
        sources=tuple(Source(name=source) for source in names),
        target={"loss": 1.0},
        fidelities=tuple(Fidelity(name=size, cost=cost[size]) for size in sizes),
    )
    runs, began = [], time.perf_counter()
    for seed in range(options.seeds):
        rng = np.random.default_rng(seed_for(seed, "pool"))
        large = list(found[sizes[-1]][1].items())
        chosen = dict(large[i] for i in sorted(rng.choice(len(large), POOL, replace=False)))
        told = {size: (chosen if size == sizes[-1] else found[size][1]) for size in sizes}
        plan = AdmireBayesOpt(budget=options.budget, **PLANS[name])
        runs.append(replay(problem, told, plan, seed, options.steps))
    stays = [run["stays_cost"] for run in runs]
    within = sum(value is not None and value <= 10 for value in stays)
    shown = ", ".join("never" if value is None else f"{value:.2f}" for value in stays)
    ranks = ", ".join(str(run["last_rank"]) for run in runs)
    seconds = (time.perf_counter() - began) / options.seeds
    print(
        f"{target:12} {name:30} stays best from {shown}; within 10: {within} of {len(runs)}; rank in the end {ranks}; "
        f"{statistics.mean(run['spent'] for run in runs):.1f} spent, {seconds:.0f} s a seed",
        flush=True,
    )
    return {"target": target, "plan": name, "settings": PLANS[name], "within_10": within, "runs": runs}


if __name__ == "__main__":
    main()
