"""What tracing costs, and whether the heat map names a slow rank: 1 and 4 gloo ranks of this machine.

Cost: steps that do nothing but record 50 spans, traced and not, in turns; every fiftieth writes its spans one by one.
The difference a step is held against a training step of the quickstart's size. Slow rank: in each run one of four ranks
takes 1.5 times as long for its passes (it sleeps), another one each time; 30 steps; every fifth run has none.

Example: python benchmarks/trace_cost.py --runs 10
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import evidence_file
import torch
from torch import Tensor

from lmworks.audit import trace
from lmworks.core.events import Events
from lmworks.core.run import RunFolder
from lmworks.data.load import Batch
from lmworks.model.backbone import Backbone
from lmworks.model.decoder import DecoderConfig
from lmworks.parallel import gang
from lmworks.parallel.layout import Layout
from lmworks.parallel.wire import Wire, alone
from lmworks.train.objective import CrossEntropy
from lmworks.train.optim import AdamW
from lmworks.train.rehearse import Scene, placed, stepping
from lmworks.train.slots import Component, Objective
from lmworks.train.tracing import Tracer, Tracing

SPANS, BAR, RANKS, STEPS, FACTOR = 50, 0.01, 4, 30, 1.5
QUICKSTART = DecoderConfig(vocab_size=4096, n_layers=4, hidden_size=192, n_heads=6, n_kv_heads=2, ffn_size=512)
SMALL = DecoderConfig(vocab_size=512, n_layers=2, hidden_size=96, n_heads=4, n_kv_heads=4, ffn_size=256)


class Late(Objective):
    """Cross-entropy of a rank that sleeps so long in the forward pass that both passes take FACTOR times as long."""

    def __init__(self, late: bool) -> None:
        self._plain, self._late = CrossEntropy(), late

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """As cross-entropy."""
        return self._plain.count(batch)

    def loss(self, model: Backbone, batch: Batch, hidden_BTD: Tensor | None = None) -> Mapping[str, Component]:  # type: ignore[override]
        """As cross-entropy, later; a backward pass takes twice a forward pass."""
        begun = time.perf_counter()
        found = self._plain.loss(model, batch, hidden_BTD)
        if self._late:
            time.sleep(3 * (FACTOR - 1) * (time.perf_counter() - begun))
        return found


def tracer_of(wire: Wire, folder: RunFolder, *, on: bool) -> tuple[Tracer, Events]:
    """As a run has it."""
    mine = folder if wire.rank == 0 else folder.of_rank(wire.rank)
    axes = {"dp_replicate": wire.rank} if wire.layout.ranks > 1 else {}
    events = Events(mine.events, run="bench", rank=wire.rank, axes=axes, clock=wire.spans.clock.now)
    settings, device = Tracing(on=on), torch.device("cpu")
    return Tracer(settings, wire, events, folder, device=device, told=lambda text: None), events


def cost(rounds: int, steps: int) -> dict[str, Any]:
    """Seconds that a step's SPANS spans add, by round, and seconds of a training step."""
    found: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as path:
        for number in range(rounds):
            for on in (True, False) if number % 2 else (False, True):
                wire = alone()
                folder = RunFolder(Path(path) / f"{number}-{on}")
                folder.path.mkdir()
                tracer, events = tracer_of(wire, folder, on=on)
                tracer.begin(0)
                begun = time.perf_counter()
                for step in range(1, steps + 1):
                    events.step = step
                    with tracer.step(step), wire.spans.span("forward"):
                        for i in range(SPANS - 1):
                            with wire.spans.span("fsdp all-gather", bytes=4096, exchange=True, number=i):
                                pass
                events.flush()
                found[on].append((time.perf_counter() - begun) / steps)
                tracer.close(together=True)
    scene = Scene(
        model=QUICKSTART, layout=Layout(dp_shard=1), rows=8, micro_rows=8, length=256, optimizer=AdamW(lr=1e-3)
    )
    step = stepping(placed(0, scene, torch.float32), scene)
    step(), step()
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begun)
    added = [on - off for on, off in zip(found[True], found[False], strict=True)]
    share = median(added) / median(seconds)
    return {
        "spans": SPANS,
        "added_seconds": added,
        "training_step_seconds": seconds,
        "share": share,
        "bar": BAR,
        "least_step_seconds_at_the_bar": median(added) / BAR,
        "verdict": "met" if share <= BAR else "missed",
    }


def slow_run(rank: int, path: str, who: int | None) -> None:
    """STEPS steps of four replicas, one of them late."""
    scene = Scene(
        model=SMALL,
        layout=Layout(dp_replicate=RANKS, dp_shard=1),
        rows=4 * RANKS,
        micro_rows=4,
        length=128,
        optimizer=AdamW(lr=1e-3),
        objective=Late(rank == who),
    )
    made = placed(rank, scene, torch.float32)
    step = stepping(made, scene)
    step(), step()
    tracer, events = tracer_of(made.wire, RunFolder(Path(path)), on=True)
    tracer.begin(0)
    for number in range(1, STEPS + 1):
        events.step = number
        with tracer.step(number):
            step()
    tracer.close(together=True)
    events.flush()


def slow_ranks(runs: int) -> list[dict[str, Any]]:
    """Who was late in each run, and whom the heat map names."""
    results = []
    for number in range(runs):
        who = None if number % 5 == 4 else number % RANKS  # every fifth run has nobody
        with tempfile.TemporaryDirectory() as path:
            load = os.getloadavg()[0]
            gang.run(slow_run, RANKS, path, who)
            found = trace.slow_ranks(trace.read(Path(path)))
        told = [{"rank": slow.rank, "ratio": slow.ratio, "z": slow.z, "last": slow.last} for slow in found]
        results.append({"late": who, "named": told, "load_average_before": load})
        print(f"run {number}: late {who}, named {told}", flush=True)
    return results


def main() -> None:
    """Measure both, print, write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=400, help="of a round of the cost")
    parser.add_argument("--runs", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    spent = cost(options.rounds, options.steps)
    micro = 1e6 * median(spent["added_seconds"])
    print(f"{SPANS} spans add {micro:.0f} us a step, {spent['share']:.2%} of a training step: {spent['verdict']}")
    runs = slow_ranks(options.runs)
    right = sum([told["rank"] for told in run["named"]] == [run["late"]][: run["late"] is not None] for run in runs)
    print(f"{right} of {len(runs)} runs named rightly")
    record = evidence_file.head("trace_cost") | {"cost": spent, "slow_rank": {"runs": runs, "right": right}}
    print(evidence_file.write(record, evidence_file.FOLDER))


if __name__ == "__main__":
    main()
