"""MegaScale's model: the parallel block and the window against their formulas, with and without a cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lmworks.core.errors import RecipeError
from lmworks.model import ops
from lmworks.model.backbone import Backbone
from lmworks.model.cache import room_for
from lmworks.model.decoder import DecoderConfig
from tests.oracles import formulas
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
    assert theirs.activation_bytes_per_token - ours.activation_bytes_per_token == 3 * (2 * 8 + 1) * 4


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
    table = {"use": "decoder", "n_layers": 1, "hidden_size": 8, "n_heads": 2, "ffn_size": 12, "sliding_window": window}
    with pytest.raises(RecipeError, match=r"sliding_window.*greater than or equal to 1"):
        toy.recipe(tmp_path, tmp_path, model=table)
    with pytest.raises(RecipeError, match="a token sees at least itself: give 1 or more"):
        dataclasses.replace(SMALL, sliding_window=window).build()
