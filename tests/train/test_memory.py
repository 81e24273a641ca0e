"""What the C library does with memory that a step frees."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import psutil, torch
from lmworks.train import memory

assert getattr(memory, sys.argv[1])()
big = [torch.ones(1 << 22) for _ in range(24)]  # 16 MiB each
small = torch.ones(1 << 10)
before = psutil.Process().memory_info().rss
for i in range(0, 24, 2):
    big[i] = None
print((before - psutil.Process().memory_info().rss) >> 20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's own")
@pytest.mark.parametrize(("ask", "given_back"), [("return_freed_memory", True), ("keep_freed_memory", False)])
@pytest.mark.slow
def test_half_of_the_tensors_freed_in_between_goes_back_or_is_kept(ask: str, given_back: bool) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, ask], capture_output=True, text=True, check=False)
    if "AssertionError" in done.stderr:
        pytest.skip("another C library")
    assert (int(done.stdout) >= 12 * 16) is given_back
