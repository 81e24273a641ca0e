"""Where each of our parameters lives in a Hugging Face folder: one table per family, as data.

Three things differ besides names. GPT-2 keeps matrices as (in, out) and q, k, v side by side in one tensor. GPT-NeoX
keeps q, k, v of each head side by side: (N, 3, h, D). The tables say so, the two functions below undo and redo it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Fusion = Literal["none", "thirds", "heads"]


@dataclass(frozen=True)
class Place:
    """Where one module of ours lives: its name there ({i} = block), and how its weight is stored."""

    name: str
    turned: bool = False
    """The weight is stored (in, out)."""
    part: int | None = None
    """0, 1, 2: which of q, k, v in a fused tensor."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family of Hugging Face."""

    model_type: str
    architecture: str
    places: Mapping[str, Place]
    """Our module name ({i} = block) -> its place. '.weight' and '.bias' are the same on both sides."""
    prefix: str
    """What the base model's names begin with; a file saved from the base model alone lacks it."""
    fusion: Fusion = "none"
    """How q, k and v share a tensor: 'thirds' (all q, all k, all v) or 'heads' (q, k, v of each head)."""
    buffers: tuple[str, ...] = ()
    """Endings of stored tensors that are no parameters (masks and tables of old versions)."""

    def place(self, ours: str) -> tuple[str, Place]:
        """The full stored name of one of our parameters ({e} = expert, where it holds them all), and its place."""
        module, _, kind = ours.rpartition(".")
        words = module.split(".")
        block = words[1] if words[0] == "blocks" else ""
        if block:
            words[1] = "{i}"
        if ".experts" in module:
            place = self.places[".".join([*words, kind])]
            return place.name.replace("{i}", block), place
        place = self.places[".".join(words)]
        return f"{place.name.replace('{i}', block)}.{kind}", place

    def stored_names(self, ours: str, shape: tuple[int, ...]) -> list[str]:
        """The full stored names of one of our parameters: one, or one for each expert."""
        name, _ = self.place(ours)
        return [name.replace("{e}", str(e)) for e in range(shape[0])] if "{e}" in name else [name]


_LLAMA = {
    "embed": Place("model.embed_tokens"),
    "blocks.{i}.attn_norm": Place("model.layers.{i}.input_layernorm"),
    "blocks.{i}.attn.q_proj": Place("model.layers.{i}.self_attn.q_proj"),
    "blocks.{i}.attn.k_proj": Place("model.layers.{i}.self_attn.k_proj"),
    "blocks.{i}.attn.v_proj": Place("model.layers.{i}.self_attn.v_proj"),
    "blocks.{i}.attn.o_proj": Place("model.layers.{i}.self_attn.o_proj"),
    "blocks.{i}.attn.q_norm": Place("model.layers.{i}.self_attn.q_norm"),
    "blocks.{i}.attn.k_norm": Place("model.layers.{i}.self_attn.k_norm"),
    "blocks.{i}.ffn_norm": Place("model.layers.{i}.post_attention_layernorm"),
    "blocks.{i}.ffn.gate_proj": Place("model.layers.{i}.mlp.gate_proj"),
    "blocks.{i}.ffn.up_proj": Place("model.layers.{i}.mlp.up_proj"),
    "blocks.{i}.ffn.down_proj": Place("model.layers.{i}.mlp.down_proj"),
    "norm": Place("model.norm"),
    "head": Place("lm_head"),
}
_GPT2 = {
    "embed": Place("transformer.wte"),
    "positions": Place("transformer.wpe"),
    "blocks.{i}.attn_norm": Place("transformer.h.{i}.ln_1"),
    "blocks.{i}.attn.q_proj": Place("transformer.h.{i}.attn.c_attn", turned=True, part=0),
    "blocks.{i}.attn.k_proj": Place("transformer.h.{i}.attn.c_attn", turned=True, part=1),
    "blocks.{i}.attn.v_proj": Place("transformer.h.{i}.attn.c_attn", turned=True, part=2),
    "blocks.{i}.attn.o_proj": Place("transformer.h.{i}.attn.c_proj", turned=True),
    "blocks.{i}.ffn_norm": Place("transformer.h.{i}.ln_2"),
    "blocks.{i}.ffn.up_proj": Place("transformer.h.{i}.mlp.c_fc", turned=True),
    "blocks.{i}.ffn.down_proj": Place("transformer.h.{i}.mlp.c_proj", turned=True),
    "norm": Place("transformer.ln_f"),
    "head": Place("lm_head"),
}
_NEOX = {
    "embed": Place("gpt_neox.embed_in"),
    "blocks.{i}.attn_norm": Place("gpt_neox.layers.{i}.input_layernorm"),
    "blocks.{i}.attn.q_proj": Place("gpt_neox.layers.{i}.attention.query_key_value", part=0),
    "blocks.{i}.attn.k_proj": Place("gpt_neox.layers.{i}.attention.query_key_value", part=1),
    "blocks.{i}.attn.v_proj": Place("gpt_neox.layers.{i}.attention.query_key_value", part=2),
    "blocks.{i}.attn.o_proj": Place("gpt_neox.layers.{i}.attention.dense"),
    "blocks.{i}.ffn_norm": Place("gpt_neox.layers.{i}.post_attention_layernorm"),
    "blocks.{i}.ffn.up_proj": Place("gpt_neox.layers.{i}.mlp.dense_h_to_4h"),
    "blocks.{i}.ffn.down_proj": Place("gpt_neox.layers.{i}.mlp.dense_4h_to_h"),
    "norm": Place("gpt_neox.final_layer_norm"),
    "head": Place("embed_out"),
}
_ROTARY = (".rotary_emb.inv_freq",)


def _experts(layer: str, gate: str, up: str, down: str) -> dict[str, Place]:
    """A layer of experts: the names of its router and of each expert's matrices."""
    matrices = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    return {
        "blocks.{i}.ffn.router": Place(f"model.layers.{{i}}.{layer}.gate"),
        **{
            f"blocks.{{i}}.ffn.experts.{ours}": Place(f"model.layers.{{i}}.{layer}.experts.{{e}}.{theirs}.weight")
            for ours, theirs in matrices.items()
        },
    }


_MIXTRAL = _LLAMA | _experts("block_sparse_moe", "w1", "w3", "w2")
_QWEN3_MOE = _LLAMA | _experts("mlp", "gate_proj", "up_proj", "down_proj")


def _llama_like(model_type: str, architecture: str, places: Mapping[str, Place] = _LLAMA) -> Family:
    return Family(model_type=model_type, architecture=architecture, places=places, prefix="model.", buffers=_ROTARY)


FAMILIES: dict[str, Family] = {
    "llama": _llama_like("llama", "LlamaForCausalLM"),
    "mistral": _llama_like("mistral", "MistralForCausalLM"),
    "qwen2": _llama_like("qwen2", "Qwen2ForCausalLM"),
    "qwen3": _llama_like("qwen3", "Qwen3ForCausalLM"),
    "mixtral": _llama_like("mixtral", "MixtralForCausalLM", _MIXTRAL),
    "qwen3_moe": _llama_like("qwen3_moe", "Qwen3MoeForCausalLM", _QWEN3_MOE),
    "gpt2": Family(
        model_type="gpt2",
        architecture="GPT2LMHeadModel",
        places=_GPT2,
        prefix="transformer.",
        fusion="thirds",
        buffers=(".attn.bias", ".attn.masked_bias"),
    ),
    "gpt_neox": Family(
        model_type="gpt_neox",
        architecture="GPTNeoXForCausalLM",
        places=_NEOX,
        prefix="gpt_neox.",
        fusion="heads",
        buffers=(*_ROTARY, ".attention.bias", ".attention.masked_bias"),
    ),
}
"""By `model_type` of config.json. SmolLM2 is 'llama'."""


def unpack(stored: Tensor, place: Place, fusion: Fusion, n_heads: int) -> Tensor:
    """Our parameter from the stored tensor. `n_heads` is needed where q, k, v are fused by head."""
    tensor = stored.t() if place.turned and stored.ndim == 2 else stored
    if place.part is None:
        return tensor
    if fusion == "thirds":
        return tensor.chunk(3)[place.part]
    return tensor.reshape(n_heads, 3, -1, *tensor.shape[1:])[:, place.part].flatten(0, 1)


def pack(part: Callable[[int], Tensor], place: Place, fusion: Fusion, n_heads: int) -> Tensor:
    """The stored tensor from our parameter `part(0)`; from q, k, v = part(0), part(1), part(2) where they are fused."""
    if place.part is None:
        tensor = part(0)
    elif fusion == "thirds":
        tensor = torch.cat([part(i) for i in range(3)])
    else:
        heads = [part(i).reshape(n_heads, -1, *part(i).shape[1:]) for i in range(3)]
        tensor = torch.stack(heads, 1).flatten(0, 2)
    return tensor.t() if place.turned and tensor.ndim == 2 else tensor
