"""Our joules beside codecarbon's, where it is installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = 60


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("codecarbon") is None, reason="not installed: pip install 'codecarbon==3.3.2'"
)
def test_a_minute_as_codecarbon_tells_it(tmp_path: Path) -> None:
    script = Path(__file__).parent / "beside_codecarbon.py"
    done = subprocess.run(
        [sys.executable, str(script), str(SECONDS), str(tmp_path)],
        capture_output=True, text=True, timeout=10 * SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    ours, theirs = found["ours"], found["theirs"]
    # power and not energy: on a busy machine either of them may begin or end a second before the other
    assert ours["watts"] == pytest.approx(theirs["watts"], rel=0.02)
    for each in (ours, theirs):
        assert each["kg"] == pytest.approx(0.3 * each["kwh"], rel=1e-6)
    assert ours["kwh"] == pytest.approx(theirs["kwh"], rel=0.1)
