"""Step times of real runs on one to four ranks of this machine against what `lmworks plan` says of them.

    python benchmarks/plan_runs.py

A cluster is made of three measurements: the best float32 product and the best copy of one thread, and what
`lmworks probe` gives for gloo between two ranks. One run on one rank is scored, as `lmworks plan --score` does; the
factor that it gives is the only thing that is fitted. Then every other layout and shape is told with that factor, run
with one thread a rank, and compared: the error of each, their mean (MAPE), and whether the order of the runs is told
rightly. Ranks beyond the cores share them, and are told as devices of so much less; a pipeline's waiting ranks leave
theirs to others, so such runs are also summed up apart. The median of the steady steps counts. Takes about ten minutes
on two quiet cores; on a loaded machine the figures are worth nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import evidence_file
import torch
from pipette_steps import run

from lmworks.core import recipe as recipes
from lmworks.parallel.layout import Layout
from lmworks.parallel.links import read
from lmworks.plan import cluster as clusters
from lmworks.plan import score, simulate
from lmworks.plan.cluster import Cluster, Figure, Level
from lmworks.plan.shape import Ground
from lmworks.plan.work import Work
from lmworks.train.rate import peak_flops

SHAPES = {"small": (4, 128), "wide": (8, 256)}
"""Blocks and hidden size."""
BATCH, LENGTH = 16, 128
ONE = Layout(dp_shard=1)
LAYOUTS: dict[str, tuple[Layout, int]] = {
    "one": (ONE, 4),
    "one, rows 1": (ONE, 1),
    "one, rows 16": (ONE, 16),
    "replicate 2": (Layout(dp_replicate=2, dp_shard=1), 4),
    "shard 2": (Layout(dp_shard=2), 4),
    "pp 2": (Layout(pp=2, dp_shard=1), 2),
    "pp 2, rows 8": (Layout(pp=2, dp_shard=1), 8),
    "tp 2": (Layout(tp=2, dp_shard=1), 4),
    "cp 2": (Layout(cp=2, dp_shard=1), 4),
    "replicate 2, shard 2": (Layout(dp_replicate=2, dp_shard=2), 4),
    "pp 4": (Layout(pp=4, dp_shard=1), 2),
    "pp 2, tp 2": (Layout(pp=2, tp=2, dp_shard=1), 4),
}
"""Layout, and rows of a micro-batch."""
CALIBRATION = ("wide", "one")


def table(shape: str, layout: Layout, rows: int, steps: int) -> dict[str, Any]:
    """A recipe."""
    depth, width = SHAPES[shape]
    return {
        "do": "train",
        "steps": steps,
        "batch_size": BATCH,
        "micro_batch_size": rows,
        "precision": "fp32",
        "device": "cpu",
        "threads": 1,
        "sinks": [],
        "model": {
            "use": "decoder",
            "n_layers": depth,
            "hidden_size": width,
            "n_heads": 4,
            "ffn_size": 3 * width,
            "tied": False,
            "max_position": LENGTH,
        },
        "data": {"readers": [{"use": "python-stdlib"}], "tokenizer": "bytes", "sequence_length": LENGTH},
        "optimizer": {"use": "adamw", "lr": 1e-3},
        "layout": recipes.table_of(layout),
    }


def copied(megabytes: int = 256) -> float:
    """Bytes per second through memory, read and written, of one thread's best copy."""
    source = torch.ones(megabytes * 2**18)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(6):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def machine(links: Path) -> Cluster:
    """This machine as a cluster: a device is a core."""
    torch.set_num_threads(1)
    profile = read(links)
    rate, late = profile.bytes_per_second[0][1], profile.latency_seconds[0][1]
    assert rate is not None, "two machines were probed"
    assert late is not None, "two machines were probed"

    def here(value: float) -> Figure:
        return Figure(value=value, source="measured by benchmarks/plan_runs.py")

    flops = here(peak_flops(torch.device("cpu"), torch.float32)[0])
    link = Level(name="gloo on one machine", bytes_per_second=here(rate), latency_seconds=here(late))
    return dataclasses.replace(
        clusters.load("laptop"),
        name="this machine",
        fp32=flops,
        bf16=flops,
        memory_bytes_per_second=here(copied()),
        links=(link,),
    )


def trained(folder: Path, shape: str, name: str, steps: int) -> Path:
    """A run's folder."""
    layout, rows = LAYOUTS[name]
    place = folder / f"{shape}-{name.replace(', ', '-').replace(' ', '')}"
    recipe = place.with_suffix(".toml")
    recipe.write_text(recipes.dump(recipes.decode(table(shape, layout, rows, steps))), encoding="utf-8")
    ranks = layout.ranks
    words = ["train", str(recipe)] if ranks == 1 else ["launch", str(recipe), "--local", str(ranks), "--threads", "1"]
    run([*words, "--run", str(place)])
    return place


def compared(place: Path, cluster: Cluster, factor: float, cores: int) -> dict[str, Any]:
    """Seconds of a run's step, told and measured."""
    made = score.read(place)
    ranks = made.choice.layout.ranks
    slowed = cluster.slowed(factor * max(1.0, ranks / cores))
    told = simulate.of_choice(Work(Ground(made.recipe, slowed)), made.choice).seconds
    measured = statistics.median(made.seconds)
    return {
        "ranks": ranks,
        "told": told.total,
        "measured": measured,
        "error": told.total / measured - 1,
        "told_by_class": told.by_class(),
        "seconds": list(made.seconds),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, float | int | None]:
    """MAPE; Spearman's correlation of ranks, and the share of pairs of runs whose order is told rightly."""
    told, measured = ([row[name] for row in rows] for name in ("told", "measured"))
    pairs = list(itertools.combinations(range(len(rows)), 2))
    right = [(told[i] < told[j]) == (measured[i] < measured[j]) for i, j in pairs]
    several = len(rows) > 2
    return {
        "runs": len(rows),
        "mape": statistics.mean(abs(row["error"]) for row in rows) if rows else None,
        "rank_correlation": statistics.correlation(places(told), places(measured)) if several else None,
        "pairs_right": statistics.mean(right) if right else None,
    }


def places(values: list[float]) -> list[float]:
    """The place of each value when they are put in order."""
    ordered = sorted(values)
    return [float(ordered.index(value)) for value in values]


def sums(rows: list[dict[str, Any]], cores: int) -> dict[str, dict[str, float | int | None]]:
    """Of all runs but the calibration's, by whether each rank had a core; and the order of layouts by shape."""
    tested = [row for row in rows if not row["calibration"]]
    found = {
        "a core for each rank": summary([row for row in tested if row["ranks"] <= cores]),
        "more ranks than cores": summary([row for row in tested if row["ranks"] > cores]),
        "all": summary(tested),
    }
    for shape in SHAPES:
        found[f"all, {shape}"] = summary([row for row in tested if row["shape"] == shape])
    return found


def main() -> None:
    """Measure, tell, run, compare; write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=23, help="of a run; the first 3 do not count")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--no-evidence", action="store_true")
    options = parser.parse_args()
    head, load, cores = evidence_file.head("plan_runs"), os.getloadavg()[0], os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="lmworks-plan-") as name:
        folder = Path(name)
        run(["probe", "--local", "2", "--ranks-per-machine", "1", "--megabytes", "4", "--out", str(folder / "links")])
        cluster = machine(folder / "links")
        asked = [(shape, each) for shape in options.shapes for each in options.layouts]
        first = CALIBRATION if CALIBRATION in asked else asked[0]
        runs = {first: trained(folder, *first, options.steps)}
        factor = score.score(runs[first], cluster).factor
        if factor is None:
            raise SystemExit("no factor explains the run that calibrates")
        runs |= {each: trained(folder, *each, options.steps) for each in asked if each != first}
        rows = [
            {"shape": each[0], "layout": each[1], "calibration": each == first}
            | compared(place, cluster, factor, cores)
            for each, place in runs.items()
        ]
    print(f"{'shape':<8}{'layout':<24}{'told s':>9}{'measured s':>12}{'error':>9}")
    for row in rows:
        error = "fitted" if row["calibration"] else f"{100 * row['error']:+.1f} %"
        print(f"{row['shape']:<8}{row['layout']:<24}{row['told']:>9.4f}{row['measured']:>12.4f}{error:>9}")
    found = sums(rows, cores)
    for which, each in found.items():
        print(f"{which}: {each}")
    if options.no_evidence:
        return
    figures = {
        "flops_per_second": cluster.fp32.value,
        "memory_bytes_per_second": cluster.memory_bytes_per_second.value,
        "bytes_per_second": cluster.links[0].bytes_per_second.value,
        "latency_seconds": cluster.links[0].latency_seconds.value,
    }
    record = head | {"kind": "measured", "loaded": load > 0.5, "load": load, "figures": figures, "factor": factor}
    print(evidence_file.write(record | {"summary": found, "results": rows}, evidence_file.FOLDER))


if __name__ == "__main__":
    main()
