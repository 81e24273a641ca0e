"""What a training step on one GPU needs, by class, as micro-batches grow; and bf16's loss beside COAT's.

Every arm is a recipe that goes the way of `lmworks train` (gpu_arms.py), in a process of its own. Micro-batches grow
until memory ends. Reported for each: seconds of a step, tokens/s, the allocator's peak by class (weights, optimizer
state, gradients, saved tensors, the rest), and `activations`: the peak without what stays between steps and without
gradients. Then `eager` and the COAT arms train on text of this machine, as bytes, from the same weights and rows. A
record and a picture are written.

Examples: python benchmarks/gpu_memory.py
          python benchmarks/gpu_memory.py --size h8192-l3 --sequence 1024 --arms eager recompute ssdtrain-host
Without a GPU, to try the program itself: python benchmarks/gpu_memory.py --device cpu --size toy --micro 1 2
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import evidence_file
import gpu_picture
import torch
from gpu_arms import ARMS, SHAPES, Budget, held, opened, those_that_run, wait_for, write_rows
from verdicts import Verdict, spread

from lmworks.train.build import Built

ACTIVATIONS_BAR, TIME_BAR, STATE_BAR = 0.53, 1.05, 0.30
"""SSDTrain: 47 % fewer bytes of activations, at no more than 5 % more time. COAT: optimizer state of at most 0.30."""
WITH_LOSS = ("eager", "coat-optimizer", "coat-both")
"""Arms whose losses are set side by side."""
TURNS = ("size", "device", "sequence", "steps", "loss_steps", "loss_rows")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        prog="gpu_memory.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", "--shape", choices=SHAPES, default="1b")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[arm for arm in ARMS if arm != "float8-rowwise"])
    parser.add_argument("--micro", nargs="+", type=int, default=[4, 8, 12, 16, 24, 32], help="rows of a micro-batch")
    parser.add_argument("--sequence", type=int, default=2048, help="tokens of a row; default: %(default)s")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a micro-batch; default: %(default)s")
    parser.add_argument("--loss-steps", type=int, default=300, help="0: no losses; default: %(default)s")
    parser.add_argument("--loss-rows", type=int, default=4, help="rows of those steps; default: %(default)s")
    parser.add_argument("--minutes", type=float, default=9.0, help="nothing begins that would not end; default: 9")
    parser.add_argument("--json", action="store_true", help="the record on standard output instead of the table")
    parser.add_argument("--no-evidence", action="store_true", help="write no record and no picture")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--losses", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# --- one arm, in its process ----------------------------------------------------------------------------------------


def sweep(arm: str, options: argparse.Namespace) -> dict[str, Any]:
    """Each micro-batch in turn, from the smallest, until memory ends.

    Where saved tensors go out, what goes out may have been planned from the first steps: then each begins anew.
    """
    points: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    too_many = None
    built: Built | None = None
    for rows in sorted(options.micro):
        try:
            if built is not None and built.step.caches:
                built.step.close()
                built = None
            if built is None:
                built = ready(arm, options, rows)
                facts = {"stays": held(built), "notes": list(built.notes)}
            points.append(point(built, rows, options.steps, facts["stays"]))
        except torch.OutOfMemoryError:
            too_many = rows
            break
    if built is not None:
        built.step.close()
    return {"points": points, "too_many": too_many, **facts}


def ready(arm: str, options: argparse.Namespace, rows: int) -> Built:
    """A run after its first step, in which the optimizer makes its state."""
    gc.collect()
    built = opened(arm, options, options.folder, rows=rows)
    built.step()
    return built


def point(built: Built, rows: int, steps: int, stays: dict[str, int]) -> dict[str, Any]:
    """Time and memory of steps over one micro-batch of so many rows."""
    step = replace(built.step, rows=rows, micro_rows=rows)
    for counted_now in (False, True):  # the allocator takes what it needs, plans are made; never timed
        step.books.on = counted_now
        step()
    waiting, step.books.on = step.books.peak, False
    if built.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(built.device)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        wait_for(built.device)
        seconds.append(time.perf_counter() - start)
    took = median(seconds)
    rate = rows * built.recipe.data.sequence_length / took
    counted = None if built.recipe.compile else waiting  # compiled blocks save what the ledger cannot see
    found = {"micro": rows, "seconds": took, "tokens_per_second": rate, "ledger_peak_bytes": counted}
    if built.device.type != "cuda":
        return {**found, "peak_bytes": None, "activations": counted, "by_class": {**stays, "saved": counted}}
    peak = torch.cuda.max_memory_allocated(built.device)
    activations = peak - sum(stays.values())
    saved = {} if counted is None else {"saved": counted, "rest": activations - counted}
    return {**found, "peak_bytes": peak, "activations": activations, "by_class": {**stays, **saved}}


def losses(arm: str, options: argparse.Namespace) -> dict[str, Any]:
    """The loss of each step on text; the rate is warmed up over a tenth of them."""
    built = opened(arm, options, options.folder, rows=options.loss_rows, text=True)
    built.step.books.on = False
    found = []
    for index in range(options.loss_steps):
        built.step.update.set_lr(min(1.0, (index + 1) / max(1, options.loss_steps // 10)))
        found.append(built.step().loss)
    built.step.close()
    return {"losses": found}


# --- all of them ----------------------------------------------------------------------------------------------------


def run_all(options: argparse.Namespace, budget: Budget) -> dict[str, dict[str, Any]]:
    """What each arm found: its sweep, then the losses, while there is time."""
    given = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in TURNS]
    base = [sys.executable, __file__, f"--folder={options.folder}", *given, "--micro", *map(str, options.micro)]
    with_loss = [arm for arm in options.arms if arm in WITH_LOSS] if options.loss_steps else []
    turns = [(arm, "sweep", []) for arm in options.arms] + [(arm, "losses", ["--losses"]) for arm in with_loss]
    found: dict[str, dict[str, Any]] = {arm: {} for arm in options.arms}
    for arm, what, extra in turns:
        if not budget.has_room():
            print(f"no time is left for {arm} ({what}): --minutes {options.minutes}", file=sys.stderr)
            continue
        run = budget.run([*base, f"--one={arm}", *extra])
        if "failed" in run:
            found[arm].setdefault("failed", f"{what}: {run['failed']}")
            print(f"{arm:<20} {what}: {run['failed'].splitlines()[-1]}", file=sys.stderr, flush=True)
        else:
            found[arm] |= run
            print(f"{arm:<20} {what}: done", file=sys.stderr, flush=True)
    return found


def bars_of(found: dict[str, dict[str, Any]]) -> list[Verdict]:
    """Bars at each micro-batch that both arms have."""
    bars = []
    plain = {p["micro"]: p for p in found.get("eager", {}).get("points", [])}
    for arm in ("ssdtrain-host", "ssdtrain-disk"):
        both = [(plain[p["micro"]], p) for p in found.get(arm, {}).get("points", []) if p["micro"] in plain]
        if both:
            least = spread([ours["activations"] / max(1, theirs["activations"]) for theirs, ours in both])
            slower = spread([ours["seconds"] / theirs["seconds"] for theirs, ours in both])
            bars.append(
                Verdict(what=f"activations of {arm} against eager", bar=ACTIVATIONS_BAR, at_least=False, value=least)
            )
            bars.append(Verdict(what=f"time of {arm} against eager", bar=TIME_BAR, at_least=False, value=slower))
    stays = {arm: run["stays"]["optimizer"] for arm, run in found.items() if "stays" in run}
    if "eager" in stays and "coat-optimizer" in stays:
        share = spread([stays["coat-optimizer"] / stays["eager"]])
        bars.append(Verdict(what="optimizer state of COAT against AdamW", bar=STATE_BAR, at_least=False, value=share))
    return bars


def ratios(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Each arm against `eager` at equal micro-batches: how many times its memory eager takes, and its speed.

    No bar hangs on them: COAT's 1.54 times the memory and 1.43 times the speed are of several GPUs.
    """
    plain = {p["micro"]: p for p in found.get("eager", {}).get("points", [])}
    rows = []
    for arm, run in found.items():
        for p in run.get("points", []) if arm != "eager" else []:
            if (base := plain.get(p["micro"])) is not None:
                row = {"arm": arm, "micro": p["micro"], "speed": base["seconds"] / p["seconds"]}
                if p["peak_bytes"] is not None:
                    row["peak"] = base["peak_bytes"] / p["peak_bytes"]
                if p["activations"] and base["activations"]:
                    row["activations"] = p["activations"] / base["activations"]
                rows.append(row)
    return rows


def report(found: dict[str, dict[str, Any]]) -> list[str]:
    """Lines for people: a row for each micro-batch, the largest that fitted, the last losses."""
    lines = []
    for arm, run in found.items():
        for p in run.get("points", []):
            classes = "  ".join(f"{k} {v / 2**30:.2f}" for k, v in p["by_class"].items() if v is not None)
            peak = f"peak {p['peak_bytes'] / 2**30:.2f} GiB" if p["peak_bytes"] is not None else "peak not counted"
            lines.append(f"{arm:<20} {p['micro']:3} rows {p['tokens_per_second']:9.0f} tok/s  {peak}  ({classes})")
        if run.get("points"):
            at_end = f"{run['too_many']} do not" if run["too_many"] else "the largest that was tried"
            lines.append(f"{arm:<20} {run['points'][-1]['micro']} rows fit, {at_end}")
    for row in ratios(found):
        facts = {"speed": "x eager's speed", "peak": "x less memory", "activations": "of its activations"}
        told = "  ".join(f"{row[name]:.2f} {words}" for name, words in facts.items() if name in row)
        lines.append(f"{row['arm']:<20} {row['micro']:3} rows: {told}")
    for arm, run in found.items():
        if run.get("losses"):
            last = run["losses"][-20:]
            lines.append(f"{arm:<20} loss {sum(last) / len(last):.4f}, mean of the last {len(last)} steps")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the arms, print the table, write record and picture. Exit: 0 bars met, 1 an arm failed, 2 usage, 4 missed."""
    options = arguments(argv)
    options.batch = min(options.micro)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU here; --device cpu --size toy tries the program without one", file=sys.stderr)
        return 2
    if options.one:
        print(json.dumps((losses if options.losses else sweep)(options.one, options)))
        return 0
    record = evidence_file.head("gpu_memory") | {"settings": {k: v for k, v in vars(options).items() if k != "folder"}}
    if options.device == "cuda":
        record["gpu"] = torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory() as name:
        options.folder, budget = Path(name), Budget(options.minutes)
        write_rows(options.folder, options)
        left = those_that_run(options, options.folder)
        found = run_all(options, budget)
    bars = bars_of(found)
    lines = {arm: ARMS[arm].line for arm in options.arms}
    record |= {"lines": lines, "arms": found, "ratios": ratios(found), "left_out": left}
    record["bars"] = [bar.table() for bar in bars]
    print(json.dumps(record, indent=1, default=vars) if options.json else "\n".join(report(found)))
    for bar in [] if options.json else bars:
        print(f"{bar.what}: {bar.value.text()}, bar <= {bar.bar}: {bar.word()}")
    if not options.no_evidence:
        path = evidence_file.write(json.loads(json.dumps(record, default=vars)), evidence_file.FOLDER)
        gpu_picture.draw(found, path.with_suffix(".png"))
        print(f"record: {path}", file=sys.stderr)
    if any("failed" in run for run in found.values()):
        return 1
    return 0 if all(bar.is_met for bar in bars) else 4


if __name__ == "__main__":
    sys.exit(main())
