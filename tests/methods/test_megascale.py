"""LAMB against its formula, and whole runs with MegaScale's model and optimizer."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lmworks.core import recipe as recipes
from lmworks.core.errors import RecipeError
from lmworks.core.journal import rows
from lmworks.methods.megascale import Lamb, LambOptimizer, lamb_groups, trust_ratios
from lmworks.model.checkpoint import complete
from lmworks.train import save
from lmworks.train.objective import CrossEntropy
from lmworks.train.optim import AdamW
from lmworks.train.probe import Probe
from lmworks.train.slots import Update
from tests.oracles.lamb import lamb
from tests.train import toy

# --- LAMB ------------------------------------------------------------------------------------------------------------


class Named(nn.Module):
    """Names as a decoder has them: a table, a hidden layer with bias, a norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.blocks = nn.ModuleDict({"0": nn.Linear(6, 5), "1": nn.Linear(5, 6)})
        self.norm = nn.LayerNorm(6, bias=False)
        self.head = nn.Linear(6, 7, bias=False)


def named(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return Named().to(dtype)


def gradients(model: nn.Module, steps: int, seed: int = 5) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in model.named_parameters()}
        for _ in range(steps)
    ]


def run(model: nn.Module, update: Update, grads: list[dict[str, Tensor]]) -> list[dict[str, float]]:
    """Make the steps; gives what was noted at each."""
    probe = Probe(model, CrossEntropy(), seed=0)  # type: ignore[arg-type]
    noted = []
    for step in grads:
        for name, parameter in model.named_parameters():
            if name in step:
                parameter.grad = step[name].to(parameter.dtype)
        probe.begin()
        update.step(probe)
        noted.append(probe.notes())
    return noted


ADAPTED = ("blocks.0.weight", "blocks.1.weight", "head.weight")


@pytest.mark.parametrize("steps", [1, 30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bounds", [None, (0.5, 1.5)])
def test_lamb_is_the_formula(steps: int, dtype: torch.dtype, bounds: tuple[float, float] | None) -> None:
    model = named(dtype)
    before = {n: p.detach().clone().numpy() for n, p in model.named_parameters()}
    grads = gradients(model, steps)
    rule: dict[str, Any] = {"betas": (0.8, 0.9), "eps": 1e-6}
    made = Lamb(lr=0.01, plain_lr=0.003, weight_decay=0.1, norm_bounds=bounds, **rule).build(model)
    noted = run(model, made, grads)
    last = []
    for name, parameter in model.named_parameters():
        adapts = name in ADAPTED
        given = [step[name].to(dtype).numpy() for step in grads]
        extra = {"adapts": adapts, "decay": 0.1 if adapts else 0.0, "lr": 0.01 if adapts else 0.003}
        want, ratios = lamb(before[name], given, bounds=bounds, **rule, **extra)
        np.testing.assert_allclose(parameter.detach().numpy(), want, rtol=1e-6, atol=1e-6)
        last += ratios[-1:] if adapts else []
    assert noted[-1] == {
        "lamb/trust_ratio_mean": pytest.approx(sum(last) / 3, rel=1e-5),
        "lamb/trust_ratio_min": pytest.approx(min(last), rel=1e-5),
        "lamb/trust_ratio_max": pytest.approx(max(last), rel=1e-5),
    }


@settings(max_examples=20)
@given(lr=st.floats(1e-4, 0.5), scale=st.sampled_from([1e-3, 1.0, 1e3]), seed=st.integers(0, 1000))
def test_a_matrix_moves_by_the_rate_times_its_length_whatever_the_scale_of_gradients(
    lr: float, scale: float, seed: int
) -> None:
    model = named()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    grads = [{name: scale * g for name, g in step.items()} for step in gradients(model, 1, seed)]
    run(model, Lamb(lr=lr, eps=1e-12).build(model), grads)
    for name in ADAPTED:
        moved = (model.get_parameter(name).detach() - before[name]).norm() / before[name].norm()
        assert float(moved) == pytest.approx(lr, rel=1e-9)


def test_a_tensor_of_zeros_and_a_direction_of_zeros_have_ratio_one() -> None:
    model = named()
    with torch.no_grad():
        model.head.weight.zero_()
    grads = gradients(model, 1)
    grads[0]["blocks.0.weight"].zero_()
    before = model.blocks["0"].weight.detach().clone()
    noted = run(model, Lamb(lr=0.01, weight_decay=0.0).build(model), grads)
    want = -0.01 * torch.sign(grads[0]["head.weight"])  # m_hat / sqrt(v_hat) of the first step
    torch.testing.assert_close(model.head.weight.detach(), want, rtol=1e-3, atol=0)
    assert torch.equal(model.blocks["0"].weight, before)
    assert all(math.isfinite(value) for value in noted[0].values())
    bounded = trust_ratios(torch.tensor([0.0, 2.0, 2.0]), torch.tensor([3.0, 0.0, 4.0]), (0.5, 1.0))
    assert bounded.tolist() == [1.0, 1.0, 0.25]


def test_with_every_ratio_one_lamb_is_adamw() -> None:
    ours, theirs = named(), named()
    grads = gradients(ours, 20)
    noted = run(ours, Lamb(lr=0.01, eps=1e-8, trust_ratio=False).build(ours), grads)
    run(theirs, AdamW(lr=0.01).build(theirs), grads)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=name)
    assert noted == [{}] * 20


def test_vectors_never_have_a_ratio_and_tables_only_when_asked() -> None:
    def kinds(made: Lamb) -> dict[str, tuple[bool, float, float]]:
        groups = lamb_groups(named(), made)
        return {n: (g["adapts"], g["weight_decay"], g["lr"]) for g in groups for n in g["names"]}

    found = kinds(Lamb(lr=0.02, plain_lr=0.003))
    assert {name for name, (adapts, _, _) in found.items() if adapts} == set(ADAPTED)
    assert {name for name, (_, decay, _) in found.items() if decay} == set(ADAPTED)
    assert {rate for adapts, _, rate in found.values() if adapts} == {0.02}
    assert {rate for adapts, _, rate in found.values() if not adapts} == {0.003}
    assert kinds(Lamb(lr=0.02))["norm.weight"] == (False, 0.0, 0.02)
    assert kinds(Lamb(lr=0.02, plain_lr=0.003, adapt_embeddings=True))["embed.weight"] == (True, 0.0, 0.02)
    assert kinds(Lamb(lr=0.02, plain_lr=0.003, decay_embeddings=True))["embed.weight"] == (False, 0.1, 0.003)


def test_a_model_of_vectors_alone_is_trained_without_a_ratio() -> None:
    model = nn.Sequential(nn.LayerNorm(4))
    noted = run(model, Lamb(lr=0.1).build(model), gradients(model, 1))
    assert noted == [{}]
    assert float((model[0].weight.detach() - 1).abs().min()) == pytest.approx(0.1, rel=1e-3)


def test_frozen_parameters_are_in_no_group_and_idle_ones_stay() -> None:
    model = named()
    model.head.weight.requires_grad_(False)
    update = Lamb(lr=0.1).build(model)
    before = model.blocks["1"].weight.detach().clone()
    grads = gradients(model, 2)
    run(model, update, [{n: g for n, g in step.items() if n.startswith("blocks.0")} for step in grads])
    assert torch.equal(model.blocks["1"].weight, before)
    assert {name.rpartition("/")[0] for name in update.state()} == {"blocks.0.weight", "blocks.0.bias"}


def test_the_rate_is_that_of_the_matrices() -> None:
    update = Lamb(lr=0.5, plain_lr=0.125).build(named())
    assert update.set_lr(0.25) == 0.125


def test_state_is_float32_for_parameters_in_bfloat16() -> None:
    model = named(torch.bfloat16)
    update = Lamb(lr=0.01).build(model)
    run(model, update, gradients(model, 2))
    assert {value.dtype for value in update.state().values()} == {torch.float32}
    assert all(bool(p.isfinite().all()) and p.dtype == torch.bfloat16 for p in model.parameters())


def test_state_by_name_goes_on_bitwise() -> None:
    made = Lamb(lr=0.01, plain_lr=0.002)
    whole, first, second = named(torch.float32), named(torch.float32), named(torch.float32)
    grads = gradients(whole, 6)
    run(whole, made.build(whole), grads)
    update = made.build(first)
    run(first, update, grads[:3])
    second.load_state_dict(first.state_dict())
    resumed = made.build(second)
    resumed.load({name: value.clone() for name, value in update.state().items()})
    run(second, resumed, grads[3:])
    for (name, a), (_, b) in zip(whole.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_ratios_are_forgotten_when_a_step_has_none() -> None:
    model = named()
    made = Lamb(lr=0.01)
    optimizer = LambOptimizer(lamb_groups(model, made), made)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.ratios_K is not None
    assert optimizer.ratios_K.shape == (3,)
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.ratios_K is None


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"norm_bounds": [2.0, 1.0]}, "write the smaller one first"),
        ({"norm_bounds": [0.0, 1.0], "trust_ratio": False}, "has no effect with trust_ratio = false"),
        ({"norm_bounds": [0.0, 0.0]}, "greater than 0"),
        ({"betas": [0.9, 1.0]}, "less than 1"),
        ({"plain_lr": 0.0}, "greater than 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(over: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        toy.recipe(tmp_path, tmp_path, optimizer={"use": "lamb", "lr": 0.01, **over})
    assert words in str(caught.value)


# --- whole runs ------------------------------------------------------------------------------------------------------

MODEL = {"use": "decoder", "n_layers": 2, "hidden_size": 32, "n_heads": 2, "n_kv_heads": 1, "ffn_size": 48}
TOGETHER: dict[str, Any] = {
    "model": {**MODEL, "parallel_block": True, "sliding_window": 8},
    "optimizer": {"use": "lamb", "lr": 0.03, "plain_lr": 0.01},
    "micro_batch_size": 3,
}


def learned(path: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock or the machine says."""
    keep = {"step", "tokens", "loss", "grad_norm", "val_loss", "lr"}
    return [{k: v for k, v in row.items() if k in keep or k.startswith("lamb/")} for row in rows(path)]


def test_a_run_with_all_three_learns_and_a_resumed_one_is_the_same(text: Path, cache: Path, tmp_path: Path) -> None:
    made = toy.recipe(text, cache, **TOGETHER, steps=24)
    whole, _ = toy.train(made, tmp_path / "whole")
    steps = [row for row in rows(whole.metrics) if "loss" in row]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert all(
        row["lamb/trust_ratio_min"] <= row["lamb/trust_ratio_mean"] <= row["lamb/trust_ratio_max"] for row in steps
    )
    middle = complete(whole.checkpoints)[0]
    at = int(re.findall(r"\d+", middle.name)[-1])
    assert 0 < at < 24
    again, _ = toy.train(made, tmp_path / "again", resume=str(middle))
    assert learned(again.metrics) == [row for row in learned(whole.metrics) if row["step"] > at]
    ours, theirs = (save.read(complete(folder.checkpoints)[-1]).tensors for folder in (again, whole))
    for kind in ("model", "optimizer"):
        assert ours[kind].keys() == theirs[kind].keys()
        assert all(torch.equal(ours[kind][name], theirs[kind][name]) for name in ours[kind]), kind


@pytest.mark.parametrize("change", ["parallel_block", "sliding_window", "lamb"])
def test_each_change_trains_on_its_own(change: str, text: Path, cache: Path, tmp_path: Path) -> None:
    over: dict[str, Any] = {"optimizer": TOGETHER["optimizer"]}
    if change != "lamb":
        over = {"model": {**MODEL, change: TOGETHER["model"][change]}}
    folder, _ = toy.train(toy.recipe(text, cache, **over), tmp_path / "run")
    steps = [row["loss"] for row in rows(folder.metrics) if "loss" in row]
    assert steps[-1] < steps[0]


def test_the_shipped_recipe_has_all_three() -> None:
    made = recipes.load("methods/megascale", verb="train")
    assert made.model.parallel_block
    assert made.model.sliding_window < made.data.sequence_length
    assert isinstance(made.optimizer, Lamb)
