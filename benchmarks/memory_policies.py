"""What each policy for saved tensors keeps, costs and writes, side by side on a CPU.

Every arm trains the same small Llama shape on the same rows, in a process of its own, several times in turns. `saved`
is the ledger's peak of a step, to the byte; `resident` what the process took at most over what it had before the model
was made, so the other classes are in it. On a CPU the arm `host` frees nothing: host memory is the memory of the run.

Example: python benchmarks/memory_policies.py --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import evidence_file
import torch

from lmworks.core.recipe import decode_part
from lmworks.model.backbone import Backbone
from lmworks.model.decoder import DecoderConfig
from lmworks.model.init import first_value
from lmworks.parallel.apply import place
from lmworks.parallel.layout import Layout
from lmworks.parallel.wire import alone
from lmworks.train.ledger import Ledger
from lmworks.train.memory import keep_freed_memory, return_freed_memory
from lmworks.train.objective import CrossEntropy
from lmworks.train.offload import TensorCache
from lmworks.train.optim import AdamW
from lmworks.train.probe import Probe
from lmworks.train.rate import memory_bytes, peak_memory_bytes
from lmworks.train.rehearse import SEED, MadeUp, Scene
from lmworks.train.slots import SelectAll
from lmworks.train.step import Step

SIZES: dict[str, dict[str, Any]] = {
    "small": {"n_layers": 8, "hidden_size": 256, "n_heads": 4, "ffn_size": 704, "rows": 8, "length": 256},
    "toy": {"n_layers": 3, "hidden_size": 64, "n_heads": 4, "ffn_size": 176, "rows": 2, "length": 64},
}
ARMS: dict[str, dict[str, Any]] = {
    "keep": {"use": "keep"},
    "recompute": {"use": "recompute"},
    "products": {"use": "recompute", "keep": "products"},
    "host": {"use": "offload", "to": "host"},
    "disk": {"use": "offload", "to": "disk"},
    "coat": {"use": "coat"},
    "coat-disk": {"use": "offload", "to": "disk", "around": "coat"},
}
"""The policies by the name of the arm."""


def stepping(policy: dict[str, Any], size: dict[str, Any], books: Ledger) -> Step:
    """The real step of one rank under a policy."""
    shape = {name: value for name, value in size.items() if name not in ("rows", "length")}
    config = DecoderConfig(vocab_size=4096, tied=True, **shape)
    saved = decode_part("saved", policy)
    (return_freed_memory if saved.leaves() else keep_freed_memory)()  # as a run does
    caches: list[TensorCache] = []

    def arrange(chunk: Backbone) -> None:
        caches.extend(saved.apply(chunk, books))

    cpu = torch.device("cpu")
    placement = place(config, alone(), cpu, dtype=torch.float32, sequence=size["length"], arrange=arrange)
    placement.fill(lambda name, box: first_value(name, box.whole, config.n_layers, SEED)[box.index])
    optimizer, objective = AdamW(lr=1e-3), CrossEntropy()
    scene = Scene(
        model=config,
        layout=Layout(dp_shard=1),
        rows=size["rows"],
        micro_rows=size["rows"],
        length=size["length"],
        optimizer=optimizer,
    )
    return Step(
        placement=placement,
        source=MadeUp(scene, (0, 1)),
        selector=SelectAll().start(placement.model, optimizer, {}),
        objective=objective,
        gradient=(),
        update=optimizer.build(placement.model),
        probe=Probe(placement.model, objective, seed=0),
        rows=size["rows"],
        micro_rows=size["rows"],
        books=books,
        caches=caches,
    )


def measure(arm: str, size: dict[str, Any], steps: int, folder: Path) -> dict[str, Any]:
    """One arm in this process: a step to warm up, some that are timed, one of which the bytes are counted."""

    policy = dict(ARMS[arm])
    if policy.get("to") == "disk":
        policy["folders"] = [str(folder)]
    books, before = Ledger(on=False), memory_bytes(torch.device("cpu"))
    step = stepping(policy, size, books)
    step()
    begun = time.perf_counter()
    timed = [step() for _ in range(steps)]
    seconds = (time.perf_counter() - begun) / steps
    peak = peak_memory_bytes(torch.device("cpu"))
    books.on = True
    last = step()
    step.close()
    return {
        "arm": arm,
        "saved_bytes": books.peak,
        "saved_bytes_by_block": books.at_peak,
        "resident_bytes": peak - before,
        "seconds_per_step": seconds,
        "written_bytes_per_step": sum(result.extra.get("offload/stored", 0.0) for result in timed) / steps,
        "losses": [*(result.loss for result in timed), last.loss],
    }


def in_a_process(arm: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The same in a process of its own: one arm's memory is not another's."""
    words = ["--arm", arm, "--size", options.size, "--steps", str(options.steps), "--folder", str(folder)]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arm}: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each arm, its medians beside those of keep."""
    rows = []
    names = ("saved_bytes", "resident_bytes", "seconds_per_step", "written_bytes_per_step")
    keep = {name: median(run[name] for run in runs if run["arm"] == "keep") for name in names}
    for arm in dict.fromkeys(run["arm"] for run in runs):
        mine = [run for run in runs if run["arm"] == arm]
        row: dict[str, Any] = {"arm": arm} | {name: median(run[name] for run in mine) for name in names}
        row |= {f"{name}_of_keep": row[name] / keep[name] for name in names[:3]}
        row["same_losses_as_keep"] = mine[0]["losses"] == next(r["losses"] for r in runs if r["arm"] == "keep")
        row["loss"] = mine[0]["losses"][-1]
        rows.append(row)
    return rows


def shown(rows: list[dict[str, Any]]) -> str:
    """The table for people."""
    lines = [f"{'arm':<12}{'saved':>12}{'resident':>12}{'a step':>10}{'written':>12}{'loss':>12}"]
    lines += [
        f"{row['arm']:<12}{row['saved_bytes'] / 1e6:>9.1f} MB{row['resident_bytes'] / 1e6:>9.1f} MB"
        f"{row['seconds_per_step']:>8.3f} s{row['written_bytes_per_step'] / 1e6:>9.1f} MB{row['loss']:>12.6f}"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure every arm in turns, print the table, write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="timed, of an arm in a round")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--folder", type=Path, help="where the arm 'disk' writes; left out: a temporary folder")
    parser.add_argument("--no-evidence", action="store_true")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(measure(options.arm, SIZES[options.size], options.steps, options.folder)))
        return
    chosen = list(dict.fromkeys(["keep", *options.arms]))
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as made:
        turns = [(n, arm) for n in range(options.rounds) for arm in (chosen if n % 2 == 0 else chosen[::-1])]
        runs = [in_a_process(arm, options, options.folder or Path(made)) | {"round": n + 1} for n, arm in turns]
    rows = compared(runs)
    print(shown(rows))
    if options.no_evidence:
        return
    record = evidence_file.head("memory_policies") | {
        "size": SIZES[options.size],
        "rounds": options.rounds,
        "steps": options.steps,
        "load_average_before": load,
        "loaded": load > (os.cpu_count() or 1),  # others were at work: bytes hold, seconds do not
        "results": rows,
        "runs": runs,
    }
    print(evidence_file.write(record, evidence_file.FOLDER))


if __name__ == "__main__":
    main()
