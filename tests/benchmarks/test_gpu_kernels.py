"""benchmarks/gpu_kernels.py at toy size, in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lmworks.maths import kernels

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_kernels.py"


def gpu_kernels(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


@pytest.mark.slow
@pytest.mark.skipif(not kernels.there(), reason="needs triton: pip install 'lmworks[dev]' brings it on Linux x86-64")
def test_every_kernel_is_held_against_its_plain_form() -> None:
    done = gpu_kernels("--interpret", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert {row["kernel"].split()[0] for row in record["kernels"]} >= {"norm", "rotary", "gated", "cross_entropy"}
    for row in record["kernels"]:
        assert 0 <= row["difference"] < 2.0**-7
        (kernel,), (plain,) = row["seconds"]["kernel"], row["seconds"]["plain"]
        assert row["bytes_per_second"] == pytest.approx(row["bytes"] / kernel)
        assert row["faster_than"] == {"plain": pytest.approx(plain / kernel)}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do() -> None:
    done = gpu_kernels("--no-evidence")
    assert done.returncode == 2
    assert "--interpret" in done.stderr or "pip install triton" in done.stderr
