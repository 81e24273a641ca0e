"""MegaScale's model and optimizer: parallel block, window and LAMB against their formulas; whole runs; refusals."""

from __future__ import annotations

import dataclasses
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
from lmworks.model import ops
from lmworks.model.backbone import Backbone
from lmworks.model.cache import room_for
from lmworks.model.decoder import DecoderConfig
from lmworks.train import save
from lmworks.train.objective import CrossEntropy
from lmworks.train.optim import AdamW
from lmworks.train.probe import Probe
from lmworks.train.slots import Update
from tests.oracles import formulas
from tests.oracles.lamb import lamb
from tests.train import toy

V = 23
SMALL = DecoderConfig(vocab_size=V, n_layers=1, hidden_size=8, n_heads=2, n_kv_heads=1, ffn_size=12, tied=True)
PARALLEL = dataclasses.replace(SMALL, parallel_block=True)


def built(config: DecoderConfig, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Backbone:
    """A decoder with values large enough for decided answers, norms moved off 1."""
    model: Backbone = config.build(dtype=dtype, param_dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_((1.0 if parameter.ndim == 1 else 0.0) + 0.4 * noise)
    return model


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(seed))


# --- the parallel block ----------------------------------------------------------------------------------------------


def block_by_formula(model: Backbone, x_BTD: Tensor, *, with_ffn: bool = True) -> Tensor:
    """x + (attn(n) + ffn(n)), n = norm(x), token by token and in float64; `model` has one block."""
    held = {name: p.detach().double() for name, p in model.blocks["0"].named_parameters()}
    config = model.config
    assert isinstance(config, DecoderConfig)
    sizes = config.blocks()[0]
    n_BTD = formulas.rms_norm(x_BTD, held["attn_norm.weight"], config.norm_eps)
    q, k, v = (
        (n_BTD @ held[f"attn.{name}_proj.weight"].T).unflatten(-1, (-1, sizes.head_dim)) for name in ("q", "k", "v")
    )
    turns = formulas.frequencies(config.rope_theta, sizes.head_dim)
    places = torch.arange(x_BTD.shape[1])[None]
    q, k = formulas.rope(q, places, turns), formulas.rope(k, places, turns)
    mixed = formulas.attention(q, k, v, sizes.window, None).flatten(2) @ held["attn.o_proj.weight"].T
    if not with_ffn:
        return x_BTD + mixed
    ffn = formulas.swiglu_ffn(n_BTD, *(held[f"ffn.{name}_proj.weight"] for name in ("gate", "up", "down")))
    return x_BTD + (mixed + ffn)


def after_block(model: Backbone, read_BT: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into the only block, and what comes out of it."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.blocks["0"].register_forward_hook(lambda _, given, made: seen.append((given[0], made)))
    model(read_BT)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_parallel_block_is_the_formula(dtype: torch.dtype, window: int | None) -> None:
    model = built(dataclasses.replace(PARALLEL, sliding_window=window), dtype=dtype)
    given_BTD, made_BTD = after_block(model, tokens(2, 9))
    want_BTD = block_by_formula(model, given_BTD.double())
    torch.testing.assert_close(made_BTD.double(), want_BTD, rtol=1e-6, atol=1e-6)


def test_a_serial_block_is_another_function() -> None:
    serial, parallel = built(SMALL), built(PARALLEL)
    parallel.load_state_dict({n: w for n, w in serial.state_dict().items() if "ffn_norm" not in n})
    read_BT = tokens(1, 9)
    assert float((serial(read_BT) - parallel(read_BT)).detach().abs().max()) > 0.01


def test_without_its_feed_forward_layer_a_parallel_block_is_attention_alone() -> None:
    model = built(PARALLEL)
    with torch.no_grad():
        model.get_parameter("blocks.0.ffn.down_proj.weight").zero_()
    given_BTD, made_BTD = after_block(model, tokens(2, 9))
    want_BTD = block_by_formula(model, given_BTD, with_ffn=False)
    torch.testing.assert_close(made_BTD, want_BTD, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("plain", [False, True], ids=["own forms", "plain forms"])
def test_gradients_of_a_windowed_parallel_block_are_difference_quotients(plain: bool) -> None:
    model = built(dataclasses.replace(PARALLEL, sliding_window=3))
    read_BT = tokens(1, 6)
    weight_BTD = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss() -> Tensor:
        if not plain:
            return (model(read_BT) * weight_BTD).sum()
        with ops.plain_forms():
            return (model(read_BT) * weight_BTD).sum()

    loss().backward()
    for name, parameter in model.named_parameters():
        flat, found = parameter.data.view(-1), parameter.grad
        assert found is not None, name
        for index in range(0, flat.numel(), 7):
            before, step = float(flat[index]), 1e-6
            sides = []
            for value in (before + step, before - step):
                flat[index] = value
                sides.append(float(loss().detach()))
            flat[index] = before
            quotient = (sides[0] - sides[1]) / (2 * step)
            assert float(found.view(-1)[index]) == pytest.approx(quotient, rel=1e-5, abs=1e-7), (name, index)


def test_a_parallel_block_has_one_norm_and_costs_the_same_products() -> None:
    shape = dataclasses.replace(SMALL, n_layers=3)
    parallel = dataclasses.replace(shape, parallel_block=True)
    ours, theirs = parallel.cost(sequence=32), shape.cost(sequence=32)
    names = {name for name, _ in parallel.build(device="meta").named_parameters()}
    assert names == {name for name, _ in parallel.shapes()}
    assert [name for name in names if "ffn_norm" in name] == []
    assert theirs.parameters - ours.parameters == 3 * 8
    assert ours.forward_flops_per_token == theirs.forward_flops_per_token
    assert theirs.activation_bytes_per_token - ours.activation_bytes_per_token == 3 * 2 * 8 * 4


# --- the window ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [9, 10, 1000])
@pytest.mark.parametrize("parallel", [False, True])
def test_a_window_as_long_as_the_text_changes_nothing(window: int, parallel: bool) -> None:
    shape = dataclasses.replace(SMALL, n_layers=2, parallel_block=parallel)
    model, windowed = built(shape), built(dataclasses.replace(shape, sliding_window=window))
    read_BT = tokens(2, 9)
    assert torch.equal(windowed(read_BT), model(read_BT))
    model(read_BT).sum().backward()
    windowed(read_BT).sum().backward()
    for (name, a), (_, b) in zip(model.named_parameters(), windowed.named_parameters(), strict=True):
        if a.grad is not None:
            assert torch.equal(a.grad, b.grad), name  # type: ignore[arg-type]


@pytest.mark.parametrize("plain", [False, True], ids=["own forms", "plain forms"])
@pytest.mark.parametrize(("layers", "window"), [(1, 1), (1, 4), (2, 3), (3, 2)])
def test_a_token_reaches_as_far_as_the_windows_of_the_blocks(layers: int, window: int, plain: bool) -> None:
    """Another token at place j changes the outputs at j to j + layers (w - 1), each of them, and no other."""
    length, place = 14, 3
    model = built(dataclasses.replace(PARALLEL, n_layers=layers, sliding_window=window))
    read_BT = tokens(1, length)
    other_BT = read_BT.clone()
    other_BT[0, place] = (other_BT[0, place] + 1) % V

    def run(ids_BT: Tensor) -> Tensor:
        if not plain:
            return model(ids_BT)  # type: ignore[no-any-return]
        with ops.plain_forms():
            return model(ids_BT)  # type: ignore[no-any-return]

    changed = (run(read_BT) != run(other_BT)).any(-1)[0]
    reached = [place <= t <= place + layers * (window - 1) for t in range(length)]
    assert changed.tolist() == reached


@pytest.mark.parametrize("parts", [(1,) * 40, (3, 37), (25, 1, 1, 13), (2, 3, 30, 1, 1, 1, 1, 1)])
@pytest.mark.parametrize("window", [1, 4, 30])
def test_decoding_behind_a_windows_cache_gives_the_logits_of_the_whole_text(
    window: int, parts: tuple[int, ...]
) -> None:
    """Prompts shorter and longer than the window, and texts longer than the cache has room for."""
    model = built(dataclasses.replace(PARALLEL, n_layers=2, sliding_window=window), dtype=torch.float32)
    read_BT = tokens(2, 40)
    cache = model.new_cache(2, 1000)
    held = sum(block.keys.nbytes for block in cache.blocks.values())
    with torch.no_grad():
        whole = model.logits(model(read_BT))
        found = [model.logits(model(piece, cache=cache)) for piece in read_BT.split(parts, 1)]
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-5, atol=1e-5)
    assert sum(block.keys.nbytes for block in cache.blocks.values()) == held


def test_a_cache_has_room_for_little_more_than_its_window() -> None:
    assert room_for(100_000, None) == 100_000
    assert room_for(100_000, 4096) == 5120
    assert room_for(100_000, 1) == 2
    assert room_for(100, 4096) == 100


def test_a_text_longer_than_was_asked_for_still_fits() -> None:
    model = built(dataclasses.replace(SMALL, sliding_window=6))
    read_BT = tokens(1, 20)
    cache = model.new_cache(1, 4)
    with torch.no_grad():
        found = [model(piece, cache=cache) for piece in read_BT.split((3, 4, 1, 12), 1)]
        torch.testing.assert_close(torch.cat(found, 1), model(read_BT), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("length", "window"), [(8, 3), (8, 8), (8, 20), (64, 1)])
def test_the_cost_of_a_window_counts_the_scores_that_are_seen(length: int, window: int) -> None:
    shape = dataclasses.replace(SMALL, n_layers=2)
    full = shape.cost(sequence=length)
    cost = dataclasses.replace(shape, sliding_window=window).cost(sequence=length)
    seen = [len(range(max(0, t - window + 1), t + 1)) for t in range(length)]
    every = [t + 1 for t in range(length)]
    saved = 2 * 4 * 2 * 4 * (sum(every) - sum(seen)) / length  # blocks, FLOPs per score and value, heads, head_dim
    assert full.forward_flops_per_token - cost.forward_flops_per_token == pytest.approx(saved, rel=1e-12)
    assert cost.cache_bytes_per_token * length == pytest.approx(
        full.cache_bytes_per_token * min(window, length), rel=1e-12
    )


@pytest.mark.parametrize("window", [0, -3])
def test_a_window_below_one_is_refused(window: int, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"sliding_window.*greater than or equal to 1"):
        toy.recipe(tmp_path, tmp_path, model={**MODEL, "sliding_window": window})
    with pytest.raises(RecipeError, match="a token sees at least itself: give 1 or more"):
        dataclasses.replace(SMALL, sliding_window=window).build()


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


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.corpus(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def tokens_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


def learned(path: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock or the machine says."""
    keep = {"step", "tokens", "loss", "grad_norm", "val_loss", "lr"}
    return [{k: v for k, v in row.items() if k in keep or k.startswith("lamb/")} for row in rows(path)]


def test_a_run_with_all_three_learns_and_a_resumed_one_is_the_same(
    text: Path, tokens_folder: Path, tmp_path: Path
) -> None:
    made = toy.recipe(text, tokens_folder, **TOGETHER, steps=24)
    whole, _ = toy.train(made, tmp_path / "whole")
    steps = [row for row in rows(whole.metrics) if "loss" in row]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert all(
        row["lamb/trust_ratio_min"] <= row["lamb/trust_ratio_mean"] <= row["lamb/trust_ratio_max"] for row in steps
    )
    middle = save.complete(whole.checkpoints)[0]
    at = int(re.findall(r"\d+", middle.name)[-1])
    assert 0 < at < 24
    again, _ = toy.train(made, tmp_path / "again", resume=str(middle))
    assert learned(again.metrics) == [row for row in learned(whole.metrics) if row["step"] > at]
    ours, theirs = (save.read(save.complete(folder.checkpoints)[-1]).tensors for folder in (again, whole))
    for kind in ("model", "optimizer"):
        assert ours[kind].keys() == theirs[kind].keys()
        assert all(torch.equal(ours[kind][name], theirs[kind][name]) for name in ours[kind]), kind


@pytest.mark.parametrize("change", ["parallel_block", "sliding_window", "lamb"])
def test_each_change_trains_on_its_own(change: str, text: Path, tokens_folder: Path, tmp_path: Path) -> None:
    over: dict[str, Any] = {"optimizer": TOGETHER["optimizer"]}
    if change != "lamb":
        over = {"model": {**MODEL, change: TOGETHER["model"][change]}}
    folder, _ = toy.train(toy.recipe(text, tokens_folder, **over), tmp_path / "run")
    steps = [row["loss"] for row in rows(folder.metrics) if "loss" in row]
    assert steps[-1] < steps[0]


def test_the_shipped_recipe_has_all_three() -> None:
    made = recipes.load("methods/megascale", verb="train")
    assert made.model.parallel_block
    assert made.model.sliding_window < made.data.sequence_length
    assert isinstance(made.optimizer, Lamb)
