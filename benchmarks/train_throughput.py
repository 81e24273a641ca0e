"""Tokens/s and peak memory of `lmworks train` against transformers' Trainer, LitGPT and a plain PyTorch loop.

Every arm trains the same shape on the same token rows with the same batch, precision, threads, AdamW and clipping, in a
process of its own. Arms take turns (A B C A B C), so that a slow minute of the machine falls on all of them; ratios are
taken within a round, and the median over rounds is what counts. See benchmarks/README.md.

Example: python benchmarks/train_throughput.py --shapes 10m --precision fp32 --rounds 3 --steps 4
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import evidence_file
from cases import ARMS, CASES
from rounds import Plan, interpreters, run_all
from verdicts import (
    Run,
    Verdict,
    by_round,
    cpu_savings,
    is_loaded,
    overhead,
    product_shares,
    speedups,
    spread,
    step_seconds,
    verdicts,
)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    arms = "\n".join(f"  {name:<18} {arm.line}" for name, arm in ARMS.items())
    shapes = "\n".join(f"  {name:<18} {case.line}" for name, case in CASES.items())
    default_arms = [name for name, arm in ARMS.items() if arm.by_default]
    parser = argparse.ArgumentParser(
        prog="train_throughput.py",
        description=__doc__,
        epilog=f"arms:\n{arms}\n\nshapes:\n{shapes}\n\nexit: 0 all bars met, 1 an arm failed, 2 usage, 4 a bar missed",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--shapes", nargs="+", choices=CASES, default=["10m", "135m"])
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=default_arms, help="default: " + " ".join(default_arms)
    )
    parser.add_argument("--rounds", type=positive, default=5, help="default: %(default)s")
    parser.add_argument("--steps", type=positive, default=5, help="timed steps of a run; default: %(default)s")
    parser.add_argument("--warmup", type=positive, default=2, help="dropped steps of a run; default: %(default)s")
    parser.add_argument("--threads", type=positive, default=2, help="default: %(default)s")
    parser.add_argument(
        "--litgpt-python",
        type=Path,
        default=Path(os.environ.get("LITGPT_PYTHON", evidence_file.ROOT / ".venv-litgpt/bin/python")),
        help="interpreter of the environment of benchmarks/litgpt.txt; default: $LITGPT_PYTHON, or %(default)s",
    )
    parser.add_argument(
        "--allow-load",
        action="store_true",
        help="run although others use the machine: the record is marked, all arms get OMP_WAIT_POLICY=passive",
    )
    parser.add_argument("--json", action="store_true", help="the record on standard output instead of the table")
    parser.add_argument(
        "--evidence", type=Path, default=evidence_file.FOLDER, help="folder of the record; default: %(default)s"
    )
    parser.add_argument("--no-evidence", action="store_true", help="write no record")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    """A whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def plan_of(options: argparse.Namespace) -> tuple[Plan, list[str]]:
    """The plan, and the arms that are left out because their environment is missing."""
    pythons = interpreters(options.litgpt_python)
    missing = [name for name in options.arms if ARMS[name].python not in pythons]
    environment = {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if options.allow_load:
        environment["OMP_WAIT_POLICY"] = "passive"
    plan = Plan(
        cases=options.shapes,
        precisions=options.precision,
        arms=[name for name in options.arms if name not in missing],
        rounds=options.rounds,
        warmup=options.warmup,
        steps=options.steps,
        threads=options.threads,
        allow_load=options.allow_load,
        pythons=pythons,
        environment=environment,
    )
    return plan, missing


def cell_record(case: str, precision: str, runs: Sequence[Run]) -> tuple[dict[str, Any], list[Verdict]]:
    """What one shape and precision says: a row per arm, the bars, and all runs."""
    good = [run for run in runs if "failed" not in run]
    tokens = CASES[case].batch * CASES[case].sequence
    faster, cheaper = speedups(good), cpu_savings(good)
    flops = next((run["train_flops_per_token"] for run in good if "train_flops_per_token" in run), None)
    rows = []
    for name in dict.fromkeys(run["arm"] for run in good if run["arm"] != "product"):
        seconds = spread(list(by_round(good, name).values()))
        share = product_shares(good, name, tokens, flops) if flops else None
        outside = overhead(good, name)
        rows.append(
            {
                "arm": name,
                "is_peer": ARMS[name].is_peer,
                "step_seconds": vars(seconds),
                "tokens_per_second": tokens / seconds.median,
                "cpu_seconds_per_step": median(run["cpu_seconds_per_step"] for run in good if run["arm"] == name),
                "peak_memory_bytes": max(run["peak_memory_bytes"] for run in good if run["arm"] == name),
                "parameters": next(run.get("parameters") for run in good if run["arm"] == name),
                "share_of_product_rate": vars(share) if share else None,
                "lmworks_is_faster_by": vars(faster[name]) if name in faster else None,
                "cpu_time_over_lmworks": vars(cheaper[name]) if name in cheaper else None,
                "outside_the_step": vars(outside) if outside else None,
            }
        )
    products = [run["flops"] / step_seconds(run) for run in good if run["arm"] == "product"]
    found = verdicts(good, case=case, precision=precision, tokens=tokens)
    record = {
        "shape": case,
        "what": CASES[case].line,
        "precision": precision,
        "tokens_per_step": tokens,
        "train_flops_per_token": flops,
        "product_flops_per_second": vars(spread(products)) if products else None,
        "arms": rows,
        "bars": [verdict.table() for verdict in found],
        "runs": list(runs),
    }
    return record, found


def table(record: dict[str, Any]) -> str:
    """One shape and precision for people."""
    lines = [f"{record['shape']}, {record['precision']}: {record['what']}"]
    if record["product_flops_per_second"]:
        rate = record["product_flops_per_second"]
        lines.append(
            "product 2048^3: {median:.0f} GFLOP/s ({least:.0f} to {most:.0f})".format(
                **{key: rate[key] / 1e9 for key in ("median", "least", "most")}
            )
        )
    header = [
        "arm",
        "ms/step",
        "least",
        "most",
        "tok/s",
        "CPU ms",
        "peak GiB",
        "of product",
        "lmworks is faster by",
        "CPU time",
    ]
    cells = [header]
    for row in record["arms"]:
        seconds, share, faster = row["step_seconds"], row["share_of_product_rate"], row["lmworks_is_faster_by"]
        cells.append(
            [
                row["arm"],
                *(f"{seconds[key] * 1e3:.1f}" for key in ("median", "least", "most")),
                f"{row['tokens_per_second']:.0f}",
                f"{row['cpu_seconds_per_step'] * 1e3:.0f}",
                f"{row['peak_memory_bytes'] / 2**30:.2f}",
                f"{share['median']:.0%}" if share else "",
                f"{faster['median']:.2f}x ({faster['least']:.2f} to {faster['most']:.2f})" if faster else "",
                f"{row['cpu_time_over_lmworks']['median']:.2f}x" if faster else "",
            ]
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    lines += [
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    return "\n".join(lines)


def bar_line(verdict: Verdict) -> str:
    """One bar for people."""
    sign, digits = (">=", 2) if verdict.at_least else ("<=", 4)
    best = f", best peer: {verdict.against}" if verdict.against else ""
    return f"{verdict.what}: {verdict.value.text(digits)}, bar {sign} {verdict.bar}{best}: {verdict.word()}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the plan, print the table, write the record. Returns the exit code."""
    options = arguments(argv)
    plan, missing = plan_of(options)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    for name in missing:
        say(f"{name} is left out: no interpreter at {options.litgpt_python}; benchmarks/litgpt.txt says how to make it")
    record = evidence_file.head("train_throughput")
    record |= {
        "settings": {k: getattr(plan, k) for k in ("rounds", "warmup", "steps", "threads", "allow_load", "environment")}
    }
    found = run_all(plan, say)
    cells = [cell_record(case, precision, runs) for (case, precision), runs in found.items()]
    every = [run for runs in found.values() for run in runs]
    failed = [run for run in every if "failed" in run]
    record |= {"loaded": is_loaded([run for run in every if "failed" not in run]), "left_out": missing}
    record |= {"cells": [cell for cell, _ in cells]}
    bars = [verdict for _, each in cells for verdict in each]
    if options.json:
        print(json.dumps(record, indent=1))
    else:
        print("\n\n".join(table(cell) for cell, _ in cells) + "\n")
        print("\n".join(bar_line(verdict) for verdict in bars))
    if not options.no_evidence:
        say(f"record: {evidence_file.write(record, options.evidence)}")
    if failed:
        return 1
    return 0 if all(verdict.is_met for verdict in bars) else 4


if __name__ == "__main__":
    sys.exit(main())
