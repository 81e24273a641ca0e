"""Rows that weigh: a row of weight 2 counts as the same row twice, in the loss, its gradient and its divisor."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from lmworks.data.load import Batch
from lmworks.model.head import cross_entropy_sum
from lmworks.train.objective import CrossEntropy
from lmworks.train.probe import Probe, twice_differentiable
from tests.train import toy
from tests.train.test_step import gradients, step_on


def weighted(batch: Batch, weights: list[float]) -> Batch:
    return dataclasses.replace(batch, weights_B=torch.tensor(weights))


def repeated(batch: Batch, times: list[int]) -> Batch:
    return batch[torch.tensor([i for i, n in enumerate(times) for _ in range(n)])]


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_a_row_of_weight_n_is_the_row_n_times(micro: int) -> None:
    model, batch = toy.model(), toy.batch(4, 10, 61)
    want_loss, want = gradients(model, repeated(batch, [1, 3, 0, 2]), 6)
    loss, found = gradients(model, weighted(batch, [1.0, 3.0, 0.0, 2.0]), micro)
    assert loss == pytest.approx(want_loss, abs=1e-12)
    for name, tensor in want.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-12)


def test_the_scale_of_the_weights_does_not_matter() -> None:
    model, batch = toy.model(), toy.batch(3, 10, 61)
    _, want = gradients(model, weighted(batch, [1.0, 2.0, 4.0]), 3)
    _, found = gradients(model, weighted(batch, [8.0, 16.0, 32.0]), 3)
    for name, tensor in want.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-12)


def test_a_step_counts_whole_tokens() -> None:
    batch = weighted(toy.batch(3, 10, 61), [0.3, 0.9, 1.8])
    units = step_on(toy.model(), [batch])().units
    assert units == {"cross_entropy": int((batch.targets_BT != -100).sum())}


def test_the_plain_form_weighs_alike() -> None:
    model, batch = toy.model(), weighted(toy.batch(3, 10, 61), [1.0, 2.0, 4.0])
    parameters = list(model.parameters())
    own = Probe(model, CrossEntropy(), seed=0).gradients(batch, parameters)
    with twice_differentiable():
        plain = Probe(model, CrossEntropy(), seed=0).gradients(batch, parameters)
    for a, b in zip(own, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_weights_hold_across_chunks_of_the_head() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    targets, shares = torch.randint(0, 11, (7,), generator=generator), torch.rand(7, generator=generator)

    def run(chunk: int) -> tuple[Tensor, ...]:
        total = cross_entropy_sum(hidden, head, targets, shares_N=shares, chunk=chunk)
        return total, *torch.autograd.grad(total, [hidden, head])

    each = torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="none")
    want = (each * shares).sum()
    for a, b in zip(run(3), (want, *torch.autograd.grad(want, [hidden, head])), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_weights_travel_with_their_rows() -> None:
    batch = weighted(toy.batch(4, 6, 61), [1.0, 2.0, 3.0, 4.0])
    assert [micro.weights_B.tolist() for micro in batch.split(3) if micro.weights_B is not None] == [[1, 2, 3], [4]]


def test_the_loss_of_each_row_does_not_weigh() -> None:
    model, batch = toy.model(), toy.batch(3, 8, 61)
    objective = CrossEntropy()
    assert torch.equal(objective.each(model, weighted(batch, [1.0, 5.0, 9.0])), objective.each(model, batch))


def test_hidden_states_may_be_given() -> None:
    model, batch = toy.model(), toy.batch(3, 8, 61)
    objective = CrossEntropy()
    with torch.no_grad():
        midway = model.until(1, batch.tokens_BT, positions_BT=batch.positions_BT, documents_BT=batch.documents_BT)
        hidden_BTD = model.rest(midway)
    assert torch.equal(objective.each(model, batch, hidden_BTD), objective.each(model, batch))
    loss = objective.loss(model, batch, hidden_BTD)["cross_entropy"].total
    torch.testing.assert_close(loss, objective.loss(model, batch)["cross_entropy"].total, rtol=0, atol=1e-10)
