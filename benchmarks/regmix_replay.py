"""RegMix's published runs again: how well fits to small runs rank runs that they have not seen.

    LMWORKS_REGMIX_DATA=FOLDER python benchmarks/regmix_replay.py

FOLDER holds the run tables of sail-sg/regmix (MIT): `train_mixture_1m.csv` and `train_pile_loss_1m.csv`, 512 runs of 1M
parameters, are learnt from; `test_mixture_SIZE.csv` and `test_pile_loss_SIZE.csv` are judged by, for each of 1m, 60m
and 1b that is there. Surrogates are fitted to some of the 512, drawn with six seeds, and to all of them; those that
cross-validation chooses are held against every single one. Nothing of the tables is written but rank correlations.
Fits stand in a journal; one that was cut short goes on.
Exit 0: the bars are met; 4: one is not.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import evidence_file
import numpy as np

from lmworks.core.journal import Journal, rows
from lmworks.mix import tables
from lmworks.mix.apply import predict
from lmworks.mix.tables import Published

COLUMN = "the_pile_pile_cc"
SIZES = ("1m", "60m", "1b")
FEW = (32, 54, 128, 256)
SEEDS = range(6)
BARS = (
    ("lightgbm", "all", "1m", 0.985, 1.0, "the paper has 0.9854"),
    ("lightgbm", "all", "60m", 0.98, 1.0, "the paper has 0.9864"),
    ("lightgbm", "all", "1b", 0.95, 1.0, "the paper has 0.9712"),
    ("ols", "all", "1m", 0.88, 0.92, "the paper has 0.9008"),
    ("ols", "all", "60m", 0.87, 0.91, "the paper has 0.8926"),
    ("ols", "all", "1b", 0.86, 0.89, "the paper has 0.8801"),
    ("log-linear", "54", "1m", 0.95, 1.0, "a tenth of the runs is enough"),
    ("log-linear", "54", "60m", 0.95, 1.0, "a tenth of the runs is enough"),
    ("log-linear", "54", "1b", 0.95, 1.0, "a tenth of the runs is enough"),
    ("auto", "54", "60m", 0.95, 1.0, "cross-validation chooses as well as one who knows"),
)
"""Surrogate, runs, size judged by, least and greatest mean rank correlation, why."""


def load(folder: Path, name: str) -> Published:
    """A pair of files of the published tables."""
    kind, size = name.split("_")
    return tables.read([folder / f"{kind}_mixture_{size}.csv", folder / f"{kind}_pile_loss_{size}.csv"])


def measure(seen: Published, others: dict[str, Published], surrogate: str, target: str) -> dict[str, Any]:
    """Rank correlations of a fit on every other table, and what the fit is."""
    found: dict[str, Any] = {}
    for size, other in others.items():
        began = time.perf_counter()
        told = predict(seen, other, target=[target], surrogate=surrogate)["columns"][target]
        found[size] = {
            "spearman": told["spearman"],
            "rank_of_predicted_best": told["rank_of_predicted_best"],
            "judged": told["judged"],
            "surrogate": told["surrogate"],
            "cross_validation": told["cross_validation"],
            "seconds": time.perf_counter() - began,
        }
    return found


def fits(kinds: Sequence[str]) -> Iterator[tuple[str, str, int]]:
    """Surrogate, number of runs, seed of every fit: few runs with six seeds, then all of them."""
    for count in FEW:
        yield from ((kind, str(count), seed) for seed in SEEDS for kind in kinds)
    yield from ((kind, "all", 0) for kind in kinds)


def runs(
    seen: Published, others: dict[str, Published], kinds: Sequence[str], journal: Path
) -> Iterator[dict[str, Any]]:
    """Every fit, those of the journal as they stand there."""
    done = {(one["surrogate"], one["runs"], one["seed"]): one for one in rows(journal)}
    for kind, count, seed in fits(kinds):
        if (kind, count, seed) in done:
            yield done[kind, count, seed]
            continue
        some = seen
        if count != "all":
            some = seen.take(np.random.default_rng(seed).choice(len(seen.ids), int(count), replace=False).tolist())
        found = {"surrogate": kind, "runs": count, "seed": seed} | measure(some, others, kind, COLUMN)
        keep = Journal(journal)
        keep.append(found)
        keep.flush()
        yield found


def summary(found: Sequence[dict[str, Any]], sizes: Sequence[str]) -> list[dict[str, Any]]:
    """Mean and spread over seeds, by surrogate and number of runs."""
    told = []
    for kind, count in dict.fromkeys((one["surrogate"], one["runs"]) for one in found):
        row: dict[str, Any] = {"surrogate": kind, "runs": count}
        for size in sizes:
            values = [one[size]["spearman"] or 0.0 for one in found if (one["surrogate"], one["runs"]) == (kind, count)]
            row[size] = {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else 0.0}
        told.append(row)
    return told


def verdicts(summed: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each bar: held, missed, or not judged because its table is not here."""
    told = []
    for kind, count, size, low, high, why in BARS:
        row = next((one for one in summed if (one["surrogate"], one["runs"]) == (kind, count)), None)
        value = row[size]["mean"] if row is not None and size in row else None
        verdict = (
            "not judged: the table is not here" if value is None else "holds" if low <= value <= high else "missed"
        )
        bar = {"surrogate": kind, "runs": count, "size": size, "least": low, "most": high, "why": why}
        told.append({**bar, "value": value, "verdict": verdict})
    return told


def main() -> int:
    """Fit, judge, write a record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="write no record")
    parser.add_argument("--journal", type=Path, default=Path("runs/regmix-replay.jsonl"), help="fits so far")
    parser.add_argument("--kinds", nargs="+", default=["lightgbm", "ols", "log-linear", "gp", "log-gp", "auto"])
    asked = parser.parse_args()
    folder = Path(os.environ.get("LMWORKS_REGMIX_DATA", ""))
    if not (folder / "train_mixture_1m.csv").is_file():
        print("LMWORKS_REGMIX_DATA names no folder with RegMix' run tables", file=sys.stderr)
        return 2
    seen = load(folder, "train_1m")
    sizes = [size for size in SIZES if (folder / f"test_mixture_{size}.csv").is_file()]
    others = {size: load(folder, f"test_{size}") for size in sizes}
    found = []
    asked.journal.parent.mkdir(parents=True, exist_ok=True)
    for one in runs(seen, others, asked.kinds, asked.journal):
        found.append(one)
        print(one["surrogate"], one["runs"], one["seed"], {size: one[size]["spearman"] for size in sizes}, flush=True)
    told = summary(found, sizes)
    bars = verdicts(told)
    for bar in bars:
        print(bar)
    record = evidence_file.head("regmix_replay") | {
        "versions": evidence_file.versions_of(("lmworks", "numpy", "scipy", "scikit-learn", "lightgbm")),
        "learnt_from": {"table": "train_1m", "runs": len(seen.ids), "target": COLUMN},
        "judged_by": {size: len(other.ids) for size, other in others.items()},
        "summary": told,
        "verdicts": bars,
        "runs": found,
    }
    if not asked.dry:
        print(evidence_file.write(record, evidence_file.FOLDER))
    return 4 if any(bar["verdict"] == "missed" for bar in bars) else 0


if __name__ == "__main__":
    sys.exit(main())
