"""Decoding: with the cache as without it, in a batch as alone, twice the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lmworks.core.errors import UsageError
from lmworks.generate.engine import Engine
from lmworks.generate.sampling import Sampling
from lmworks.generate.step import can_step
from lmworks.model.backbone import Backbone
from lmworks.model.decoder import DecoderConfig
from lmworks.model.gpt2 import GPT2Config
from lmworks.model.neox import NeoXConfig
from lmworks.model.rotary import RopeScaling

V = 257
DECODER = DecoderConfig(vocab_size=V, n_layers=3, hidden_size=32, n_heads=4, n_kv_heads=2, ffn_size=48)
CONFIGS: dict[str, Any] = {
    "llama": DECODER,
    "tied": replace(DECODER, tied=True),
    "qwen2": replace(DECODER, qkv_bias=True, rope_scaling=RopeScaling(original_max_position=8)),
    "qwen3": replace(DECODER, qk_norm=True, head_dim=16),
    "window": replace(DECODER, sliding_window=4),
    "some-windows": replace(DECODER, sliding_window=5, sliding_window_blocks=(1,)),
    "parallel": replace(DECODER, parallel_block=True),
    "uneven": replace(DECODER, n_heads=(4, 2, 6), n_kv_heads=(2, 1, 2), head_dim=8, ffn_size=(48, 20, 33)),
    "gpt2": GPT2Config(vocab_size=V, n_layers=2, hidden_size=32, n_heads=4, ffn_size=48, max_position=64),
    "neox": NeoXConfig(vocab_size=V, n_layers=2, hidden_size=32, n_heads=4, ffn_size=48),
}
PROMPTS = [[5, 99, 200, 3, 41], [7, 8], [1, 2, 3, 4, 5, 6, 7, 8, 250]]


def model_of(config: Any, **kinds: Any) -> Backbone:
    """A model whose random weights are large enough for decided answers."""
    model: Backbone = config.build(**kinds)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            base = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(base + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def greedy_by_full_forward(model: Backbone, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model.logits(model(torch.tensor([ids]))[:, -1]).argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_is_the_argmax_of_the_full_forward(name: str) -> None:
    model = model_of(CONFIGS[name])
    assert can_step(model) == (name not in ("gpt2", "neox"))
    expected = [greedy_by_full_forward(model, prompt, 12) for prompt in PROMPTS]
    assert [Engine(model).complete([prompt], max_tokens=12)[0] for prompt in PROMPTS] == expected
    assert Engine(model).complete(PROMPTS, max_tokens=12) == expected  # padded on the left


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("gpt2", "neox")])
def test_a_step_gives_the_logits_of_the_model_behind_a_cache(name: str) -> None:
    from lmworks.generate.step import DecoderStep

    model = model_of(CONFIGS[name])
    tokens_BT = torch.randint(0, V, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected_BTV = model.logits(model(tokens_BT))
        step, cache = DecoderStep(model, dtype=torch.float32), model.new_cache(2, 9)
        model(tokens_BT[:, :3], cache=cache)
        for t in range(3, 9):
            logits_BV = step.logits(tokens_BT[:, t], torch.tensor([t, t]), cache, None)
            torch.testing.assert_close(logits_BV, expected_BTV[:, t], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_steps_stay_near_float32(dtype: torch.dtype) -> None:
    from lmworks.generate.step import DecoderStep, settle_cache

    exact = model_of(DECODER)
    model = model_of(DECODER, dtype=dtype, param_dtype=dtype)
    tokens_BT = torch.randint(0, V, (1, 8), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected_V = exact.logits(exact(tokens_BT))[0, -1]
        step, cache = DecoderStep(model, dtype=dtype), model.new_cache(1, 8)
        model(tokens_BT[:, :-1], cache=cache)
        settle_cache(cache)
        logits_V = step.logits(tokens_BT[:, -1], torch.tensor([7]), cache, None)[0]
    assert (logits_V - expected_V).abs().max() < 0.03 * expected_V.abs().max()


def test_a_taken_model_answers_the_same_and_holds_its_weights_once() -> None:
    model = model_of(DECODER)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    expected = Engine(model).complete(PROMPTS, max_tokens=6)
    assert Engine(model, take=True).complete(PROMPTS, max_tokens=6) == expected
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    attn = model.get_submodule("blocks.0.attn")
    shared = {attn.get_parameter(f"{x}_proj.weight").untyped_storage().data_ptr() for x in "qkv"}
    assert len(shared) == 1


def test_an_engine_on_a_model_in_training_leaves_it_alone() -> None:
    model = model_of(DECODER)
    Engine(model).complete([[1, 2]], max_tokens=3)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter is not model.head_weight())


def test_a_hooked_layer_is_not_passed_by() -> None:
    model = model_of(DECODER)
    called: list[int] = []
    model.get_submodule("blocks.1.attn.q_proj").register_forward_hook(lambda *_: called.append(1))
    assert not can_step(model)
    Engine(model).complete([[1, 2]], max_tokens=3)
    assert len(called) == 3


def test_sampling_is_fixed_by_the_seed_and_a_row_does_not_depend_on_the_others() -> None:
    engine = Engine(model_of(DECODER))
    draw = Sampling(temperature=1.5, top_k=40, top_p=0.95, seed=3)
    together = engine.complete(PROMPTS, draw, max_tokens=10)
    assert engine.complete(PROMPTS, draw, max_tokens=10) == together
    assert engine.complete(PROMPTS[:1], draw, max_tokens=10) == together[:1]
    assert engine.complete(PROMPTS, replace(draw, seed=4), max_tokens=10) != together


def test_generation_does_not_touch_the_global_generator() -> None:
    engine = Engine(model_of(DECODER))
    before = torch.get_rng_state()
    engine.complete(PROMPTS, Sampling(temperature=1.0), max_tokens=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stop_token_ends_its_row_only() -> None:
    engine = Engine(model_of(DECODER))
    free = engine.complete(PROMPTS, max_tokens=12)
    stop = free[0][4]
    stopped = engine.complete(PROMPTS, max_tokens=12, stop={stop})
    for row, full in zip(stopped, free, strict=True):
        assert row == (full[: full.index(stop)] if stop in full else full)
    assert len(stopped[0]) < 12


def test_a_stream_gives_tokens_as_they_are_made() -> None:
    engine = Engine(model_of(DECODER))
    stream = engine.stream([[1, 2]], max_tokens=1_000_000)
    first = [next(stream) for _ in range(3)]
    assert [token for _, token in first] == engine.complete([[1, 2]], max_tokens=3)[0]


def test_a_learned_position_table_ends_the_text() -> None:
    model = model_of(replace(CONFIGS["gpt2"], max_position=8))
    assert len(Engine(model).complete([[1, 2, 3]], max_tokens=100)[0]) == 6
    with pytest.raises(UsageError, match="does not fit"):
        Engine(model).complete([[1] * 9], max_tokens=1)


@pytest.mark.parametrize(
    ("prompts", "word"), [([[1], []], "prompt 1 is empty"), ([[V]], "does not have|outside"), ([[-1]], "token")]
)
def test_a_prompt_that_cannot_be_read_is_refused(prompts: list[list[int]], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Engine(model_of(DECODER)).complete(prompts, max_tokens=1)


def test_nothing_asked_for_gives_nothing() -> None:
    engine = Engine(model_of(DECODER))
    assert engine.complete([], max_tokens=3) == []
    assert engine.complete([[1]], max_tokens=0) == [[]]
