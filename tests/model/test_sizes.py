"""Every shipped shape: its parameter count is the published one, and that of the network it builds."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter
from torch.utils.flop_counter import FlopCounterMode

from lmworks.core import catalogue
from lmworks.core.errors import RecipeError
from lmworks.core.recipe import recipes_folder
from lmworks.model import ops
from lmworks.model.decoder import DecoderConfig, Experts
from lmworks.model.gpt2 import GPT2Config
from lmworks.model.init import initialise
from lmworks.model.neox import NeoXConfig
from lmworks.model.sizes import forward_share, linear_flops, mean_keys

FILES = sorted((recipes_folder() / "sizes").glob("*.toml"))
SPARE = 2**31
"""Shapes with more parameters are counted without a network: building hundreds of meta blocks takes seconds."""
PUBLISHED = {
    "gpt2": 124_439_808,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "pythia-70m": 70_426_624,
    "pythia-12b": 11_846_072_320,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "qwen3-32b": 32_762_123_264,
    "smollm2-135m": 134_515_008,
    "smollm2-1.7b": 1_711_376_384,
}


def load(file: Path) -> DecoderConfig | GPT2Config | NeoXConfig:
    table = tomllib.loads(file.read_text())
    config = TypeAdapter(catalogue.resolve(catalogue.shelf("model").parts[table.pop("use")].path)).validate_python(
        table
    )
    assert isinstance(config, DecoderConfig | GPT2Config | NeoXConfig)
    return config if config.vocab_size is not None else config.with_vocab(4096)


BUILT = [file for file in FILES if load(file).cost(sequence=1).parameters < SPARE]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_count_in_the_comment_is_the_count_of_the_shape(file: Path) -> None:
    stated = re.search(r"^# ([\d,]+) parameters", file.read_text(), re.MULTILINE)
    assert stated is not None
    count = load(file).cost(sequence=1024).parameters
    assert count == int(stated[1].replace(",", ""))
    assert count == PUBLISHED.get(file.stem, count)


def test_every_published_shape_is_there() -> None:
    assert set(PUBLISHED) <= {file.stem for file in FILES}
    assert len(FILES) == 33


@pytest.mark.parametrize("file", BUILT, ids=lambda file: file.stem)
def test_shapes_are_those_of_the_network(file: Path) -> None:
    config = load(file)
    model = config.build(device="meta")
    assert dict(config.shapes()) == {name: tuple(p.shape) for name, p in model.named_parameters()}


def small(family: str) -> DecoderConfig | GPT2Config | NeoXConfig:
    if family == "gpt2":
        return GPT2Config(vocab_size=257, n_layers=2, hidden_size=32, n_heads=4, ffn_size=48, max_position=64)
    if family == "neox":
        return NeoXConfig(vocab_size=257, n_layers=2, hidden_size=32, n_heads=4, ffn_size=48, rotary_pct=0.5)
    return DecoderConfig(
        vocab_size=257,
        n_layers=2,
        hidden_size=32,
        n_heads=(4, 2),
        n_kv_heads=(2, 1),
        head_dim=8,
        ffn_size=(48, 24),
        qkv_bias=True,
        qk_norm=True,
        tied=family == "tied",
    )


@pytest.mark.parametrize("family", ["decoder", "tied", "gpt2", "neox"])
def test_forward_flops_are_those_that_torch_counts(family: str) -> None:
    config = small(family)
    length = 16
    model = config.build(device="meta")
    with FlopCounterMode(display=False) as counter:
        model.logits(model(torch.zeros(2, length, dtype=torch.int64, device="meta")))
    counted = counter.get_total_flops() / (2 * length)
    cost = config.cost(sequence=length)
    # torch counts the whole square of attention, we the half that a causal token sees: (T + 1) / 2 keys of T.
    square = sum(4 * block.n_heads * block.head_dim * length for block in config.blocks())
    seen = sum(4 * block.n_heads * block.head_dim * (length + 1) / 2 for block in config.blocks())
    assert cost.forward_flops_per_token == pytest.approx(counted - square + seen, rel=1e-12)
    assert cost.train_flops_per_token == 3 * cost.forward_flops_per_token


def test_forward_flops_of_experts_are_those_that_torch_counts() -> None:
    config = DecoderConfig(
        vocab_size=257,
        n_layers=3,
        hidden_size=32,
        n_heads=4,
        ffn_size=48,
        experts=Experts(count=6, top_k=2, size=16, shared_size=24, first_dense=1),
    )
    length, model = 16, config.build()
    initialise(model, 0)
    by_formula = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # torch counts no kernel of a CPU
    with ops.plain_forms(), by_formula, FlopCounterMode(display=False) as counter:
        model.logits(model(torch.zeros(2, length, dtype=torch.int64)))
    counted = counter.get_total_flops() / (2 * length)
    cost = config.cost(sequence=length)
    square, seen = (3 * 4 * 32 * keys for keys in (length, (length + 1) / 2))
    assert cost.forward_flops_per_token == pytest.approx(counted - square + seen, rel=1e-12)
    assert cost.idle_parameters == 2 * (6 - 2) * 3 * 16 * 32
    assert cost.active_parameters == cost.parameters - cost.idle_parameters
    assert dataclasses.replace(config, experts=None).cost(sequence=length).idle_parameters == 0


def test_the_share_of_the_last_blocks_counts_the_experts_that_run() -> None:
    config = DecoderConfig(
        vocab_size=64, n_layers=2, hidden_size=32, n_heads=4, ffn_size=48, experts=Experts(count=8, top_k=2)
    )
    cost = config.cost(sequence=16)
    assert forward_share(config, start=0, sequence=16) == pytest.approx(1.0)
    half = (cost.forward_flops_per_token - 2 * 64 * 32) / 2
    assert forward_share(config, start=1, sequence=16) == pytest.approx(1 - half / cost.forward_flops_per_token)


@pytest.mark.parametrize(("length", "window"), [(7, None), (7, 1), (7, 3), (7, 7), (7, 9)])
def test_mean_keys_counts_what_a_token_sees(length: int, window: int | None) -> None:
    seen = [min(t + 1, window or length) for t in range(length)]
    assert mean_keys(length, window) == pytest.approx(sum(seen) / length, rel=1e-12)


@pytest.mark.parametrize("name", ["decoder", "tied"])
def test_linear_work_of_the_blocks_the_head_and_attention_are_all_work(name: str) -> None:
    config = small(name)
    attention = sum(4.0 * block.n_heads * block.head_dim for block in config.blocks())  # a token that sees itself
    whole = config.n_layers * linear_flops(config) + 2.0 * config.vocab_size * config.hidden_size + attention
    assert config.cost(sequence=1).forward_flops_per_token == whole


def test_tied_head_is_counted_once_and_multiplies() -> None:
    tied, untied = small("tied").cost(sequence=8), small("decoder").cost(sequence=8)
    assert untied.parameters - tied.parameters == 257 * 32
    assert untied.forward_flops_per_token == tied.forward_flops_per_token


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_heads": 4, "n_kv_heads": 3}, "the nearest number that does is 2"),
        ({"n_heads": (4, 4, 4)}, "has 3 entries for n_layers = 2"),
        ({"n_heads": 5}, "do not divide hidden_size = 32; use 4 heads"),
        ({"n_heads": (4, 2)}, "must be given when n_heads differs"),
        ({"n_heads": 4, "head_dim": 7}, "use 8"),
        ({"n_heads": 4, "sliding_window_blocks": (0,)}, "has no effect without sliding_window"),
        ({"n_heads": 4, "sliding_window": 4, "sliding_window_blocks": (2,)}, "the last is 1"),
        ({"n_heads": 4, "experts": {"count": 4, "top_k": 5}}, "of 4 experts; the most is 4"),
        ({"n_heads": 4, "experts": {"count": 4, "first_dense": 2}}, "no block has experts. The most is 1"),
    ],
)
def test_bad_sizes_are_refused_with_the_nearest_legal_value(settings: dict[str, object], words: str) -> None:
    config = TypeAdapter(DecoderConfig).validate_python(
        {"vocab_size": 257, "n_layers": 2, "hidden_size": 32, "ffn_size": 48, **settings}
    )
    assert any(words in problem.text for problem in config.check(None))
    with pytest.raises(RecipeError) as caught:
        config.build(device="meta")
    assert words in str(caught.value)


def test_a_shape_without_vocabulary_costs_nothing_yet() -> None:
    config = DecoderConfig(n_layers=1, hidden_size=32, n_heads=4, ffn_size=48)
    with pytest.raises(RecipeError, match="is not known yet"):
        config.cost(sequence=8)
    assert config.with_vocab(257).cost(sequence=8).parameters > 0


SMALL = {"vocab_size": 64, "hidden_size": 32, "n_heads": 4, "ffn_size": 80}
KEPT = {
    "decoder": DecoderConfig(n_layers=2, n_kv_heads=2, **SMALL),
    "parallel block": DecoderConfig(n_layers=2, n_kv_heads=2, parallel_block=True, **SMALL),
    "q/k norms": DecoderConfig(n_layers=2, n_kv_heads=2, qk_norm=True, **SMALL),
    "window": DecoderConfig(n_layers=2, n_kv_heads=2, sliding_window=40, **SMALL),
    "experts": DecoderConfig(n_layers=2, experts=Experts(count=6, top_k=2), **SMALL),
    "shared expert": DecoderConfig(n_layers=2, experts=Experts(count=4, top_k=3, size=24, shared_size=16), **SMALL),
    "gpt2": GPT2Config(n_layers=2, max_position=2048, **SMALL),
    "neox": NeoXConfig(n_layers=2, **SMALL),
    "serial neox": NeoXConfig(n_layers=2, parallel_block=False, **SMALL),
}


def kept_bytes(config: DecoderConfig | GPT2Config | NeoXConfig, length: int) -> int:
    """Bytes of all distinct storages, parameters apart, that a forward pass over one row keeps."""
    model = config.build()
    initialise(model, 0)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.arange(length)[None] % 64)
    return sum(found.values())


@pytest.mark.parametrize("length", [16, 200, 1500])
@pytest.mark.parametrize("config", KEPT.values(), ids=KEPT)
def test_activation_bytes_are_those_that_autograd_keeps(
    config: DecoderConfig | GPT2Config | NeoXConfig, length: int
) -> None:
    one = dataclasses.replace(config, n_layers=1)
    of_a_block = kept_bytes(config, length) - kept_bytes(one, length)
    assert config.cost(sequence=length).activation_bytes_per_token == pytest.approx(2 * of_a_block / length)
