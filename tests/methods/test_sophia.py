"""Sophia against NumPy and against closed forms."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lmworks.data.load import Batch
from lmworks.methods.sophia import Sophia, gauss_newton, hutchinson
from lmworks.train.optim import TorchUpdate
from lmworks.train.probe import Probe
from lmworks.train.slots import Component, Objective, Update
from lmworks.train.step import Step
from tests.methods.curvature import KINDS, MLP, Classify, Formula, Point, Recording, kept, numbers, stepping, values
from tests.oracles import sophia as oracle
from tests.train import toy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("every", [1, 7])
def test_thirty_steps_equal_numpy(kind: Any, every: int) -> None:
    model, objective = MLP(), Classify()
    batch = toy.batch(6, 4, 13, seed=1)
    batch = dataclasses.replace(batch, targets_BT=torch.where(batch.targets_BT < 0, -100, batch.targets_BT % 4))
    used = batch[torch.tensor([0, 2, 4])]  # half of six rows at even distances
    assert (used.targets_BT < 0).any()
    start = numbers(model)
    settings = Sophia(
        lr=0.02, estimator=kind, gamma=0.7, every=every, share=0.5, betas=(0.9, 0.8), eps=1e-4, weight_decay=0.1
    )
    step = stepping(model, settings, [batch], objective, micro_rows=2)
    clipped = [step().extra["sophia/clipped"] for _ in range(30)]
    assert 0.05 < min(clipped) < max(clipped) <= 1.0

    def data(rows: Batch) -> tuple[Any, Any]:
        return model.features_VD[rows.tokens_BT].flatten(0, 1).numpy(), rows.targets_BT.flatten().numpy()

    asked = [dict(zip(start, (u.numpy() for u in us), strict=True)) for us in _in_order(model, step)]
    drawn = [torch.cat(objective.drawn[i : i + 2]).flatten().numpy() for i in range(0, len(objective.drawn), 2)]

    def estimate(weights: Any, number: int) -> Any:
        if kind == "gauss-newton":
            return oracle.gauss_newton(weights, data(used)[0], drawn[number])
        return oracle.hutchinson(weights, *data(used), asked[number])

    want, curvature = oracle.sophia(
        start,
        lambda weights: oracle.mlp_gradient(weights, *data(batch)),
        estimate,
        steps=30,
        lr=0.02,
        betas=(0.9, 0.8),
        gamma=0.7,
        eps=1e-4,
        wd=0.1,
        every=every,
    )
    for name, weights in numbers(model).items():
        np.testing.assert_allclose(weights, want[name], rtol=0, atol=1e-9)
        np.testing.assert_allclose(kept(step.update, "curvature")[name], curvature[name], rtol=0, atol=1e-9)


def _in_order(model: nn.Module, step: Step) -> list[list[Tensor]]:
    """The directions of each estimate, in the order of the model's parameters (the optimizer's is by group)."""
    names = list(kept(step.update, "curvature"))
    assert isinstance(step.probe, Recording)
    by_name = [dict(zip(names, us, strict=True)) for us in step.probe.asked]
    return [[us[name] for name, _ in model.named_parameters()] for us in by_name]


def estimate_of(function: Any, point: Tensor, directions: Any, seed: int = 0) -> Tensor:
    model: Any = Point(point)
    batch = toy.batch(1, 2, 5)
    found = hutchinson(Probe(model, Formula(function=function), seed=seed), batch, [model.point], directions)
    assert found is not None
    return found[0]


def test_signs_give_a_diagonal_hessian_exactly() -> None:
    diagonal = torch.linspace(-3, 1000, 12, dtype=torch.float64)
    found = estimate_of(lambda x: (diagonal * x * x).sum() / 2, torch.ones(12, dtype=torch.float64), "rademacher")
    torch.testing.assert_close(found, diagonal, rtol=1e-12, atol=0)


@pytest.mark.parametrize("directions", ["gaussian", "rademacher"])
def test_the_mean_of_20000_draws_is_the_diagonal(directions: str) -> None:
    """Every row of the point is a copy of the problem with directions of its own."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(20, 20, generator=generator, dtype=torch.float64)
    matrix = (half + half.T) / 2
    copies = torch.zeros(20_000, 20, dtype=torch.float64)
    found = estimate_of(lambda x: ((x @ matrix) * x).sum() / 2, copies, directions)
    assert float((found.mean(0) - matrix.diag()).abs().max()) < 0.15
    assert float(found.std(0).min()) > 0.5  # one draw alone is far off: the mean is what counts


def test_gauss_newton_is_the_diagonal_of_softmax_regression_on_average() -> None:
    """4000 copies of a regression (D = 5, K = 4, N = 64), each with labels of its own: mean of B g^2 against
    sum x^2 p (1 - p) / N, at most 6 % off anywhere and 2 % on average."""
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(64, 5, generator=generator, dtype=torch.float64)
    weight_KD = 0.5 * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    copies = 4000

    @dataclass(frozen=True, kw_only=True)
    class Regression(Objective):
        predicts: ClassVar[bool] = True

        def count(self, batch: Batch) -> dict[str, Tensor]:
            return {"labels": torch.tensor(64)}

        def loss(self, model: Any, batch: Batch, hidden_BTD: Tensor | None = None) -> dict[str, Component]:
            log_CNK = torch.log_softmax(torch.einsum("nd,ckd->cnk", x_ND, model.point), -1)
            return {"labels": Component(total=-log_CNK.gather(2, batch.targets_BT.view(copies, 64, 1)).sum())}

        def sampled(self, model: Any, batch: Batch, generator: torch.Generator) -> Batch:
            probs_NK = torch.softmax(x_ND @ weight_KD.T, -1)
            drawn_NC = torch.multinomial(probs_NK, copies, replacement=True, generator=generator)
            return dataclasses.replace(batch, targets_BT=drawn_NC.T.reshape(1, -1))

    model: Any = Point(weight_KD.expand(copies, 4, 5))
    found = gauss_newton(Probe(model, Regression(), seed=0), toy.batch(1, 2, 5), [model.point])
    assert found is not None
    probs_NK = torch.softmax(x_ND @ weight_KD.T, -1)
    want_KD = torch.einsum("nd,nk->kd", x_ND**2, probs_NK * (1 - probs_NK)) / 64
    error_KD = (found[0].mean(0) / want_KD - 1).abs()
    assert float(error_KD.max()) < 0.06
    assert float(error_KD.mean()) < 0.02


def test_it_equals_the_official_form_with_the_batch_size_outside() -> None:
    """Theirs: h without B, divided by rho * B * h + 1e-15, clamped at 1. Same rate, same rho."""
    model, batch = toy.model(), toy.batch(4, 12, 61)
    settings = Sophia(lr=0.01, gamma=0.05, every=1, share=1.0, betas=(0.965, 0.99), eps=1e-15, weight_decay=0.2)
    step = stepping(model, settings, [batch])
    terms = int((batch.targets_BT >= 0).sum())
    theirs, m, h = values(model), {}, {}
    for _ in range(10):
        before = kept(step.update, "curvature")
        step()
        after = kept(step.update, "curvature")
        for name, p in model.named_parameters():
            assert p.grad is not None
            squared = (after[name] - 0.99 * before.get(name, torch.zeros_like(p))) / 0.01 / terms  # their g^2
            m[name] = 0.965 * m.get(name, torch.zeros_like(p)) + (1 - 0.965) * p.grad
            h[name] = 0.99 * h.get(name, torch.zeros_like(p)) + (1 - 0.99) * squared
            decay = 0.2 if p.ndim >= 2 and name != "embed.weight" else 0.0
            ratio = (m[name].abs() / (0.05 * terms * h[name] + 1e-15)).clamp(max=1)
            theirs[name] = theirs[name] * (1 - 0.01 * decay) - 0.01 * m[name].sign() * ratio
            torch.testing.assert_close(p.detach(), theirs[name], rtol=0, atol=1e-6)


# --- the paper's toy -----------------------------------------------------------------------------------------------


def bowl(x: Tensor) -> Tensor:
    """A sharp coordinate in a bowl that is not convex, with curvature about 1000 at its minimum, and a flat one."""
    a, b = x[0], x[1]
    return 100 * (a - 1) ** 2 * (1.3 * a**2 + 2 * a + 1) + (b - 4) ** 2 / 2


def steps_to(update: Any, model: Any, batch: Batch, most: int) -> float:
    """Steps until the loss is 1e-3 or less and stays so up to the last of `most` steps."""
    objective = Formula(function=bowl)
    probe = Probe(model, objective, seed=0)
    above = 0
    for number in range(1, most + 1):
        model.zero_grad()
        loss = bowl(model.point)
        loss.backward()
        if not loss.isfinite():
            return math.inf
        if loss > 1e-3:
            above = number
        probe.batch = batch
        update.step(probe)
    return math.inf if above == most else above


class Signs(torch.optim.SGD):
    """SGD on the gradient's sign."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.sign_()
        super().step()


@pytest.mark.slow
def test_on_a_steep_and_a_flat_coordinate_it_needs_fewer_steps_than_tuned_adam_and_signs() -> None:
    batch = toy.batch(1, 2, 5)
    rates = [3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]

    def best(make: Any) -> float:
        found = []
        for rate in rates:
            model: Any = Point(torch.tensor([0.1, 0.0], dtype=torch.float64))
            found.append(steps_to(make(model, rate), model, batch, 150))
        return min(found)

    def torchs(kind: Any, **more: Any) -> Any:
        def make(model: Any, rate: float) -> Update:
            return TorchUpdate([kind([{"params": [model.point], "names": ["point"]}], lr=rate, **more)])

        return make

    settings: dict[str, Any] = {"estimator": "hutchinson", "directions": "rademacher", "weight_decay": 0.0}
    ours = best(lambda model, rate: Sophia(lr=rate, gamma=1.0, every=1, betas=(0.0, 0.0), **settings).build(model))
    adam = min(best(torchs(torch.optim.Adam, betas=betas)) for betas in ((0.9, 0.95), (0.5, 0.9)))
    signs = best(torchs(Signs))
    assert math.isfinite(adam)
    assert ours < adam
    assert ours < signs
