"""The chunked cross-entropy is the whole-tensor one, in value and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lmworks.model import ops
from lmworks.model.head import IGNORE, cross_entropy_each, cross_entropy_sum


def problem(
    tokens: int, vocab: int, width: int, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < 0.3] = IGNORE
    return hidden, weight, targets


@given(
    tokens=st.integers(1, 9),
    vocab=st.integers(2, 11),
    width=st.integers(1, 5),
    chunk=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_equal_to_torch_in_value_and_gradient(tokens: int, vocab: int, width: int, chunk: int, seed: int) -> None:
    hidden, weight, targets = problem(tokens, vocab, width, seed)
    want = F.cross_entropy(hidden @ weight.t(), targets, ignore_index=IGNORE, reduction="sum")
    want_grads = torch.autograd.grad(want * 0.7, (hidden, weight))
    got = cross_entropy_sum(hidden, weight, targets, chunk=chunk)
    got_grads = torch.autograd.grad(got * 0.7, (hidden, weight))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    each = cross_entropy_each(hidden, weight, targets, chunk=chunk)
    torch.testing.assert_close(each.sum(), want.detach(), rtol=1e-12, atol=1e-12)


def test_a_vocabulary_that_divides_by_nothing() -> None:
    hidden, weight, targets = problem(37, 257, 16, 0, torch.float32)
    got = cross_entropy_sum(hidden, weight, targets, chunk=10)
    want = F.cross_entropy(hidden @ weight.t(), targets, ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)


def test_all_targets_ignored_is_zero_with_zero_gradient() -> None:
    hidden, weight, targets = problem(5, 7, 3, 1)
    loss = cross_entropy_sum(hidden, weight, torch.full_like(targets, IGNORE))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    hidden, weight, targets = problem(6, 8, 4, 2)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    cross_entropy_sum(hidden, weight, targets, chunk=4).backward()
    assert (hidden.grad is None) == (frozen == "hidden")
    assert (weight.grad is None) == (frozen == "weight")


def test_bfloat16_hidden_states_with_float32_weights() -> None:
    hidden, weight, targets = problem(64, 101, 32, 3, torch.float32)
    want = F.cross_entropy(hidden @ weight.t(), targets, ignore_index=IGNORE, reduction="sum")
    (want_grad,) = torch.autograd.grad(want, weight)
    low = hidden.detach().bfloat16().requires_grad_()
    got = cross_entropy_sum(low, weight, targets, chunk=16)
    got.backward()
    assert got.dtype == torch.float32
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert low.grad is not None
    assert low.grad.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=0.0)
    assert float((weight.grad - want_grad).norm() / want_grad.norm()) < 2e-2


def test_plain_forms_give_the_second_derivative() -> None:
    hidden, weight, targets = problem(5, 7, 3, 4)

    def curvature(loss: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
        (found,) = torch.autograd.grad(grad.square().sum(), hidden)
        return found

    want = curvature(F.cross_entropy(hidden @ weight.t(), targets, ignore_index=IGNORE, reduction="sum"))
    with ops.plain_forms():
        got = curvature(cross_entropy_sum(hidden, weight, targets, chunk=2))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_a_second_derivative_of_the_fast_form_is_refused_and_never_silently_zero() -> None:
    hidden, weight, targets = problem(5, 7, 3, 4)
    loss = cross_entropy_sum(hidden.tanh(), weight, targets)
    with pytest.raises(RuntimeError, match="plain_forms"):
        torch.autograd.grad(loss, hidden, create_graph=True)
