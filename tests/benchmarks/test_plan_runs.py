"""benchmarks/plan_runs.py: what it sums up, and at toy size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lmworks.core import recipe as recipes

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def row(told: float, measured: float, ranks: int = 1, **over: Any) -> dict[str, Any]:
    facts = {"told": told, "measured": measured, "error": told / measured - 1, "ranks": ranks}
    return {"shape": "small", "calibration": False, **facts, **over}


def test_errors_and_order() -> None:
    from plan_runs import summary, sums

    rows = [row(1.1, 1.0), row(1.0, 2.0), row(4.0, 4.0, 4), row(9.0, 1.0, calibration=True)]
    found = sums(rows, cores=2)
    assert found["all"] == pytest.approx(
        {"runs": 3, "mape": (0.1 + 0.5) / 3, "rank_correlation": 0.5, "pairs_right": 2 / 3}
    )
    assert found["a core for each rank"]["runs"] == 2
    assert found["more ranks than cores"]["mape"] == 0
    assert found["all, wide"] == summary([])


def test_every_layout_is_legal() -> None:
    from plan_runs import LAYOUTS, SHAPES, table

    for shape in SHAPES:
        for name, (layout, rows) in LAYOUTS.items():
            made = recipes.decode(table(shape, layout, rows, 9))
            assert made.layout.settle(layout.ranks, made).ranks == layout.ranks <= 4, name


@pytest.mark.slow
def test_a_run_is_told_and_run() -> None:
    words = ["--steps", "9", "--shapes", "small", "--layouts", "one", "replicate 2", "--no-evidence"]
    done = subprocess.run(
        [sys.executable, str(FOLDER / "plan_runs.py"), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "replicate 2" in done.stdout
    assert "'mape'" in done.stdout
