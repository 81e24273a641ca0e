"""Step times of two ranks on this machine against what Pipette's model says of them: a pipeline, and data parallelism.

    python benchmarks/pipette_steps.py

One rank alone is timed at micro-batches of 1, 2 and 4 rows and two batch sizes: m t(b) + u gives t(b), seconds of a
micro-batch forward and backward, and u, what a step takes besides. `lmworks probe` measures what gloo carries between
two ranks. From these, and nothing else, the step of p = 1, d = 2 and of p = 2, d = 1 is told for each b, and then run.
One thread a rank. The quickest step of a run is one that nothing else on the machine disturbed. Takes about five
minutes on two quiet cores; on a loaded machine the figures are worth nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import evidence_file

from lmworks.core import recipe as recipes
from lmworks.methods.pipette.plans import terms
from lmworks.parallel.layout import Layout
from lmworks.parallel.links import Profile, read
from lmworks.parallel.schedule import order
from lmworks.parallel.timeline import Link, simulate
from lmworks.plan.latency import Pipeline, pipette_seconds, ring_seconds

ROWS, BATCH = (1, 2, 4), 16
FIRST = 3
"""Steps that do not count: files are read, memory is first touched."""
LAYOUTS = {1: Layout(dp_replicate=2, dp_shard=1), 2: Layout(pp=2, dp_replicate=1, dp_shard=1)}
"""By p."""


def table(batch: int, micro: int, steps: int, layout: Layout | None) -> dict[str, Any]:
    """A recipe."""
    found: dict[str, Any] = {
        "do": "train",
        "steps": steps,
        "batch_size": batch,
        "micro_batch_size": micro,
        "precision": "fp32",
        "threads": 1,
        "sinks": [],
        "model": {
            "use": "decoder",
            "n_layers": 8,
            "hidden_size": 256,
            "n_heads": 4,
            "ffn_size": 768,
            "tied": False,
            "max_position": 128,
        },
        "data": {"readers": [{"use": "python-stdlib"}], "tokenizer": "bytes", "sequence_length": 128},
        "optimizer": {"use": "adamw", "lr": 1e-3},
    }
    return found if layout is None else found | {"layout": recipes.table_of(layout)}


def run(words: list[str]) -> None:
    """lmworks with some words, one thread a rank."""
    done = subprocess.run(
        [sys.executable, "-m", "lmworks", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)


def step_seconds(folder: Path, batch: int, micro: int, steps: int, layout: Layout | None = None) -> float:
    """The quickest step of a run."""
    name = f"b{micro}-B{batch}-{'one' if layout is None else f'p{layout.pp}'}"
    recipe = folder / f"{name}.toml"
    recipe.write_text(recipes.dump(recipes.decode(table(batch, micro, steps, layout))), encoding="utf-8")
    words = ["train", str(recipe)] if layout is None else ["launch", str(recipe), "--local", "2", "--threads", "1"]
    run([*words, "--run", str(folder / name)])
    lines = (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row["seconds"] for row in map(json.loads, lines) if "loss" in row]
    return float(min(rows[FIRST:]))


def alone(folder: Path, micro: int, steps: int) -> tuple[float, float]:
    """t(b) and u of one rank."""
    small, large = (step_seconds(folder, batch, micro, steps) for batch in (BATCH // 2, BATCH))
    if large <= small:
        raise SystemExit("a step of twice the rows took no longer: others are at work here. Take a quiet machine")
    each = (large - small) / (BATCH // 2 // micro)
    return each, max(0.0, small - each * (BATCH // 2 // micro))


def told(micro: int, p: int, each: float, rest: float, links: Profile) -> dict[str, float]:
    """Seconds of a step: by the clock, and by Pipette's closed form."""
    layout, rate = LAYOUTS[p], links.bytes_per_second[0][1]
    late = links.latency_seconds[0][1]
    assert rate is not None
    assert late is not None
    recipe = recipes.decode(table(BATCH, micro, 1, layout))
    made = terms(recipe, layout, links, 1e9)
    both = [f + w for f, w in zip(made.forward, made.backward, strict=True)]
    forward = [each * f / sum(both) for f in made.forward]
    backward = [each * w / sum(both) for w in made.backward]
    besides = rest / p + (ring_seconds(made.gradient_bytes, 2, rate) if p == 1 else 0.0)
    found = simulate(
        order("1f1b", ranks=p, micro_batches=made.micro_batches),
        forward_seconds=forward,
        backward_seconds=backward,
        link=Link(bytes_per_second=rate, latency_seconds=late),
        boundary_bytes=made.boundary_bytes,
    )
    pipeline = Pipeline(
        ranks=p,
        micro_batches=made.micro_batches,
        forward=max(forward),
        backward=max(backward),
        crossing=2 * (p - 1) * (made.boundary_bytes / rate + late),
    )
    return {"clock": found.makespan + besides, "closed": pipette_seconds(pipeline) + besides}


def summary(rows: list[dict[str, Any]], name: str) -> dict[str, float]:
    """MAPE, and the share of pairs of runs whose order is told rightly."""
    pairs = list(itertools.combinations(rows, 2))
    right = sum((a[name] < b[name]) == (a["measured"] < b["measured"]) for a, b in pairs)
    return {
        "mape": statistics.mean(abs(row[name] / row["measured"] - 1) for row in rows),
        "pairs_right": right / len(pairs),
    }


def main() -> None:
    """Measure, tell, run, compare; write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="of a run")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="of a micro-batch")
    parser.add_argument("--no-evidence", action="store_true")
    options = parser.parse_args()
    head, load = evidence_file.head("pipette_steps"), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="lmworks-steps-") as name:
        folder = Path(name)
        run(["probe", "--local", "2", "--ranks-per-machine", "1", "--megabytes", "4", "--out", str(folder / "links")])
        links = read(folder / "links")
        fitted = {micro: alone(folder, micro, options.steps) for micro in options.rows}
        rows = [
            {"p": p, "b": micro}
            | told(micro, p, *fitted[micro], links)
            | {"measured": step_seconds(folder, BATCH, micro, options.steps, LAYOUTS[p])}
            for p in LAYOUTS
            for micro in options.rows
        ]
    print(f"{'p':>3}{'b':>3}{'measured s':>12}{'clock s':>10}{'closed s':>10}")
    for row in rows:
        print(f"{row['p']:>3}{row['b']:>3}{row['measured']:>12.4f}{row['clock']:>10.4f}{row['closed']:>10.4f}")
    found = {name: summary(rows, name) for name in ("clock", "closed")}
    for name, each in found.items():
        print(f"{name}: mean error {100 * each['mape']:.1f} %, {100 * each['pairs_right']:.0f} % of pairs in order")
    if options.no_evidence:
        return
    record = head | {
        "kind": "measured",
        "loaded": load > 0.5,
        "load": load,
        "fitted": {str(micro): {"t": each, "u": rest} for micro, (each, rest) in fitted.items()},
        "bytes_per_second": links.bytes_per_second[0][1],
        "latency_seconds": links.latency_seconds[0][1],
        "summary": found,
        "results": rows,
    }
    print(evidence_file.write(record, evidence_file.FOLDER))


if __name__ == "__main__":
    main()
