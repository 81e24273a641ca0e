"""Kernels run here in Triton's interpreter on the CPU, and compiled where a test is marked `gpu`.

`tests/conftest.py` asks for the interpreter, before anything imports Triton, where there is no CUDA device.
"""

from __future__ import annotations

import pytest

from lmworks.maths import kernels


@pytest.fixture(autouse=True)
def as_this_test_needs_them(request: pytest.FixtureRequest) -> None:
    """Skip, with the reason, what this process cannot run."""
    if not kernels.there():
        pytest.skip("needs triton: pip install 'lmworks[dev]' brings it on Linux x86-64")
    from lmworks.maths.kernels import grid

    compiled = request.node.get_closest_marker("gpu") is not None
    if compiled and grid.INTERPRETED:
        pytest.skip("this process interprets kernels: unset TRITON_INTERPRET")
    if not compiled and not grid.INTERPRETED:
        pytest.skip("this process compiles kernels: set TRITON_INTERPRET=1 to run them on the CPU")
