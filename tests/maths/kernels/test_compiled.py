"""Every kernel compiles to machine code for GPUs, on a machine without one: Triton brings the assembler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
EIGHT_BITS_IN = {"expansion", "gated8", "norm8"}


def compiled_for(capability: int, cache: Path) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-m", "tests.maths.kernels.compile_all", str(capability)],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    rows: list[dict[str, Any]] = json.loads(found.stdout)
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_machine_code_for_every_kernel(capability: int, tmp_path: Path) -> None:
    rows = compiled_for(capability, tmp_path)
    assert all(row["bytes"] > 0 for row in rows)
    assert len({row["kernel"] for row in rows}) == 18
    for row in rows:
        family, _, kernel = row["kernel"].partition(".")
        asks = capability >= 89 and (family in EIGHT_BITS_IN or (family == "quantise" and kernel != "_maxima"))
        assert bool(row["conversions"]) == asks, row
