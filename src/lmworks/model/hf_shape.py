"""Our config to config.json: which family can hold a model, and how uneven blocks are made even, exactly.

Hugging Face families have one size for all blocks. Blocks with a smaller feed-forward layer or fewer key/value groups
are padded with zeros: a gate, an activation and a value of zero add nothing, so the padded model computes the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lmworks.core.errors import ExportError
from lmworks.model.decoder import DecoderConfig
from lmworks.model.gpt2 import GPT2Config
from lmworks.model.hf_config import Table
from lmworks.model.hf_names import FAMILIES, Family
from lmworks.model.moe import Experts
from lmworks.model.neox import NeoXConfig
from lmworks.model.rotary import RopeScaling
from lmworks.model.sizes import BlockSizes, PerBlock, Shape


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a model goes: its family, the sizes of every block there, and the table of its config.json."""

    family: Family
    sizes: BlockSizes
    table: Table
    expert_size: int = 0
    """The width of every expert there."""
    added_biases: tuple[str, ...] = ()
    """Names of biases ({i} = block) that the family has and the model has not; they are written as zeros."""


def target(config: Shape) -> Target:
    """The family that computes what the model computes. Raises ExportError where there is none."""
    if isinstance(config, DecoderConfig):
        return _decoder(config)
    if isinstance(config, GPT2Config | NeoXConfig):
        return _classic(config)
    raise ExportError(f"a {type(config).__name__} has no family in transformers")


def _even(config: Shape) -> BlockSizes:
    """The sizes that hold every block. Raises ExportError where zeros cannot make the blocks equal."""
    blocks = config.blocks()
    ratios = {block.n_heads // block.n_kv_heads for block in blocks}
    if len(ratios) > 1:
        raise ExportError(
            f"blocks have {', '.join(str(r) for r in sorted(ratios))} query heads per key/value head; "
            "a Hugging Face folder holds one number for all blocks",
            legal="the same n_heads / n_kv_heads in every block (their numbers may differ)",
        )
    return BlockSizes(
        n_heads=max(block.n_heads for block in blocks),
        n_kv_heads=max(block.n_kv_heads for block in blocks),
        head_dim=blocks[0].head_dim,
        ffn_size=max([block.ffn_size for block in blocks if not block.experts] or [block.ffn_size for block in blocks]),
    )


def _decoder(config: DecoderConfig) -> Target:
    if config.parallel_block:
        raise ExportError(
            "parallel_block = true has no Llama-shaped family in transformers", legal="parallel_block = false"
        )
    sizes = _even(config)
    name = _family_of(config, sizes) if config.experts is None else _family_with_experts(config, config.experts, sizes)
    width = max((block.ffn_size for block in config.blocks() if block.experts), default=0)
    table: Table = {
        "architectures": [FAMILIES[name].architecture],
        "model_type": name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": sizes.ffn_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": sizes.n_heads,
        "num_key_value_heads": sizes.n_kv_heads,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_position,
        "attention_dropout": 0.0,
        **_rope(config.rope_theta, config.rope_scaling),
        **_windows(config, name),
        **(_experts(config.experts, name, width, config.ffn_size) if config.experts is not None else {}),
    }
    added: tuple[str, ...] = ()
    if name == "qwen2" and not config.qkv_bias:
        added = tuple(f"blocks.{{i}}.attn.{part}_proj.bias" for part in "qkv")
    if name == "llama":
        table |= {"attention_bias": False, "mlp_bias": False}
    if name in ("qwen3", "qwen3_moe"):
        table["attention_bias"] = config.qkv_bias
        added = ("blocks.{i}.attn.o_proj.bias",) if config.qkv_bias else ()
    return Target(family=FAMILIES[name], sizes=sizes, table=table, expert_size=width, added_biases=added)


def _family_with_experts(config: DecoderConfig, experts: Experts, sizes: BlockSizes) -> str:
    """Mixtral, or with qk_norm Qwen3-MoE. Raises ExportError with what neither of them has."""
    name = "qwen3_moe" if config.qk_norm else "mixtral"
    wrong: dict[str, tuple[object, object]] = {
        "experts.scoring": (experts.scoring, "softmax"),
        "experts.shared_size": (experts.shared_size, 0),
        "experts.scale": (experts.scale, 1.0),
        "experts.bias_rate": (experts.bias_rate, None),
    }
    if name == "mixtral":
        wrong |= {
            "experts.first_dense": (experts.first_dense, 0),
            "experts.normalise_top_k": (experts.normalise_top_k or experts.top_k == experts.count == 1, True),
            "qkv_bias": (config.qkv_bias, False),
            "sliding_window_blocks": (config.sliding_window_blocks, None),
        }
    elif config.sliding_window is not None:
        wrong["sliding_window"] = (config.sliding_window, None)
    found = {path: legal for path, (value, legal) in wrong.items() if value != legal}
    if found:
        listed = ", ".join(f"{path} = {legal}" if legal is not None else f"no {path}" for path, legal in found.items())
        other = "" if config.qk_norm or "experts.first_dense" not in found else "; or qk_norm, for qwen3_moe"
        raise ExportError(
            f"{' and '.join(found)} cannot be said in a {name} folder, the nearest that transformers has",
            legal=f"{listed}{other}",
        )
    return name


def _experts(experts: Experts, name: str, width: int, ffn_size: PerBlock) -> Table:
    """The keys of config.json about experts."""
    table: Table = {
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.top_k,
        "output_router_logits": False,
        "router_aux_loss_coef": experts.aux_weight,
    }
    if name == "mixtral":
        return table | {"intermediate_size": width, "router_jitter_noise": 0.0}
    if experts.first_dense == 0:  # no block has this width: it is kept for who reads the folder back
        table["intermediate_size"] = ffn_size if isinstance(ffn_size, int) else max(ffn_size)
    return table | {
        "num_experts": experts.count,
        "moe_intermediate_size": width,
        "norm_topk_prob": experts.normalise_top_k,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(experts.first_dense)),
    }


def _family_of(config: DecoderConfig, sizes: BlockSizes) -> str:
    """The plainest family that has what the model has."""
    if config.qk_norm:
        return "qwen3"
    if config.qkv_bias or config.sliding_window_blocks is not None:
        return "qwen2"
    if config.sliding_window is not None or config.hidden_size % sizes.n_heads:
        return "mistral"  # Llama in transformers wants hidden_size to be a multiple of n_heads
    return "llama"


def _rope(theta: float, scaling: RopeScaling | None) -> Table:
    """Both spellings: `rope_parameters` for transformers 5, the other two for every older reader."""
    if scaling is None:
        return {
            "rope_theta": theta,
            "rope_scaling": None,
            "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        }
    table = {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position,
    }
    return {"rope_theta": theta, "rope_scaling": table, "rope_parameters": {"rope_theta": theta, **table}}


def _windows(config: DecoderConfig, name: str) -> Table:
    if name in ("mistral", "mixtral"):
        return {"sliding_window": config.sliding_window}
    if name == "qwen3_moe":
        return {"use_sliding_window": False, "sliding_window": None}
    if name not in ("qwen2", "qwen3"):
        return {}
    windows = [block.window is not None for block in config.blocks()]
    first = next((i for i in range(config.n_layers) if all(windows[i:])), config.n_layers)
    return {
        "use_sliding_window": any(windows),
        "sliding_window": config.sliding_window,
        "max_window_layers": first,
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
    }


def _classic(config: GPT2Config | NeoXConfig) -> Target:
    """GPT-2 and GPT-NeoX: as many key/value heads as query heads, and heads that make up the hidden size."""
    sizes = _even(config)
    name = "gpt2" if isinstance(config, GPT2Config) else "gpt_neox"
    even = all((block.n_heads, block.n_kv_heads) == (sizes.n_heads, sizes.n_heads) for block in config.blocks())
    if not even or sizes.n_heads * sizes.head_dim != config.hidden_size:
        raise ExportError(
            f"{name} in transformers has n_kv_heads = n_heads = hidden_size / head_dim in every block",
            legal=f"n_heads = n_kv_heads = {config.hidden_size // sizes.head_dim} for head_dim {sizes.head_dim}",
        )
    table = {
        "architectures": [FAMILIES[name].architecture],
        "model_type": name,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
    }
    table |= _gpt2(config, sizes) if isinstance(config, GPT2Config) else _neox(config, sizes)
    return Target(family=FAMILIES[name], sizes=sizes, table=table)


def _gpt2(config: GPT2Config, sizes: BlockSizes) -> Table:
    return {
        "n_embd": config.hidden_size,
        "n_layer": config.n_layers,
        "n_head": sizes.n_heads,
        "n_inner": sizes.ffn_size,
        "n_positions": config.max_position,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new",
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def _neox(config: NeoXConfig, sizes: BlockSizes) -> Table:
    rope = {"rope_theta": config.rope_theta, "rope_type": "default", "partial_rotary_factor": config.rotary_pct}
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": sizes.ffn_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": sizes.n_heads,
        "hidden_act": "gelu",
        "layer_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_position,
        "use_parallel_residual": config.parallel_block,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "rotary_emb_base": config.rope_theta,
        "rotary_pct": config.rotary_pct,
        "rope_parameters": rope,
    }


def pad(name: str, tensor: Tensor, goal: Target) -> Tensor:
    """One parameter of a block, with zeros up to the sizes it has in the folder."""
    sizes, module = goal.sizes, name.split(".")[-2]
    if module == "experts":
        missing = goal.expert_size - tensor.shape[2 if name.endswith("down_proj") else 1]
        return F.pad(tensor, (0, missing) if name.endswith("down_proj") else (0, 0, 0, missing)) if missing else tensor
    rows = {
        "q_proj": sizes.n_heads * sizes.head_dim,
        "k_proj": sizes.n_kv_heads * sizes.head_dim,
        "v_proj": sizes.n_kv_heads * sizes.head_dim,
        "gate_proj": sizes.ffn_size,
        "up_proj": sizes.ffn_size,
    }
    columns = {"o_proj": sizes.n_heads * sizes.head_dim, "down_proj": sizes.ffn_size}
    if module in rows:
        missing = rows[module] - tensor.shape[0]
        return F.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, missing)) if missing else tensor
    if module in columns and tensor.ndim == 2:
        missing = columns[module] - tensor.shape[1]
        return F.pad(tensor, (0, missing)) if missing else tensor
    return tensor


def added_bias(name: str, config: Shape, sizes: BlockSizes) -> Tensor:
    """The zeros of a bias that only the family has."""
    module = name.split(".")[-2]
    if module == "o_proj":
        return torch.zeros(config.hidden_size)
    heads = sizes.n_heads if module == "q_proj" else sizes.n_kv_heads
    return torch.zeros(heads * sizes.head_dim)
