"""benchmarks/pipette_regret.py and pipette_steps.py at toy size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def test_a_cluster_is_the_same_each_time_and_has_two_bad_links() -> None:
    from pipette_ground import BAD, GPUS, INSIDE, NOMINAL, Cluster

    first, again = Cluster(3), Cluster(3)
    assert first.machines == 8
    assert np.array_equal(first.true, again.true)
    assert np.array_equal(first.seen, again.seen)
    assert np.array_equal(first.true, first.true.T)
    assert (np.diag(first.true) == INSIDE).all()
    upper = first.true[np.triu_indices(8, 1)]
    assert sorted(upper)[1] < 2.2 * BAD * NOMINAL < sorted(upper)[2]
    assert GPUS == 8


def test_regret_is_taken_from_the_best_and_picks_that_do_not_fit_are_counted() -> None:
    from pipette_regret import summary

    def row(regret: float | None, fits: bool) -> dict[str, object]:
        return {"picks": {"one": {"regret": regret, "fits": fits}}}

    found = summary([row(0.0, True), row(0.5, False), row(None, False)])["one"]
    assert found == {
        "mean_regret": 0.25,
        "median_regret": 0.25,
        "largest_regret": 0.5,
        "does_not_fit": 0.6667,
        "no_pick": 1,
    }


def test_pairs_are_in_order_or_not() -> None:
    from pipette_steps import summary

    rows = [{"measured": 1.0, "clock": 1.1}, {"measured": 2.0, "clock": 1.0}, {"measured": 4.0, "clock": 4.0}]
    assert summary(rows, "clock") == pytest.approx({"mape": (0.1 + 0.5) / 3, "pairs_right": 2 / 3})


@pytest.mark.slow
def test_the_study_prints_every_planner() -> None:
    words = ["--clusters", "1", "--moves", "50", "--epochs", "2", "--no-evidence"]
    done = subprocess.run(
        [sys.executable, str(FOLDER / "pipette_regret.py"), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for planner in ("amp", "varuna", "megatron", "pipette + simulator"):
        assert planner in done.stdout
