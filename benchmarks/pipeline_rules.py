"""Megatron's formulas against the runs of its proof: the order of waiting shares, and the choice of the micro-batch.

Reads the run folders that `lmworks prove megatron` left. Two questions of the paper that no single test of two arms can
answer: do waiting shares stand in the order of (p - 1) / (v m) over all schedules and numbers of micro-batches, and is
the micro-batch that rule 3 picks from measured times the one that is quickest.

Example: python benchmarks/pipeline_rules.py runs/prove-megatron
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from statistics import median
from typing import Any

import evidence_file
import numpy as np

from lmworks.core.journal import rows
from lmworks.methods.megatron import best_micro_batch, bubble

RANKS, ROWS, WARMUP = 2, 16, 4
STAGES = {"gpipe": 1, "1f1b": 1, "interleaved": 2}


def runs(folder: Path) -> list[dict[str, Any]]:
    """Schedule, micro-batches, seed, and the medians and least values of every run."""
    found = []
    for path in sorted((folder / "runs").glob("run-*/metrics.jsonl")):
        name = re.match(r"run-(?P<schedule>\w+)-m(?P<m>\d+)-(?P<seed>\d+)-", path.parent.name)
        assert name is not None, path
        steps = [row for row in rows(path) if "pipeline/idle_share" in row][WARMUP:]
        micro_batches = int(name["m"])
        seconds, idle = (median(row[column] for row in steps) for column in ("seconds", "pipeline/idle_share"))
        found.append(
            {
                "schedule": name["schedule"],
                "micro_batches": micro_batches,
                "seed": int(name["seed"]),
                "formula": bubble(pipeline=RANKS, micro_batches=micro_batches, chunks=STAGES[name["schedule"]]),
                "least_idle_share": min(row["pipeline/idle_share"] for row in steps),
                "seconds": seconds,
                "seconds_of_a_micro_batch": seconds / (1 + idle) / micro_batches,
            }
        )
    return found


def ranked(values: np.ndarray) -> np.ndarray:
    """Ranks of values, equal ones with their mean rank."""
    return np.array([((values < x).sum() + (values <= x).sum() + 1) / 2 for x in values])


def order_of_waiting(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Spearman's correlation of the formula with what was seen, over the means of the seeds."""
    arms: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for run in found:
        arms.setdefault((run["schedule"], run["micro_batches"]), []).append(run)
    formula = np.array([each[0]["formula"] for each in arms.values()])
    seen = np.array([np.mean([run["least_idle_share"] for run in each]) for each in arms.values()])
    correlation = float(np.corrcoef(ranked(formula), ranked(seen))[0, 1])
    return {"arms": len(arms), "rank_correlation": correlation, "bar": 0.9, "met": correlation >= 0.9}


def choice_of_micro_batch(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each seed of 1f1b: the b that rule 3 picks from measured times, and how far from the quickest it is."""
    answers = []
    for seed in sorted({run["seed"] for run in found}):
        own = {ROWS // r["micro_batches"]: r for r in found if r["seed"] == seed and r["schedule"] == "1f1b"}
        taken = {b: run["seconds_of_a_micro_batch"] for b, run in own.items()}
        picked = best_micro_batch(
            batch=ROWS, data=1, pipeline=RANKS, forward_seconds=taken, backward_seconds=dict.fromkeys(taken, 0.0)
        )
        slower = own[picked]["seconds"] / min(run["seconds"] for run in own.values()) - 1
        answers.append({"seed": seed, "picked": picked, "slower_than_best": slower, "bar": 0.05, "met": slower <= 0.05})
    return answers


def main() -> None:
    """Read, answer, write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what `lmworks prove megatron --out` named")
    found = runs(parser.parse_args().folder)
    waiting, choice = order_of_waiting(found), choice_of_micro_batch(found)
    print(f"waiting: rank correlation {waiting['rank_correlation']:.3f} over {waiting['arms']} arms, bar 0.9")
    for answer in choice:
        print(
            f"seed {answer['seed']}: b = {answer['picked']}, {answer['slower_than_best']:+.1%} of the quickest, bar 5 %"
        )
    record = evidence_file.head("pipeline_rules") | {"waiting": waiting, "micro_batch": choice, "runs": found}
    print(evidence_file.write(record, evidence_file.FOLDER))


if __name__ == "__main__":
    main()
