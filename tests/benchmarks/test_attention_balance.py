"""benchmarks/attention_balance.py at toy size."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "attention_balance.py"


@pytest.mark.slow
def test_it_tells_idle_time_of_every_packing() -> None:
    words = ["--toy", "--steps", "1", "--tokens", "4096", "--corpora", "pretrain", "--no-evidence"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(
        r"^ +(\d+) ranks  (.+?) +idle +([\d.]+) %  memory ([\d.]+)  moved +([\d.]+) %", done.stdout, re.MULTILINE
    )
    arms = {"plain", "by work, cap 1.0", "by work, cap 1.2", "by document", "shared"}
    assert {(int(ranks), arm) for ranks, arm, *_ in found} == {(n, arm) for n in (2, 4, 8, 16) for arm in arms}
    assert len(found) == 2 * 4 * len(arms), "two clocks"
    for _, arm, idle, memory, moved in found:
        assert 0 <= float(idle) < 100
        if arm in ("plain", "shared"):
            assert float(memory) == 1
        if arm == "shared":
            assert 0 < float(moved) < 100
