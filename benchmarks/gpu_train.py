"""lmworks' training step on one GPU: eager, compiled, in float8, and with less memory in several ways.

Trains a 1B Llama shape (Llama-3.2-1B) on random tokens. Every arm is a recipe that goes the way of `lmworks train`
(gpu_arms.py), in a process of its own; arms take turns while the minutes last. Reported: tokens/s, model FLOPs
utilisation (MFU) of the dense bf16 datasheet rate (float8's too, so that arms can be compared), peak memory, the most
bytes that waited for the backward pass, and the share of a step in which no kernel ran.

Example: python benchmarks/gpu_train.py
Without a GPU, to try the program itself: python benchmarks/gpu_train.py --device cpu --size toy --rounds 1
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import evidence_file
import torch
from gpu_arms import ARMS, IN_BF16, SHAPES, Budget, opened, those_that_run, wait_for, write_rows
from torch.profiler import ProfilerActivity, profile
from verdicts import Spread, Verdict, spread

from lmworks.train.build import Built
from lmworks.train.rate import peak_flops, peak_memory_bytes

MFU_BAR, FLOAT8_BAR = 0.55, 1.4
TURNS = ("size", "device", "batch", "sequence", "steps", "warmup")
"""Options that a run of one arm is given."""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        prog="gpu_train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=SHAPES, default="1b")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--batch", type=int, default=8, help="rows of a step; default: %(default)s")
    parser.add_argument("--sequence", type=int, default=2048, help="tokens of a row; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="at most; default: %(default)s")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a run; default: %(default)s")
    parser.add_argument("--warmup", type=int, default=5, help="dropped steps of a run; default: %(default)s")
    parser.add_argument("--minutes", type=float, default=9.0, help="no run begins that would not end; default: 9")
    parser.add_argument("--json", action="store_true", help="the record on standard output instead of the table")
    parser.add_argument("--no-evidence", action="store_true", help="write no record")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", choices=ARMS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run_one(arm: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time one arm in this process. The second step is counted by the ledger, as in a run; it is never timed."""
    built = opened(arm, options, options.folder, rows=options.batch)
    step, seconds, loss, waiting = built.step, [], 0.0, 0
    for index in range(max(options.warmup, 2) + options.steps):
        step.books.on = index == 1
        start = time.perf_counter()
        loss = step().loss
        wait_for(built.device)
        if index == 1:
            waiting = step.books.peak
        if index >= max(options.warmup, 2):
            seconds.append(time.perf_counter() - start)
    found = {"seconds": seconds, "loss": loss, "notes": list(built.notes), "idle_share": idle_share(built)}
    step.close()
    counted = None if built.recipe.compile else waiting  # compiled blocks save what the ledger cannot see
    flops = built.cost.train_flops_per_token
    return {
        **found,
        "peak_memory_bytes": peak_memory_bytes(built.device),
        "ledger_peak_bytes": counted,
        "train_flops_per_token": flops,
    }


def idle_share(built: Built) -> float | None:
    """The share of one more step in which the GPU had nothing to do; None on a CPU. What CUDA graphs could win."""
    if built.device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        start = time.perf_counter()
        built.step()
        wait_for(built.device)
        wall = time.perf_counter() - start
    busy = sum(event.self_device_time_total for event in seen.key_averages()) / 1e6
    return max(0.0, 1 - busy / wall)


def run_rounds(options: argparse.Namespace, budget: Budget) -> list[dict[str, Any]]:
    """Every arm in turn, up to `rounds` times, each in a process of its own, while there is time."""
    runs: list[dict[str, Any]] = []
    given = [f"--{name}={getattr(options, name)}" for name in TURNS]
    for turn in range(1, options.rounds + 1):
        for arm in options.arms:
            if not budget.has_room():
                print(f"no time is left for {arm} in round {turn}: --minutes {options.minutes}", file=sys.stderr)
                continue
            run = budget.run([sys.executable, __file__, f"--one={arm}", f"--folder={options.folder}", *given])
            runs.append({"arm": arm, "round": turn, **run})
            word = run["failed"].splitlines()[-1] if "failed" in run else f"{median(run['seconds']) * 1e3:.1f} ms"
            print(f"round {turn}/{options.rounds}  {arm:<20} {word}", file=sys.stderr, flush=True)
    return runs


def summary(runs: Sequence[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per arm that ran."""
    rate, source = peak_flops(torch.device(options.device), torch.bfloat16)
    tokens = options.batch * options.sequence
    rows: list[dict[str, Any]] = []
    for arm in options.arms:
        good = [run for run in runs if run["arm"] == arm and "failed" not in run]
        if good:
            seconds = spread([median(run["seconds"]) for run in good])
            row = {"arm": arm, "step_seconds": seconds, "tokens_per_second": tokens / seconds.median}
            row["mfu"] = spread([tokens * good[0]["train_flops_per_token"] / s / rate for s in seconds.each])
            row["mfu_against"] = source
            row["peak_memory_bytes"] = max(run["peak_memory_bytes"] for run in good)
            rows.append(row | {name: good[-1][name] for name in ("ledger_peak_bytes", "idle_share", "notes")})
    return rows


def bars_of(rows: Sequence[dict[str, Any]]) -> list[Verdict]:
    """The bars that the rows can be held against."""
    bars = []
    by_arm = {row["arm"]: row for row in rows}
    if bf16 := [row for row in rows if row["arm"] in IN_BF16]:
        best = max(bf16, key=lambda row: row["mfu"].median)
        bars.append(Verdict(what="MFU in bf16", bar=MFU_BAR, at_least=True, value=best["mfu"], against=best["arm"]))
        if "float8" in by_arm:
            faster = ratio(best["step_seconds"], by_arm["float8"]["step_seconds"])
            bars.append(
                Verdict(what="float8 against bf16", bar=FLOAT8_BAR, at_least=True, value=faster, against=best["arm"])
            )
    return bars


def ratio(of: Spread, to: Spread) -> Spread:
    """Round by round, as far as both have rounds."""
    return spread([a / b for a, b in zip(of.each, to.each, strict=False)])


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    speed = f"{row['step_seconds'].median * 1e3:9.1f} ms  {row['tokens_per_second']:9.0f} tok/s"
    waits = f"{row['ledger_peak_bytes'] / 2**30:6.2f} GiB saved" if row["ledger_peak_bytes"] is not None else ""
    idle = f"{100 * row['idle_share']:4.1f} % idle" if row["idle_share"] is not None else ""
    peak = f"{row['peak_memory_bytes'] / 2**30:6.2f} GiB"
    return f"{row['arm']:<20} {speed}  MFU {row['mfu'].text()}  {peak}  {waits}  {idle}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the arms, print the table, write the record. Exit: 0 bars met, 1 an arm failed, 2 usage, 4 a bar missed."""
    options = arguments(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU here; --device cpu --size toy tries the program without one", file=sys.stderr)
        return 2
    if options.one:
        print(json.dumps(run_one(options.one, options)))
        return 0
    record = evidence_file.head("gpu_train") | {"settings": {k: v for k, v in vars(options).items() if k != "folder"}}
    if options.device == "cuda":
        record["gpu"] = torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory() as name:
        options.folder, budget = Path(name), Budget(options.minutes)
        write_rows(options.folder, options)
        left = those_that_run(options, options.folder)
        runs = run_rounds(options, budget)
    rows = summary(runs, options)
    bars = bars_of(rows)
    lines = {arm: ARMS[arm].line for arm in options.arms}
    record |= {"lines": lines, "arms": rows, "left_out": left, "bars": [bar.table() for bar in bars], "runs": runs}
    text = json.dumps(record, indent=1, default=vars)
    print(text if options.json else "\n".join(line(row) for row in rows))
    for bar in [] if options.json else bars:
        print(f"{bar.what}: {bar.value.text()}, bar >= {bar.bar}: {bar.word()}")
    if not options.no_evidence:
        print(f"record: {evidence_file.write(json.loads(text), evidence_file.FOLDER)}", file=sys.stderr)
    if any("failed" in run for run in runs):
        return 1
    return 0 if all(bar.is_met for bar in bars) else 4


if __name__ == "__main__":
    sys.exit(main())
