"""Codes by blocks in the interpreter: the bits of the plain form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.maths.blockwise import CODES, Code, Runs
from tests.maths.kernels import cases

codes = st.sampled_from(sorted(CODES)).map(CODES.__getitem__)
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=12)
@given(
    code=codes,
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    block=st.integers(1, 17),
    size=st.sampled_from([1.0, 1e-30, 1e-40, 3e-44, 1e30]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 99),
)
def test_the_kernels_code_as_the_plain_form_does(
    code: Code, lengths: list[int], block: int, size: float, dtype: torch.dtype, seed: int
) -> None:
    runs = Runs(lengths=tuple(lengths), block=block)
    x_RN = (cases.normal(3, runs.values, seed=seed) * size).to(dtype)
    cases.blocks("cpu", x_RN, code, runs)


@pytest.mark.parametrize("code", CODES.values(), ids=lambda code: code.name)
def test_ties_go_to_even_and_zeros_stay_zeros(code: Code) -> None:
    """The largest of a block is top, so that the others are codes, or lie in the middle between two."""
    row = torch.tensor([code.top, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.49, -float(code.top), 0.0, 0.0, 0.0, 0.0, 0.0])
    cases.blocks("cpu", row[None], code, Runs(lengths=(9, 5), block=9))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("code", CODES.values(), ids=lambda code: code.name)
def test_what_is_not_finite_spoils_its_block_as_in_the_plain_form(code: Code, bad: float) -> None:
    x_RN = cases.normal(2, 24, seed=5) * 100
    x_RN[1, 10] = bad
    cases.blocks("cpu", x_RN, code, Runs(lengths=(20, 4), block=8))


@pytest.mark.parametrize("dtype", FLOATS)
def test_several_programs_and_many_runs(dtype: torch.dtype) -> None:
    """More runs than a power of two, blocks that fill programs and blocks that do not."""
    for code in CODES.values():
        cases.blocks(
            "cpu",
            cases.normal(2, 3 * 1280 + 77, seed=1).to(dtype),
            code,
            Runs(lengths=(1280, 77, 1280, 1280), block=256),
        )
