"""Logits of every Hugging Face family against transformers, in and out."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lmworks.core.errors import ExportError
from lmworks.model import hf
from lmworks.model.backbone import Backbone
from lmworks.model.decoder import DecoderConfig, Experts
from lmworks.model.gpt2 import GPT2Config
from lmworks.model.neox import NeoXConfig
from lmworks.model.rotary import RopeScaling

transformers = pytest.importorskip("transformers")

TOLERANCE = 2e-5
"""float32, logits of size 1 to 10; 1e-4 is what is promised."""
V = 257
SHAPE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GPT2_SHAPE = {
    "vocab_size": V,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
NEOX_SHAPE = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}

THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SHAPE),
    "llama-tied": ("LlamaConfig", SHAPE | {"tie_word_embeddings": True}),
    "llama-head-dim": ("LlamaConfig", SHAPE | {"head_dim": 16, "rms_norm_eps": 1e-3}),
    "llama3-rope": ("LlamaConfig", SHAPE | {"rope_parameters": LLAMA3}),
    "llama-multi-query": ("LlamaConfig", SHAPE | {"num_key_value_heads": 1}),
    "mistral": ("MistralConfig", SHAPE | {"sliding_window": None}),
    "mistral-window": ("MistralConfig", SHAPE | {"sliding_window": 5}),
    "qwen2": ("Qwen2Config", SHAPE | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-windows": ("Qwen2Config", SHAPE | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", SHAPE | {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-windows": (
        "Qwen3Config",
        SHAPE
        | {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mixtral": ("MixtralConfig", SHAPE | {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral-window": (
        "MixtralConfig",
        SHAPE | {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 5},
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        SHAPE | {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "mlp_only_layers": [0]},
    ),
    "qwen3-moe-normalised": (
        "Qwen3MoeConfig",
        SHAPE
        | {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "norm_topk_prob": True,
            "head_dim": 16,
        },
    ),
    "gpt2": ("GPT2Config", GPT2_SHAPE),
    "gpt2-untied": ("GPT2Config", GPT2_SHAPE | {"tie_word_embeddings": False, "n_inner": 40}),
    "neox": ("GPTNeoXConfig", NEOX_SHAPE),
    "neox-serial": (
        "GPTNeoXConfig",
        NEOX_SHAPE
        | {
            "use_parallel_residual": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
        },
    ),
}


def theirs(name: str) -> Any:
    """A transformers model with large random weights, norms and biases included."""
    kind, settings = THEIRS[name]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings)).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in model.parameters():
            base = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(base + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def randomise(model: Backbone, seed: int = 0) -> Backbone:
    """Our model with large random weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            base = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(base + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def rows(length: int = 24) -> Tensor:
    return torch.randint(0, V, (2, length), generator=torch.Generator().manual_seed(7))


def our_logits(model: Backbone) -> Tensor:
    with torch.no_grad():
        return model.logits(model(rows()))


def their_logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(rows()).logits
    return logits


def reload_theirs(folder: Path) -> Any:
    """What transformers makes of a folder; every warning of its loading is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@pytest.mark.parametrize("name", THEIRS)
def test_a_folder_that_transformers_wrote_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    model = theirs(name)
    model.save_pretrained(tmp_path)
    expected = their_logits(model)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(our_logits(hf.load(tmp_path)), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", THEIRS)
def test_what_was_read_is_written_so_that_transformers_reads_the_same(name: str, tmp_path: Path) -> None:
    theirs(name).save_pretrained(tmp_path / "a")
    model = hf.load(tmp_path / "a")
    hf.save(model, tmp_path / "b")
    torch.testing.assert_close(their_logits(reload_theirs(tmp_path / "b")), our_logits(model), rtol=0, atol=TOLERANCE)
    assert hf.read_folder(tmp_path / "b").config == model.config


DECODER = DecoderConfig(vocab_size=V, n_layers=3, hidden_size=32, n_heads=4, n_kv_heads=2, ffn_size=48)
OURS = {
    "llama": DECODER,
    "tied": replace(DECODER, tied=True),
    "llama3-rope": replace(DECODER, rope_scaling=RopeScaling(original_max_position=16, factor=4.0)),
    "window": replace(DECODER, sliding_window=5),
    "some-windows": replace(DECODER, sliding_window=5, sliding_window_blocks=(0, 2)),
    "biased-windows": replace(DECODER, sliding_window=5, sliding_window_blocks=(1, 2), qkv_bias=True, head_dim=16),
    "qk-norm": replace(DECODER, qk_norm=True, head_dim=16),
    "qk-norm-and-bias": replace(DECODER, qk_norm=True, qkv_bias=True),
    "odd-width": replace(DECODER, hidden_size=36, n_heads=8, head_dim=8),
    "uneven-ffn": replace(DECODER, ffn_size=(48, 16, 33)),
    "uneven-heads": replace(DECODER, n_heads=(4, 2, 6), n_kv_heads=(2, 1, 3), head_dim=8, qkv_bias=True, qk_norm=True),
    "experts": replace(DECODER, experts=Experts(count=4, top_k=2)),
    "uneven-experts": replace(DECODER, ffn_size=(48, 16, 33), experts=Experts(count=3, top_k=3)),
    "experts-behind-dense": replace(
        DECODER, qk_norm=True, qkv_bias=True, ffn_size=(20, 48, 16), experts=Experts(count=4, top_k=1, first_dense=1)
    ),
    "gpt2": GPT2Config(vocab_size=V, n_layers=2, hidden_size=32, n_heads=4, ffn_size=(48, 64), max_position=64),
    "gpt2-untied": GPT2Config(vocab_size=V, n_layers=2, hidden_size=32, n_heads=4, ffn_size=48, tied=False),
    "neox": NeoXConfig(vocab_size=V, n_layers=2, hidden_size=32, n_heads=4, ffn_size=(48, 20)),
    "neox-tied": NeoXConfig(
        vocab_size=V, n_layers=2, hidden_size=32, n_heads=2, ffn_size=48, tied=True, parallel_block=False
    ),
}


@pytest.mark.parametrize("name", OURS)
def test_transformers_reads_what_we_wrote_with_equal_logits(name: str, tmp_path: Path) -> None:
    model = randomise(OURS[name].build())
    hf.save(model, tmp_path / "out")
    expected = our_logits(model)
    torch.testing.assert_close(their_logits(reload_theirs(tmp_path / "out")), expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(our_logits(hf.load(tmp_path / "out")), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (replace(DECODER, parallel_block=True), "parallel_block"),
        (replace(DECODER, n_kv_heads=(2, 4, 2)), "query heads per key/value head"),
        (replace(OURS["gpt2"], n_kv_heads=2), "n_kv_heads"),
        (replace(DECODER, experts=Experts(count=4, scoring="sigmoid")), "experts.scoring = softmax"),
        (replace(DECODER, experts=Experts(count=4, shared_size=8, bias_rate=0.1)), "no experts.bias_rate"),
        (replace(DECODER, experts=Experts(count=4, first_dense=1)), "or qk_norm, for qwen3_moe"),
    ],
)
def test_a_model_that_no_family_holds_is_refused_by_name(config: Any, word: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=word):
        hf.save(randomise(config.build()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
