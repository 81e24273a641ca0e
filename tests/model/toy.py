"""Tiny networks of every family, with uneven blocks where the family allows them."""

from __future__ import annotations

import torch

from lmworks.model.backbone import Backbone
from lmworks.model.decoder import DecoderConfig, Experts
from lmworks.model.gpt2 import GPT2Config
from lmworks.model.init import initialise
from lmworks.model.neox import NeoXConfig
from lmworks.model.rotary import RopeScaling

V = 257
CONFIGS: dict[str, DecoderConfig | GPT2Config | NeoXConfig] = {
    "decoder": DecoderConfig(
        vocab_size=V,
        n_layers=3,
        hidden_size=24,
        n_heads=(6, 4, 2),
        n_kv_heads=(3, 2, 2),
        head_dim=4,
        ffn_size=(40, 24, 9),
    ),
    "tied": DecoderConfig(vocab_size=V, n_layers=2, hidden_size=24, n_heads=4, n_kv_heads=2, ffn_size=20, tied=True),
    "qwen": DecoderConfig(
        vocab_size=V, n_layers=2, hidden_size=24, n_heads=4, n_kv_heads=2, ffn_size=20, qk_norm=True, qkv_bias=True
    ),
    "windowed": DecoderConfig(
        vocab_size=V, n_layers=2, hidden_size=24, n_heads=4, n_kv_heads=2, ffn_size=20, sliding_window=3
    ),
    "mixed": DecoderConfig(
        vocab_size=V,
        n_layers=3,
        hidden_size=24,
        n_heads=4,
        n_kv_heads=1,
        ffn_size=20,
        sliding_window=3,
        sliding_window_blocks=(0, 2),
        parallel_block=True,
        rope_scaling=RopeScaling(factor=4.0, original_max_position=16),
    ),
    "experts": DecoderConfig(
        vocab_size=V,
        n_layers=2,
        hidden_size=24,
        n_heads=4,
        n_kv_heads=2,
        ffn_size=(12, 20),
        experts=Experts(count=5, top_k=2),
    ),
    "deepseek-experts": DecoderConfig(
        vocab_size=V,
        n_layers=2,
        hidden_size=24,
        n_heads=4,
        n_kv_heads=2,
        ffn_size=40,
        experts=Experts(
            count=6, top_k=3, size=8, shared_size=10, scoring="sigmoid", scale=1.5, bias_rate=0.01, first_dense=1
        ),
    ),
    "gpt2": GPT2Config(vocab_size=V, n_layers=2, hidden_size=24, n_heads=4, ffn_size=(20, 12), max_position=64),
    "neox": NeoXConfig(vocab_size=V, n_layers=2, hidden_size=24, n_heads=2, ffn_size=20, rotary_pct=0.5),
    "neox-serial": NeoXConfig(
        vocab_size=V,
        n_layers=2,
        hidden_size=24,
        n_heads=4,
        n_kv_heads=2,
        ffn_size=20,
        parallel_block=False,
        rotary_pct=1.0,
    ),
}
FAMILIES = sorted(CONFIGS)


def built(family: str, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Backbone:
    """A network with values; by default in float64, parameters too. Biases and norms are moved off 0 and 1."""
    model = CONFIGS[family].build(dtype=dtype, param_dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    initialise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
            else:
                parameter.mul_(2.0)
    return model
