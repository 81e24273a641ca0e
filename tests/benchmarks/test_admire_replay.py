"""benchmarks/admire_replay.py: on a made-up table, and on the published one where it is there."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "admire_replay.py"
SOURCES = ("arxiv", "books", "web")


def replayed(folder: Path, out: Path, *options: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(SCRIPT), "--folder", str(folder), "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.json")
    found: list[dict[str, Any]] = json.loads(path.read_text())["results"]
    return found


def made_up(folder: Path) -> None:
    """Two sizes that rank mixtures alike, in RegMix's form."""
    rng = np.random.default_rng(0)
    for split, size, rows in (("train", "1m", 40), ("test", "60m", 60)):
        p = rng.dirichlet(np.ones(3), size=rows).round(4)
        loss = ((p - [0.2, 0.3, 0.5]) ** 2).sum(1) + (4.0 if size == "1m" else 3.0)
        with (folder / f"{split}_mixture_{size}.csv").open("w") as file:
            csv.writer(file).writerows(
                [["index", *(f"train_the_pile_{name}" for name in SOURCES)], *[[i, *row] for i, row in enumerate(p)]]
            )
        with (folder / f"{split}_pile_loss_{size}.csv").open("w") as file:
            csv.writer(file).writerows([["index", "metric/the_pile_web_val_loss"], *enumerate(loss)])


@pytest.mark.slow
def test_a_made_up_table(tmp_path: Path) -> None:
    made_up(tmp_path)
    options = ("--targets", "web", "--seeds", "2", "--steps", "16", "--plans", "entropy, linked sizes")
    (found,) = replayed(tmp_path, tmp_path / "out", *options)
    assert found["within_10"] >= 1  # of two seeds with few runs
    for run in found["runs"]:
        assert run["runs"]["1m"] + run["runs"]["60m"] == 16
        assert run["spent"] == pytest.approx(run["runs"]["60m"] + run["runs"]["1m"] / 60)


@pytest.mark.slow
def test_the_best_of_48_published_runs_is_found_for_at_most_ten(tmp_path: Path) -> None:
    folder = os.environ.get("LMWORKS_REGMIX_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs RegMix's run tables: LMWORKS_REGMIX_DATA=FOLDER")
    options = ("--plans", "improvement, large runs only", "--steps", "24")
    (found,) = replayed(Path(folder), tmp_path / "out", *options)
    assert found["within_10"] >= 4
