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


def compiling(cache: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, in a process where kernels are compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache)}
    found = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr[-2000:]
    return found


def compiled_for(capability: int, cache: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(
        compiling(cache, "-m", "tests.maths.kernels.compile_all", str(capability)).stdout
    )
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_machine_code_for_every_kernel(capability: int, tmp_path: Path) -> None:
    rows = compiled_for(capability, tmp_path)
    assert all(row["bytes"] > 0 for row in rows)
    assert len({row["kernel"] for row in rows}) == 22
    for row in rows:
        family, _, kernel = row["kernel"].partition(".")
        asks = capability >= 89 and (family in EIGHT_BITS_IN or (family == "quantise" and kernel != "_maxima"))
        assert bool(row["conversions"]) == asks, row


@pytest.mark.slow
def test_what_cannot_be_built_is_told_and_not_used(tmp_path: Path) -> None:
    """A CPU is such a device: Triton has no driver for it."""
    code = "import torch; from lmworks.maths import kernels; print(kernels.builds(torch.device('cpu')))"
    found = compiling(tmp_path, "-c", code)
    assert found.stdout.strip() == "False"
    assert "Triton cannot build kernels for cpu, so the plain forms run" in found.stderr
