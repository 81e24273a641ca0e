"""Rotary embedding's kernel in the interpreter."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.maths import kernels
from lmworks.model import ops
from lmworks.model.rotary import Rotary
from tests.maths.kernels import cases


@settings(max_examples=7)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    batch=st.integers(1, 2),
    length=st.integers(1, 3),
    heads=st.integers(1, 3),
    half=st.integers(1, 6),
    rest=st.integers(0, 5),
    shared=st.booleans(),
    seed=st.integers(0, 99),
)
def test_turn_and_turn_back(
    dtype: torch.dtype, batch: int, length: int, heads: int, half: int, rest: int, shared: bool, seed: int
) -> None:
    shape = (batch, length, heads, 2 * half + rest)
    cases.rotary("cpu", dtype, shape, 2 * half, 1 if shared else batch, seed)


def test_heads_inside_a_joint_product_and_equal_to_the_plain_form() -> None:
    joint = cases.normal(2, 3, 40, seed=0)
    q = joint[..., 8:32].unflatten(-1, (3, 8))
    cos, sin = Rotary(theta=100.0, width=4).tables(torch.arange(3)[None])
    torch.testing.assert_close(kernels.rotary.rotate(q, cos, sin), ops.rotate(q, cos, sin), rtol=0, atol=1e-6)
    swapped = q.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert swapped.stride(-1) != 1
    torch.testing.assert_close(kernels.rotary.rotate(swapped, cos, sin), ops.rotate(q, cos, sin), rtol=0, atol=1e-6)
