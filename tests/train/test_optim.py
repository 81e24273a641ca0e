"""The plain optimizers against their formulas, their groups, and their state by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmworks.core.errors import CheckpointError
from lmworks.train.objective import CrossEntropy
from lmworks.train.optim import SGD, AdamW, Lion, Muon, PlainOptimizer, parameter_groups
from lmworks.train.probe import Probe
from lmworks.train.slots import Update
from tests.oracles import optim as oracle


class Toy(nn.Module):
    """Names as a decoder has them: a table, a norm, hidden matrices, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.blocks = nn.ModuleDict({"0": nn.Linear(6, 6)})
        self.norm = nn.LayerNorm(6, bias=False)
        self.head = nn.Linear(6, 7, bias=False)


def toy(seed: int = 0) -> Toy:
    torch.manual_seed(seed)
    return Toy().double()


def gradients(model: nn.Module, steps: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters()}
        for _ in range(steps)
    ]


def run(model: nn.Module, update: Update, grads: list[dict[str, Tensor]]) -> None:
    probe = Probe(model, CrossEntropy(), seed=0)
    for step in grads:
        for name, parameter in model.named_parameters():
            parameter.grad = step[name].clone()
        update.step(probe)


CASES: list[tuple[PlainOptimizer, Any, dict[str, Any]]] = [
    (AdamW(lr=0.01, betas=(0.8, 0.9), weight_decay=0.1), oracle.adamw, {"betas": (0.8, 0.9), "eps": 1e-8}),
    (Lion(lr=0.01, betas=(0.8, 0.9), weight_decay=0.1), oracle.lion, {"betas": (0.8, 0.9)}),
    (SGD(lr=0.01, momentum=0.9, weight_decay=0.1), oracle.sgd, {"momentum": 0.9}),
]


@pytest.mark.parametrize(("settings", "formula", "extra"), CASES, ids=["adamw", "lion", "sgd"])
def test_five_steps_equal_the_formula(settings: PlainOptimizer, formula: Any, extra: dict[str, Any]) -> None:
    model = toy()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    grads = gradients(model, 5)
    run(model, settings.build(model), grads)
    for name, parameter in model.named_parameters():
        decay = 0.1 if parameter.ndim >= 2 and not name.startswith("embed") else 0.0
        want = formula(before[name], [g[name] for g in grads], lr=0.01, wd=decay, **extra)
        torch.testing.assert_close(parameter.detach(), want, rtol=1e-10, atol=1e-12)


def test_norms_and_biases_are_never_decayed_and_tables_only_when_asked() -> None:
    decayed, plain = parameter_groups(toy(), 0.1, decay_embeddings=False)
    assert decayed["names"] == ["blocks.0.weight", "head.weight"]
    assert plain["names"] == ["embed.weight", "blocks.0.bias", "norm.weight"]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    decayed, _ = parameter_groups(toy(), 0.1, decay_embeddings=True)
    assert "embed.weight" in decayed["names"]


def test_frozen_parameters_are_in_no_group() -> None:
    model = toy()
    model.head.weight.requires_grad_(False)
    assert all("head.weight" not in group["names"] for group in parameter_groups(model, 0.1, decay_embeddings=True))


def test_muon_moves_hidden_matrices_along_nearly_orthogonal_directions() -> None:
    model = toy().float()
    before = model.blocks["0"].weight.detach().clone()
    update = Muon(lr=0.1, weight_decay=0.0).build(model)
    run(model, update, gradients(model, 1))
    moved = (before - model.blocks["0"].weight.detach()) / (0.1 * 0.2 * 6**0.5)
    singular = torch.linalg.svdvals(moved)
    assert float(singular.min()) > 0.6
    assert float(singular.max()) < 1.4


OPTIMIZERS = [AdamW(lr=0.01), Lion(lr=0.01), SGD(lr=0.01), Muon(lr=0.01)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("settings", OPTIMIZERS, ids=lambda s: type(s).__name__)
def test_state_by_name_goes_on_bitwise(settings: PlainOptimizer, device: str) -> None:
    """From tensors on the CPU, as checkpoints give them; torch's fused kernels keep their count beside the weights."""
    whole, first = toy().to(device), toy().to(device)
    grads = [{name: grad.to(device) for name, grad in step.items()} for step in gradients(whole, 6)]
    run(whole, settings.build(whole), grads)
    update = settings.build(first)
    run(first, update, grads[:3])
    state = {name: value.cpu().clone() for name, value in update.state().items()}
    second = toy().to(device)
    second.load_state_dict(first.state_dict())
    resumed = settings.build(second)
    resumed.load(state)
    run(second, resumed, grads[3:])
    for (name, a), (_, b) in zip(whole.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_rate_is_the_settings_rate_times_the_factor() -> None:
    update = AdamW(lr=0.5).build(toy())
    assert update.set_lr(0.25) == 0.125
    assert update.set_lr(1.0) == 0.5


def stepped(optimizer: PlainOptimizer, model: nn.Module) -> Update:
    update = optimizer.build(model)  # type: ignore[arg-type]  # any module has parameters
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    update.step(None)  # type: ignore[arg-type]  # plain optimizers ask nothing
    return update


@pytest.mark.parametrize("other", [AdamW(lr=0.1), SGD(lr=0.1), SGD(lr=0.1, momentum=0.0), Lion(lr=0.1), Muon(lr=0.1)])
def test_the_state_of_another_optimizer_is_refused(other: PlainOptimizer) -> None:
    def network() -> nn.Module:
        return nn.ModuleDict({"blocks": nn.Linear(3, 2), "norm": nn.Linear(2, 2, bias=False)})

    for optimizer in (AdamW(lr=0.1), Lion(lr=0.1), SGD(lr=0.1)):
        state = stepped(optimizer, network()).state()
        update = other.build(network())  # type: ignore[arg-type]  # any module has parameters
        if type(optimizer) is type(other) and (not isinstance(other, SGD) or other.momentum):
            update.load(state)
            assert update.state().keys() == state.keys()
            with pytest.raises(CheckpointError, match=r"blocks\.bias has nothing there"):
                update.load({name: value for name, value in state.items() if not name.startswith("blocks.bias/")})
            with pytest.raises(CheckpointError, match="holds more, which this one does not train"):
                update.load({**state, "more/step": torch.zeros(())})
        else:
            with pytest.raises(CheckpointError, match="another optimizer"):
                update.load(state)
