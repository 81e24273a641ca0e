"""benchmarks/gpu_train.py at toy size on a CPU."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_train.py"


def gpu_train(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_it_runs_without_a_gpu_at_toy_size() -> None:
    small = ["--device", "cpu", "--size", "toy", "--arms", "eager", "recompute", "--batch", "2", "--sequence", "32"]
    done = gpu_train(*small, "--rounds", "2", "--steps", "2", "--warmup", "2", "--json", "--no-evidence")
    assert done.returncode in (0, 4), done.stderr
    record = json.loads(done.stdout)
    row, recomputed = record["arms"]
    assert row["tokens_per_second"] == pytest.approx(2 * 32 / row["step_seconds"]["median"])
    assert [(run["arm"], run["round"]) for run in record["runs"]] == [
        ("eager", 1), ("recompute", 1), ("eager", 2), ("recompute", 2),
    ]  # fmt: skip
    assert len({run["loss"] for run in record["runs"]}) == 1, "the same weights, rows and mathematics"
    assert 0 < recomputed["ledger_peak_bytes"] < row["ledger_peak_bytes"]
    assert row["idle_share"] is None


def test_without_a_gpu_it_says_what_to_do(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_memory
    import gpu_train as program

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for main in (program.main, gpu_memory.main):
        assert main(["--no-evidence"]) == 2
        assert "--device cpu" in capsys.readouterr().err


def run(arm: str, turn: int, seconds: float, **facts: Any) -> dict[str, Any]:
    plain = {"loss": 1.0, "notes": [], "idle_share": 0.1, "ledger_peak_bytes": 5, "peak_memory_bytes": 10 * turn}
    return {"arm": arm, "round": turn, "seconds": [9 * seconds, seconds, seconds], "train_flops_per_token": 100.0} | {
        **plain,
        **facts,
    }


def test_rows_and_bars_are_medians_of_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_train as program

    monkeypatch.setattr(program, "peak_flops", lambda device, dtype: (1000.0, "a table"))
    runs = [run("eager", 1, 4.0), run("float8", 1, 1.0), {"arm": "compile", "round": 1, "failed": "no memory"}]
    runs += [run("eager", 2, 2.0), run("float8", 2, 1.0)]
    options = argparse.Namespace(arms=["eager", "compile", "float8"], device="cpu", batch=2, sequence=10)
    rows = program.summary(runs, options)
    assert [row["arm"] for row in rows] == ["eager", "float8"]
    assert rows[0]["step_seconds"].median == 3.0
    assert rows[0]["tokens_per_second"] == pytest.approx(20 / 3)
    assert rows[0]["mfu"].each == (20 * 100 / 4 / 1000, 20 * 100 / 2 / 1000)
    assert rows[0]["peak_memory_bytes"] == 20
    mfu, faster = program.bars_of(rows)
    assert mfu.against == "eager"
    assert faster.value.each == (4.0, 2.0)
    assert faster.is_met
    assert "idle" in program.line(rows[0])
