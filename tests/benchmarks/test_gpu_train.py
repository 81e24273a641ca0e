"""benchmarks/gpu_train.py at toy size on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_train.py"


def gpu_train(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_it_runs_without_a_gpu_at_toy_size() -> None:
    small = ["--device", "cpu", "--size", "toy", "--arms", "eager", "--batch", "2", "--sequence", "32"]
    done = gpu_train(*small, "--rounds", "2", "--steps", "2", "--warmup", "1", "--json", "--no-evidence")
    assert done.returncode in (0, 4), done.stderr
    record = json.loads(done.stdout)
    (row,) = record["arms"]
    assert row["tokens_per_second"] == pytest.approx(2 * 32 / row["step_seconds"]["median"])
    assert [run["round"] for run in record["runs"]] == [1, 2]
    assert record["runs"][0]["loss"] == record["runs"][1]["loss"]


def test_without_a_gpu_it_says_what_to_do() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = gpu_train("--no-evidence")
    assert done.returncode == 2
    assert "--device cpu" in done.stderr
