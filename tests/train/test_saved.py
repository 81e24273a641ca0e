"""What each policy keeps, byte by byte, and that it changes nothing else."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmworks.core.recipe import decode_part
from lmworks.data.load import Batch
from lmworks.model.backbone import Backbone
from lmworks.model.decoder import DecoderConfig
from lmworks.model.gpt2 import GPT2Config
from lmworks.model.init import initialise
from lmworks.model.moe import Experts
from lmworks.train.by_block import ByBlock, Rule
from lmworks.train.ledger import Ledger
from lmworks.train.objective import CrossEntropy, hidden_states
from lmworks.train.probe import twice_differentiable
from lmworks.train.saved import Keep, Offload, Recompute
from lmworks.train.slots import Saved, combined, divisors
from tests.oracles import saved as oracle
from tests.train import toy

LLAMA: dict[str, Any] = {"n_layers": 3, "hidden_size": 32, "n_heads": 4, "n_kv_heads": 2, "ffn_size": 40}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: DecoderConfig(vocab_size=61, tied=True, **LLAMA),
    "biased": lambda: DecoderConfig(vocab_size=61, qkv_bias=True, qk_norm=True, **LLAMA),
    "parallel": lambda: DecoderConfig(vocab_size=61, parallel_block=True, **LLAMA),
    "window": lambda: DecoderConfig(vocab_size=61, sliding_window=9, sliding_window_blocks=(1,), **LLAMA),
    "experts": lambda: DecoderConfig(vocab_size=61, experts=Experts(count=4, top_k=2), **LLAMA),
    "gpt2": lambda: GPT2Config(vocab_size=61, n_layers=3, hidden_size=32, n_heads=4, ffn_size=40, max_position=64),
}
POLICIES: dict[str, Saved] = {
    "keep": Keep(),
    "input": Recompute(),
    "every": Recompute(every=2),
    "products": Recompute(keep="products"),
    "by-block": ByBlock(
        rules=(Rule(blocks="0", policy=Recompute()), Rule(blocks=(2,), policy=Recompute(keep="products")))
    ),
    "host": ByBlock(rules=(Rule(blocks="-1", policy=Offload(to="host", last=0, least_bytes=0)),)),
}
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def built(model: str, kind: str = "fp32") -> Backbone:
    made: Backbone = MODELS[model]().build(
        dtype=KINDS[kind], param_dtype=torch.float64 if kind == "fp64" else torch.float32
    )
    initialise(made, 0)
    return made


def loss_of(model: Backbone, batch: Batch) -> Tensor:
    objective = CrossEntropy()
    return combined(objective.loss(model, batch), divisors(objective, batch))


def gradients(model: Backbone, batch: Batch, micros: int = 1) -> dict[str, Tensor]:
    for micro in batch.split(batch.rows // micros):
        loss_of(model, micro).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "keep"])
def test_gradients_are_those_of_keep_to_the_bit(policy: str, model: str, kind: str) -> None:
    batch = toy.batch(4, 24, 61)
    expected = gradients(built(model, kind), batch, 2)
    made, books = built(model, kind), Ledger()
    caches = POLICIES[policy].apply(made, books)
    with books.counting():
        found = gradients(made, batch, 2)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    gc.collect()
    assert books.total == 0
    for cache in caches:
        cache.close()


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "whole"])
@pytest.mark.parametrize("model", MODELS)
def test_the_books_are_what_a_walk_through_the_graph_finds(model: str, packed: bool, kind: str) -> None:
    """Block by block and in all, at the end of the forward pass."""
    batch = toy.batch(3, 24, 61, packed=packed)
    plain = built(model, kind)
    inputs: dict[str, Tensor] = {}
    for name, block in plain.blocks.items():
        block.register_forward_pre_hook(lambda module, args, name=name: inputs.update({name: args[0]}))  # type: ignore[misc]
    out = loss_of(plain, batch)
    of_all = oracle.storages([out])
    made, books = built(model, kind), Ledger()
    Keep().apply(made, books)
    with books.counting():
        loss = loss_of(made, batch)
    assert books.total == sum(of_all.values())
    assert sum(books.live.values()) == books.total
    ends = [*inputs.values()][1:]
    for name, end in zip([*inputs][:-1], ends, strict=True):
        inside = oracle.storages([end], {inputs[name].grad_fn})
        earlier = oracle.storages([inputs[name]])
        own = {address: size for address, size in inside.items() if address not in earlier}
        assert books.live[name] == sum(own.values())
    loss.backward()  # type: ignore[no-untyped-call]
    assert books.total == 0


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["llama", "parallel", "gpt2"])
@pytest.mark.parametrize("policy", ["input", "products"])
def test_the_peak_of_a_second_pass_is_the_inputs_and_one_block(policy: str, model: str, kind: str) -> None:
    batch = toy.batch(3, 24, 61)
    made, books = built(model, kind), Ledger()
    Keep().apply(made, books)
    with books.counting():
        loss = loss_of(made, batch)
    whole, entrance = dict(books.live), batch.tokens_BT.numel() * 32 * KINDS[kind].itemsize
    loss.backward()  # type: ignore[no-untyped-call]
    again, books = built(model, kind), Ledger()
    POLICIES[policy].apply(again, books)
    with books.counting():
        loss = loss_of(again, batch)
    forward = dict(books.live)
    products = sum(out.nbytes for out in linear_outputs(built(model, kind), batch, "blocks.0."))
    assert forward["0"] == entrance + (products if policy == "products" else 0)
    assert forward["0"] == forward["1"] == forward["2"]
    books.begin()
    loss.backward()  # type: ignore[no-untyped-call]
    assert books.at_peak["0"] == books.at_peak["1"] == forward["0"]
    most = whole["0"] + entrance + (products if policy == "products" else 0)  # LayerNorm keeps a wide copy of its input
    assert whole["1"] <= books.at_peak["2"] <= most
    if policy == "input" and model != "gpt2":
        assert books.at_peak["2"] == whole["0"], "one block as it is kept, and the angles' tables"


def linear_outputs(model: Backbone, batch: Batch, prefix: str) -> list[Tensor]:
    found: list[Tensor] = []
    for name, module in model.named_modules():
        if name.startswith(prefix) and isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, args, out: found.append(out))
    hidden_states(model, batch)
    return found


def test_the_books_count_every_micro_batch_in_flight() -> None:
    batches = [toy.batch(2, 24, 61, seed=seed, packed=False) for seed in range(3)]
    made, books = built("llama"), Ledger()
    Keep().apply(made, books)
    with books.counting():
        first = loss_of(made, batches[0])
        one = books.total
        others = [loss_of(made, batch) for batch in batches[1:]]
    assert books.total == books.peak == 3 * one
    for loss in (first, *others):
        loss.backward()  # type: ignore[no-untyped-call]
    books.begin()
    with books.counting():
        for batch in batches:
            loss_of(made, batch).backward()  # type: ignore[no-untyped-call]
    assert books.peak == one, "one after the other, one is in flight"


@pytest.mark.parametrize("policy", ["keep", "products"])
def test_an_edit_in_place_after_the_save_is_an_error(policy: str) -> None:
    """As in plain autograd, which does not look behind hooks."""
    made, books = built("llama"), Ledger()
    tampered: list[Tensor] = []
    projection = made.get_submodule("blocks.1.ffn.gate_proj")
    projection.register_forward_hook(lambda module, args, out: tampered.append(out))
    POLICIES[policy].apply(made, books)
    with books.counting():
        loss = loss_of(made, toy.batch(2, 24, 61))
    with torch.no_grad():
        tampered[0].mul_(2)
    with pytest.raises(RuntimeError, match=r"in block 1 .* changed in place"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_an_edit_of_a_weight_between_the_passes_is_an_error() -> None:
    made, books = built("llama"), Ledger()
    Keep().apply(made, books)
    with books.counting():
        loss = loss_of(made, toy.batch(2, 24, 61))
    with torch.no_grad():
        made.get_parameter("blocks.0.attn.o_proj.weight").mul_(2)
    with pytest.raises(RuntimeError, match=r"in block 0 .* changed in place"):
        loss.backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("policy", ["keep", "input", "products"])
def test_second_derivatives_pass_through(policy: str) -> None:
    batch = toy.batch(2, 12, 61)

    def product(made: Backbone) -> list[Tensor]:
        weights = list(made.parameters())
        with twice_differentiable():
            first = torch.autograd.grad(loss_of(made, batch), weights, create_graph=True)
            slope = torch.stack([(g * w.detach()).sum() for g, w in zip(first, weights, strict=True)]).sum()
            return list(torch.autograd.grad(slope, weights, materialize_grads=True))

    made, books = built("llama", "fp64"), Ledger()
    POLICIES[policy].apply(made, books)
    found, expected = product(made), product(built("llama", "fp64"))
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("policy", ["input", "products"])
def test_blocks_that_are_run_again_are_compiled_and_learn_the_same(policy: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    batch = toy.batch(2, 24, 61)
    expected = gradients(built("llama", "fp64"), batch)
    made = built("llama", "fp64")
    POLICIES[policy].apply(made)
    made.compile_blocks()
    found = gradients(made, batch)
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert all(torch.allclose(found[name], expected[name], rtol=1e-9, atol=1e-12) for name in expected)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("policy", ["keep", "input", "products"])
def test_the_books_see_what_compiled_blocks_keep(policy: str) -> None:
    """All of it outside of blocks: hooks do not go into compiled code, but around it."""
    torch._dynamo.reset()
    batch, made = toy.batch(2, 24, 61), built("llama", "bf16")
    POLICIES[policy].apply(made)
    made.compile_blocks()
    expected = sum(oracle.storages([loss_of(made, batch)]).values())
    books = Ledger()
    with books.counting():
        loss = loss_of(made, batch)
    assert books.total == books.live["rest"] == expected
    loss.backward()  # type: ignore[no-untyped-call]
    gc.collect()
    assert books.total == 0


def test_a_policy_is_a_part_of_a_recipe(tmp_path: Path) -> None:
    table = {
        "use": "by-block",
        "rest": "recompute",
        "rules": [{"blocks": "2-", "policy": {"use": "offload", "folders": [str(tmp_path)]}}],
    }
    rule = Rule(blocks="2-", policy=Offload(folders=(str(tmp_path),)))
    assert decode_part("saved", table) == ByBlock(rules=(rule,), rest=Recompute())
