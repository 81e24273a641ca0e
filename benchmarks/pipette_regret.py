"""What a planner's picks cost on clusters whose links differ: nothing is measured, the truth is a noisy simulation.

    python benchmarks/pipette_regret.py

50 clusters of 8, 12 or 16 machines with 8 GPUs each: bandwidth of a link log-normal with sigma 0.3, two links a tenth
of it. GPT models of 1, 3, 7 and 11 billion parameters in turn. Every layout with p | G, t | 8, b in 1, 2, 4, 8 is a
candidate. The truth of one is 1F1B on the clock, where every stage is off by some hundredths and every link by some
more than the profile says, and the exchange of gradients on the same links; it fits when what sizes tell, with a factor
and a constant that planners do not know, is below the GPU's memory.

Regret: seconds of the pick over those of the best candidate that was found, less 1. A pick that does not fit counts as
such, and its planner's next one that fits is timed. The best is looked for among the twelve candidates that are best by
the closed form on true links, each with machines placed on true links, and all picks. Takes some minutes on one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import evidence_file
import numpy as np
from pipette_ground import (
    GPUS,
    HIDDEN,
    INSIDE,
    LATENCY,
    MEMORY,
    MODELS,
    NOMINAL,
    OFF_MEMORY,
    SMALL,
    VOCABULARY,
    Candidate,
    Cluster,
    alike,
    all_of,
    candidates,
    clock,
    closed,
    fits,
    ground_of,
    made_of,
    model_of,
    pipeline_of,
    recipe_of,
    told,
    truth,
)

from lmworks.methods.pipette.plans import ROWS
from lmworks.parallel.footprint import Footprint
from lmworks.parallel.layout import Layout, problems_of
from lmworks.plan.latency import amp_exchange_seconds, amp_seconds
from lmworks.plan.memory import Network, features, fit, heaviest
from lmworks.plan.placement import anneal

BEST_OF, RANKED = 12, 10
"""Candidates that the best is looked for among; plans that the simulator runs."""

# --- the planners -----------------------------------------------------------------------------------------------------

Ranked = Iterator[tuple[Candidate, tuple[int, ...]]]
Estimate = Callable[[Candidate], float]
"""Bytes that a candidate takes, as a planner sees it."""


def amp(cluster: Cluster) -> Ranked:
    """AMP's form on the datasheet's links; memory is not asked; the launcher's order."""

    def seconds(each: Candidate) -> float:
        hop = 2 * (made_of(each).boundary_bytes / NOMINAL + LATENCY)
        data = each.layout.dp_replicate
        sent = amp_exchange_seconds(made_of(each).gradient_bytes, data, INSIDE, NOMINAL * GPUS)
        return amp_seconds(pipeline_of(each, (each.pp - 1) * hop)) + sent

    yield from _launcher(cluster, sorted(all_of(cluster), key=seconds))


def varuna(cluster: Cluster) -> Ranked:
    """No tensor parallelism, the clock on the datasheet's links; memory is not asked; the launcher's order."""
    same, links = tuple(range(cluster.machines)), alike(cluster.machines)
    plain = [each for each in all_of(cluster) if each.tp == 1]
    yield from _launcher(cluster, sorted(plain, key=lambda each: clock(each, same, links)))


def megatron(cluster: Cluster) -> Ranked:
    """By hand: t = 8, the smallest p that ran, b by its third rule; the launcher's order."""
    ran = [each for each in all_of(cluster) if each.tp == GPUS and fits(cluster, each)]
    least = min(each.pp for each in ran)
    by_rule = sorted(
        (each for each in ran if each.pp == least),
        key=lambda each: ((made_of(each).micro_batches + each.pp - 1) * max(made_of(each).forward), -each.micro),
    )
    yield from _launcher(cluster, by_rule)


def pipette(cluster: Cluster, estimate: Estimate, *, papers: bool, place: bool, ranked: int, moves: int) -> Ranked:
    """Those that fit by an estimate, placed and timed on measured links; the first `ranked` by the clock."""
    timed = []
    for each in all_of(cluster):
        if estimate(each) <= MEMORY:
            places = tuple(range(cluster.machines))
            if place:
                ground = ground_of(each, cluster.seen, papers=papers)
                places = anneal(ground, seed=cluster.number, moves=moves).order
            timed.append((closed(each, places, cluster.seen, papers=papers), each, places))
    timed.sort(key=lambda found: found[0])
    best = sorted(timed[:ranked], key=lambda found: clock(found[1], found[2], cluster.seen))
    yield from ((each, places) for _, each, places in [*best, *timed[ranked:]])


def _launcher(cluster: Cluster, found: list[Candidate]) -> Ranked:
    yield from ((each, tuple(range(cluster.machines))) for each in found)


# --- estimators of memory ---------------------------------------------------------------------------------------------


def runs_of_one_machine() -> list[tuple[Footprint, list[float], float]]:
    """What planners have measured: small models on the 8 GPUs of one machine; told, features, bytes."""
    found = []
    draw = np.random.default_rng(0)
    degrees = itertools.product(SMALL, (1, 2, 4), (1, 2, 4), (1, 2, 4, 8), ROWS, (256, 512))
    for model, tp, pp, data, micro, batch in degrees:
        if tp * pp * data > GPUS or batch // data // micro < pp:
            continue
        layout = Layout(pp=pp, dp_replicate=data, dp_shard=1, tp=tp, sequence_parallel=tp > 1)
        recipe = recipe_of(model, micro, batch)
        if problems_of(dataclasses.replace(recipe, layout=layout)):
            continue
        _, footprint = heaviest(recipe, layout, vocabulary=VOCABULARY)
        took = HIDDEN.bytes(footprint) * float(np.exp(draw.normal(0, OFF_MEMORY)))
        if took <= MEMORY:
            found.append((footprint, features(recipe, layout), took))
    return found


def estimators(epochs: int) -> tuple[dict[str, Estimate], dict[str, Any]]:
    """By name: sizes corrected by runs, and the paper's network; and what each of them was fitted to."""
    runs = runs_of_one_machine()
    correction = fit([(footprint, took) for footprint, _, took in runs])
    network = Network(
        np.array([run for _, run, _ in runs]), np.array([took for *_, took in runs]), seed=0, epochs=epochs
    )

    @functools.cache
    def guessed(each: Candidate) -> float:
        return network.bytes(features(recipe_of(each.model, each.micro), each.layout))

    facts = {"runs": len(runs), "factor": correction.factor, "constant": correction.constant, "epochs": epochs}
    return {"corrected": lambda each: correction.bytes(told(each)), "network": guessed}, facts


def memory_errors(found: dict[str, Estimate]) -> dict[str, dict[str, float]]:
    """Mean of absolute relative errors of each estimator over the candidates of the largest cluster, by model."""
    return {
        name: {
            model: statistics.mean(abs(estimate(each) / HIDDEN.bytes(told(each)) - 1) for each in candidates(model, 16))
            for model in MODELS
        }
        for name, estimate in found.items()
    }


# --- the study --------------------------------------------------------------------------------------------------------


def study(number: int, memory: dict[str, Estimate], *, moves: int) -> dict[str, Any]:
    """One cluster: what each planner picks, whether it fits, and its regret."""
    cluster = Cluster(number)
    with_clock = {"ranked": RANKED, "moves": moves, "papers": False}
    plain = {"ranked": 0, "moves": moves}
    planners: dict[str, Ranked] = {
        "amp": amp(cluster),
        "varuna": varuna(cluster),
        "megatron": megatron(cluster),
        "pipette, paper's form": pipette(cluster, memory["corrected"], papers=True, place=True, **plain),
        "pipette, not placed": pipette(cluster, memory["corrected"], papers=False, place=False, **plain),
        "pipette": pipette(cluster, memory["corrected"], papers=False, place=True, **plain),
        "pipette + simulator": pipette(cluster, memory["corrected"], place=True, **with_clock),
        "pipette + simulator, network": pipette(cluster, memory["network"], place=True, **with_clock),
    }
    picks: dict[str, dict[str, Any]] = {}
    for name, ranked in planners.items():
        first, pick, tried = None, None, 0
        for each, places in ranked:
            tried += 1
            first = each if first is None else first
            if fits(cluster, each):
                pick = (each, places)
                break
        picks[name] = {
            "fits": first is not None and fits(cluster, first),
            "picked": tried,
            "layout": None if pick is None else f"pp {pick[0].pp} tp {pick[0].tp} b {pick[0].micro}",
            "seconds": None if pick is None else truth(cluster, *pick),
        }
    best = min([_best(cluster, moves), *(p["seconds"] for p in picks.values() if p["seconds"] is not None)])
    for each in picks.values():
        each["regret"] = None if each["seconds"] is None else round(each["seconds"] / best - 1, 5)
    return {"cluster": number, "machines": cluster.machines, "model": model_of(cluster), "best": best, "picks": picks}


def _best(cluster: Cluster, moves: int) -> float:
    """The least seconds found with all known."""
    same = tuple(range(cluster.machines))
    fitting = sorted(
        (each for each in all_of(cluster) if fits(cluster, each)), key=lambda each: closed(each, same, cluster.true)
    )
    placed = [
        (each, anneal(ground_of(each, cluster.true), seed=1, moves=2 * moves).order) for each in fitting[:BEST_OF]
    ]
    return min(truth(cluster, each, places) for each, places in placed)


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each planner: mean, median and largest regret, share of first picks that do not fit."""
    found = {}
    for name in rows[0]["picks"]:
        picks = [row["picks"][name] for row in rows]
        regrets = [pick["regret"] for pick in picks if pick["regret"] is not None]
        found[name] = {
            "mean_regret": round(statistics.mean(regrets), 4) if regrets else None,
            "median_regret": round(statistics.median(regrets), 4) if regrets else None,
            "largest_regret": max(regrets, default=None),
            "does_not_fit": round(sum(not pick["fits"] for pick in picks) / len(picks), 4),
            "no_pick": sum(pick["regret"] is None for pick in picks),
        }
    return found


def shown(found: dict[str, dict[str, Any]]) -> str:
    """The table for people."""
    lines = [f"{'planner':<30}{'mean regret':>12}{'median':>9}{'largest':>9}{'does not fit':>14}{'no pick':>9}"]
    for name, facts in found.items():
        share = [facts[key] for key in ("mean_regret", "median_regret", "largest_regret", "does_not_fit")]
        cells = ["-" if value is None else f"{100 * value:.1f} %" for value in share]
        lines.append(f"{name:<30}{cells[0]:>12}{cells[1]:>9}{cells[2]:>9}{cells[3]:>14}{facts['no_pick']:>9}")
    return "\n".join(lines)


def main() -> None:
    """Plan every cluster, print the table, write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clusters", type=int, default=50)
    parser.add_argument("--moves", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=2000, help="of the memory network; the paper's are 5000")
    parser.add_argument("--no-evidence", action="store_true")
    options = parser.parse_args()
    head, start = evidence_file.head("pipette_regret"), time.monotonic()
    memory, fitted = estimators(options.epochs)
    rows = []
    for number in range(options.clusters):
        rows.append(study(number, memory, moves=options.moves))
        print(f"cluster {number}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    found, errors = summary(rows), memory_errors(memory)
    print(shown(found))
    for name, each in errors.items():
        print(f"memory, {name}: " + ", ".join(f"{model} {100 * off:.1f} %" for model, off in each.items()))
    print(f"{time.monotonic() - start:.0f} s")
    if options.no_evidence:
        return
    record = head | {
        "kind": "modelled",
        "memory_fit": fitted,
        "memory_errors": errors,
        "summary": found,
        "results": rows,
    }
    print(evidence_file.write(record, evidence_file.FOLDER))


if __name__ == "__main__":
    main()
