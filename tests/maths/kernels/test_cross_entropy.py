"""Losses of rows of logits and their gradient in place, in the interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.maths import kernels
from tests.maths.kernels import cases


@settings(max_examples=8)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rows=st.integers(1, 6),
    vocab=st.integers(2, 60),
    shares=st.booleans(),
    seed=st.integers(0, 99),
)
def test_value_and_gradient(dtype: torch.dtype, rows: int, vocab: int, shares: bool, seed: int) -> None:
    cases.losses("cpu", dtype, rows, vocab, shares=shares, seed=seed)


def test_a_row_longer_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.cross_entropy, "BLOCK", 16)
    cases.losses("cpu", torch.float32, 5, 57, shares=True)


def test_masked_logits_and_a_first_block_of_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.cross_entropy, "BLOCK", 4)
    logits = torch.full((1, 9), -math.inf)
    logits[0, 5:7] = torch.tensor([1.0, 1.0])
    found = kernels.cross_entropy.losses_in_place(logits, torch.tensor([6]), ignore=cases.IGNORE)
    assert float(found) == pytest.approx(math.log(2))
    assert logits[0].tolist() == pytest.approx([0, 0, 0, 0, 0, 0.5, -0.5, 0, 0], abs=1e-7)


@pytest.mark.parametrize("target", [-1, 9])
def test_a_target_that_is_no_token_is_never_a_number(target: int) -> None:
    logits = torch.zeros(2, 9)
    found = kernels.cross_entropy.losses_in_place(logits, torch.tensor([target, 3]), ignore=cases.IGNORE)
    assert math.isnan(float(found[0]))
    assert float(found[1]) == pytest.approx(math.log(9))
    assert logits[0].isnan().all()


def test_logits_that_are_no_neighbours_are_refused() -> None:
    with pytest.raises(ValueError, match="neighbours"):
        kernels.cross_entropy.losses_in_place(torch.zeros(4, 3).t(), torch.zeros(3, dtype=torch.int64), ignore=-100)
