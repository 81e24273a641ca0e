"""SwiGLU's kernels in the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.maths import kernels
from tests.maths.kernels import cases


@settings(max_examples=8)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rows=st.integers(1, 4),
    width=st.integers(1, 40),
    strided=st.booleans(),
    seed=st.integers(0, 99),
)
def test_value_and_gradients(dtype: torch.dtype, rows: int, width: int, strided: bool, seed: int) -> None:
    cases.gated("cpu", dtype, (rows, width), strided=strided, seed=seed)


@pytest.mark.parametrize("strided", [False, True])
def test_several_blocks(strided: bool) -> None:
    cases.gated("cpu", torch.float32, (2, 2100), strided=strided)


def test_large_gates_do_not_overflow() -> None:
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], requires_grad=True)
    out = kernels.gated.swiglu(gate, torch.ones(5))
    assert out.tolist() == [0.0, pytest.approx(-100 * 3.72e-44, abs=1e-41), 0.0, 100.0, 1e4]
    out.sum().backward()
    assert gate.grad is not None
    assert gate.grad.tolist() == pytest.approx([0.0, 0.0, 0.5, 1.0, 1.0], abs=1e-40)
