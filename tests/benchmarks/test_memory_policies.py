"""benchmarks/memory_policies.py at toy size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "memory_policies.py"


@pytest.mark.slow
def test_it_prints_every_policy_beside_keep() -> None:
    words = ["--size", "toy", "--rounds", "1", "--steps", "1", "--no-evidence"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["arm", "saved", "resident", "a", "step", "written", "loss"]
    rows = {line.split()[0]: line.split() for line in lines}
    assert set(rows) == {"keep", "recompute", "products", "host", "disk", "coat", "coat-disk"}
    saved = {name: float(row[1]) for name, row in rows.items()}
    assert saved["recompute"] < saved["products"] < saved["keep"]
    exact = {name: row[-1] for name, row in rows.items() if not name.startswith("coat")}
    assert set(exact.values()) == {rows["keep"][-1]}, "the same losses"
    assert rows["coat"][-1] == rows["coat-disk"][-1] != rows["keep"][-1], "codes round, and come back as they were"
