"""benchmarks/gpu_memory.py at toy size on a CPU, and its arithmetic."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_memory.py"
SMALL = ["--device", "cpu", "--size", "toy", "--sequence", "32", "--steps", "1", "--micro", "2", "1"]


@pytest.mark.slow
def test_it_runs_without_a_gpu_at_toy_size() -> None:
    options = [*SMALL, "--arms", "eager", "recompute", "--loss-steps", "3", "--loss-rows", "2", "--json"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options, "--no-evidence"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["arms"]
    eager, recompute = found["eager"], found["recompute"]
    assert [point["micro"] for point in eager["points"]] == [1, 2]
    assert eager["too_many"] is None
    assert all(a["activations"] > b["activations"] for a, b in zip(eager["points"], recompute["points"], strict=True))
    assert eager["points"][1]["activations"] > 1.2 * eager["points"][0]["activations"]
    assert len(eager["losses"]) == 3
    assert "losses" not in recompute


def test_the_sweep_ends_where_memory_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_arms
    import gpu_memory

    options = argparse.Namespace(
        size="toy", device="cpu", batch=1, sequence=32, steps=1, micro=[4, 1, 2], folder=tmp_path
    )
    gpu_arms.write_rows(tmp_path, options, rows=8)
    point = gpu_memory.point

    def short_of_memory(built: Any, rows: int, *rest: Any) -> dict[str, Any]:
        if rows == 4:
            raise torch.OutOfMemoryError
        return point(built, rows, *rest)

    monkeypatch.setattr(gpu_memory, "point", short_of_memory)
    found = gpu_memory.sweep("eager", options)
    assert [p["micro"] for p in found["points"]] == [1, 2]
    assert found["too_many"] == 4
    assert any("2 rows fit, 4 do not" in line for line in gpu_memory.report({"eager": found}))


def sweep(activations: int, seconds: float, optimizer: int = 80) -> dict[str, Any]:
    points = [
        {
            "micro": rows,
            "seconds": seconds,
            "tokens_per_second": rows / seconds,
            "activations": rows * activations,
            "peak_bytes": None,
            "by_class": {},
        }
        for rows in (1, 2)
    ]
    return {"stays": {"optimizer": optimizer}, "points": points, "too_many": None}


def test_bars_compare_equal_micro_batches() -> None:
    import gpu_memory

    ssdtrain = sweep(50, 1.02)
    ssdtrain["points"].append(ssdtrain["points"][0] | {"micro": 9, "activations": 10**9})
    found = {"eager": sweep(100, 1.0), "ssdtrain-host": ssdtrain, "coat-optimizer": sweep(100, 1.0, optimizer=22)}
    less, slower, state = gpu_memory.bars_of(found)
    assert less.value.each == (0.5, 0.5)
    assert slower.value.median == pytest.approx(1.02)
    assert state.value.median == pytest.approx(0.275)
    assert all(bar.is_met for bar in (less, slower, state))


def test_ratios_are_of_equal_micro_batches() -> None:
    import gpu_memory

    coat = sweep(50, 0.5)
    coat["points"][0]["micro"] = 9
    found = {"eager": sweep(100, 1.0), "coat-both": coat}
    assert gpu_memory.ratios(found) == [{"arm": "coat-both", "micro": 2, "speed": 2.0, "activations": 0.5}]
    assert any("2 rows: 2.00 x eager's speed  0.50 of its activations" in line for line in gpu_memory.report(found))


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    import gpu_picture

    path = tmp_path / "picture.png"
    gpu_picture.draw({"eager": sweep(100, 1.0) | {"losses": [2.0, 1.0]}, "float8": {}}, path)
    assert path.read_bytes().startswith(b"\x89PNG")
