"""RMSNorm's kernels in the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.maths import kernels
from tests.maths.kernels import cases

BF16, FP32 = torch.bfloat16, torch.float32


@settings(max_examples=12)
@given(
    dtype=st.sampled_from([FP32, BF16]),
    weight_dtype=st.sampled_from([FP32, BF16]),
    rows=st.integers(1, 9),
    width=st.integers(2, 70),
    seed=st.integers(0, 99),
)
def test_value_and_gradients(dtype: torch.dtype, weight_dtype: torch.dtype, rows: int, width: int, seed: int) -> None:
    cases.norm("cpu", dtype, (rows, width), weight_dtype, seed)


def test_more_tiles_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.norm, "PARTS", 3)
    cases.norm("cpu", FP32, (11, 1030), FP32)


def test_rows_of_one_and_no_rows() -> None:
    cases.norm("cpu", FP32, (3, 2, 1), FP32)
    x, weight = torch.zeros(0, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    y = kernels.norm.rms_norm(x, weight, 1e-5)
    y.sum().backward()
    assert y.shape == (0, 8)
    assert weight.grad is not None
    assert not weight.grad.any()


def test_a_head_inside_a_wider_row() -> None:
    """As the norm of q and k sees it: a view with strides of its own."""
    wide = cases.normal(2, 3, 10, seed=0).requires_grad_()
    weight = cases.normal(4, seed=1)
    found = kernels.norm.rms_norm(wide[..., :8].unflatten(-1, (2, 4)), weight, 1e-6)
    want = torch.nn.functional.rms_norm(wide[..., :8].unflatten(-1, (2, 4)), (4,), weight, 1e-6)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)


def test_a_second_derivative_is_refused() -> None:
    x, weight = cases.normal(3, 8, seed=0).requires_grad_(), cases.normal(8, seed=1)
    (first,) = torch.autograd.grad(kernels.norm.rms_norm(x, weight, 1e-5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
