"""config.json of a Hugging Face folder to our config. Every key is used, known to change nothing, or an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmworks.core.errors import CheckpointError, did_you_mean
from lmworks.model.decoder import DecoderConfig
from lmworks.model.gpt2 import GPT2Config
from lmworks.model.hf_names import FAMILIES, Family
from lmworks.model.moe import Experts
from lmworks.model.neox import NeoXConfig
from lmworks.model.rotary import RopeScaling

Config = DecoderConfig | GPT2Config | NeoXConfig
Table = dict[str, Any]

NEUTRAL = frozenset(
    {
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "initializer_range",
        "is_llama_config",
        "pretraining_tp",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "unk_token_id",
        "attention_dropout",
        "hidden_dropout",
        "classifier_dropout",
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
        "summary_first_dropout",
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_proj_to_labels",
        "task_specific_params",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "finetuning_task",
        "language",
        "tokenizer_class",
        "name_or_path",
        "n_ctx",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "gradient_checkpointing",
        "is_decoder",
        "reorder_and_upcast_attn",
        "transformers.js_config",
        "unsloth_version",
        "unsloth_fixed",
        "max_window_layers",
        "layer_types",
    }
)
"""Keys that cannot change the logits of a causal language model at inference. The last two are read where they can."""

FIXED: dict[str, tuple[Any, ...]] = {
    "mlp_bias": (False,),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1.0,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "quantization_config": (None,),
    "auto_map": (None,),
}
"""Keys that lmworks knows with these values only."""


_GROUPS = {"mistral": 8, "mixtral": 8, "qwen2": 32, "qwen3": 32, "qwen3_moe": 4}
"""Key/value heads where the file does not say."""


class Keys:
    """The table of a config.json while it is read; `done` refuses what nobody asked for."""

    def __init__(self, table: Table, where: Path) -> None:
        self._table = table
        self._where = where
        self._seen: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or the default where the key is absent."""
        self._seen.add(key)
        return self._table.get(key, default)

    def size(self, key: str) -> int:
        """A number that must be there."""
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refused(key, value, "a whole number above 0")
        return value

    def known(self, key: str, default: Any, *legal: Any) -> Any:
        """A value that must be one of those."""
        value = self.get(key, default)
        if value not in legal:
            raise self.refused(key, value, ", ".join(json.dumps(v) for v in legal))
        return value

    def refused(self, key: str, value: Any, legal: str) -> CheckpointError:
        """The error for one key."""
        shown = json.dumps(value) if key in self._table else "missing"
        return CheckpointError(f"{key} is {shown}, which lmworks does not have", where=str(self._where), legal=legal)

    def done(self) -> None:
        """Check the keys that must have a fixed value, and refuse the ones that nobody knows."""
        for key, legal in FIXED.items():
            if key not in self._seen and key in self._table:
                self.known(key, None, *legal)
        for key, value in self._table.items():
            neutral = key in NEUTRAL or key.startswith("_") or value is None or value is False
            if key not in self._seen and not neutral:
                hint = did_you_mean(key, self._seen)
                raise CheckpointError(
                    f"{key} = {json.dumps(value)} is not known{hint}",
                    where=str(self._where),
                    next_step=f"if it does not change what the model computes, delete {key} from the file",
                )


def read_config(folder: Path) -> tuple[Config, Family]:
    """Our config and the family of a folder. Raises CheckpointError that names the key and value it cannot take."""
    path = folder / "config.json"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError("there is no config.json here", where=str(folder)) from error
    except ValueError as error:
        raise CheckpointError(f"is not JSON: {error}", where=str(path)) from error
    return config_of(table, path)


def config_of(table: Table, where: Path) -> tuple[Config, Family]:
    """As read_config, from the table of a config.json; `where` is named in errors."""
    keys = Keys(table, where)
    name = keys.get("model_type")
    if name not in FAMILIES:
        raise keys.refused("model_type", name, ", ".join(FAMILIES))
    readers: dict[str, Callable[[Keys], Config]] = {"gpt2": _gpt2, "gpt_neox": _neox}
    config = readers[name](keys) if name in readers else _decoder(keys, name)
    keys.done()
    return config, FAMILIES[name]


def _decoder(keys: Keys, name: str) -> DecoderConfig:
    """All that are Llama-shaped. Defaults are those of transformers, for keys that old files leave out."""
    heads = keys.size("num_attention_heads")
    n_layers, hidden_size = keys.size("num_hidden_layers"), keys.size("hidden_size")
    groups = keys.get("num_key_value_heads", _GROUPS.get(name))
    keys.known("hidden_act", "silu", "silu", "swish")
    theta, scaling, _ = _rope(keys)
    window, blocks = _window(keys, name, n_layers)
    bias = name == "qwen2" or bool(keys.known("attention_bias", False, False, True))
    return DecoderConfig(
        vocab_size=keys.size("vocab_size"),
        n_layers=n_layers,
        hidden_size=hidden_size,
        n_heads=heads,
        n_kv_heads=heads if groups is None else groups,
        head_dim=keys.get("head_dim", 128 if name == "qwen3" else None) or hidden_size // heads,
        ffn_size=keys.size("intermediate_size"),
        norm_eps=float(keys.get("rms_norm_eps", 1e-6)),
        tied=bool(keys.known("tie_word_embeddings", False, False, True)),
        max_position=keys.get("max_position_embeddings", {"llama": 2048, "mistral": 131072}.get(name, 32768)),
        rope_theta=theta,
        rope_scaling=scaling,
        qk_norm=name in ("qwen3", "qwen3_moe"),
        qkv_bias=bias,
        sliding_window=window,
        sliding_window_blocks=blocks,
        experts=_experts(keys, name, n_layers) if name in ("mixtral", "qwen3_moe") else None,
    )


def _experts(keys: Keys, name: str, n_layers: int) -> Experts:
    """Mixtral has experts in every block, Qwen3-MoE may begin with dense ones."""
    keys.known("output_router_logits", False, False, True)
    aux = float(keys.get("router_aux_loss_coef", 0.001))
    top_k = keys.get("num_experts_per_tok", 2 if name == "mixtral" else 8)
    if name == "mixtral":
        keys.get("router_jitter_noise")  # in training only
        return Experts(count=keys.get("num_local_experts", 8), top_k=top_k, aux_loss=aux)
    dense = keys.get("mlp_only_layers") or []
    if sorted(dense) != list(range(len(dense))) or len(dense) >= n_layers:
        raise keys.refused("mlp_only_layers", dense, "the first blocks, not all of them")
    keys.known("decoder_sparse_step", 1, 1)
    count = keys.get("num_experts", 128)
    return Experts(
        count=keys.get("num_local_experts", count),
        top_k=top_k,
        size=keys.get("moe_intermediate_size", 768),
        normalise_top_k=bool(keys.known("norm_topk_prob", False, False, True)),
        aux_loss=aux,
        first_dense=len(dense),
    )


def _window(keys: Keys, name: str, n_layers: int) -> tuple[int | None, tuple[int, ...] | None]:
    """The window and the blocks that have one (None = all of them)."""
    types = keys.get("layer_types")
    if name in ("mistral", "mixtral"):
        window = keys.get("sliding_window", 4096 if name == "mistral" else None)
        wanted = "full_attention" if window is None else "sliding_attention"
        if types is not None and set(types) != {wanted}:
            raise keys.refused("layer_types", types, f"{wanted} in every block, as transformers runs it")
        return window, None
    if name == "llama":
        if types is not None and set(types) != {"full_attention"}:
            raise keys.refused("layer_types", types, "full_attention in every block")
        return None, None
    used = keys.known("use_sliding_window", False, False, name != "qwen3_moe")  # whose blocks all ignore layer_types
    window = keys.get("sliding_window", 4096) if used else None
    keys.get("sliding_window")
    first = keys.get("max_window_layers", 28)
    if types is None:
        types = [
            "sliding_attention" if window is not None and i >= first else "full_attention" for i in range(n_layers)
        ]
    legal = {"full_attention"} if window is None else {"full_attention", "sliding_attention"}
    if len(types) != n_layers or not set(types) <= legal:
        raise keys.refused("layer_types", types, f"{n_layers} entries out of {', '.join(sorted(legal))}")
    blocks = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
    if not blocks:
        return None, None
    return window, None if len(blocks) == n_layers else blocks


def _rope(keys: Keys, *, theta_key: str = "rope_theta") -> tuple[float, RopeScaling | None, Table]:
    """Base, scaling and further parameters, from `rope_parameters` (transformers 5) or the older keys."""
    theta = keys.get(theta_key, 10000.0)
    old, new = keys.get("rope_scaling"), keys.get("rope_parameters")
    key, table = ("rope_scaling", old) if old else ("rope_parameters", new or {})
    if not isinstance(table, dict) or any(isinstance(value, dict) for value in table.values()):
        raise keys.refused(key, table, "one table for all blocks")
    rest = dict(table)
    kinds = {rest.pop("rope_type", None), rest.pop("type", None)} - {None} or {"default"}
    theta = float(rest.pop("rope_theta", theta))
    if kinds == {"default"}:
        extra = set(rest) - {"partial_rotary_factor"}
        if extra:
            raise keys.refused(key, table, "rope_theta and rope_type")
        if theta_key == "rope_theta" and rest.get("partial_rotary_factor", 1.0) != 1.0:
            raise keys.refused(key, table, "partial_rotary_factor 1.0")
        return theta, None, rest
    wanted = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    if kinds != {"llama3"} or set(rest) != wanted:
        raise keys.refused(key, table, f"rope_type default, or llama3 with {', '.join(sorted(wanted))}")
    scaling = RopeScaling(
        factor=float(rest["factor"]),
        low_freq_factor=float(rest["low_freq_factor"]),
        high_freq_factor=float(rest["high_freq_factor"]),
        original_max_position=int(rest["original_max_position_embeddings"]),
    )
    return theta, scaling, {}


def _gpt2(keys: Keys) -> GPT2Config:
    keys.known("activation_function", "gelu_new", "gelu_new", "gelu_pytorch_tanh")
    hidden_size = keys.size("n_embd")
    return GPT2Config(
        vocab_size=keys.size("vocab_size"),
        n_layers=keys.size("n_layer"),
        hidden_size=hidden_size,
        n_heads=keys.size("n_head"),
        ffn_size=keys.get("n_inner") or 4 * hidden_size,
        norm_eps=float(keys.get("layer_norm_epsilon", 1e-5)),
        tied=bool(keys.known("tie_word_embeddings", True, False, True)),
        max_position=keys.get("n_positions", 1024),
    )


def _neox(keys: Keys) -> NeoXConfig:
    keys.known("hidden_act", "gelu", "gelu")
    keys.known("attention_bias", True, True)
    percent = keys.get("rotary_pct", 0.25)
    theta, scaling, rest = _rope(keys, theta_key="rotary_emb_base")
    if scaling is not None:
        raise keys.refused("rope_scaling", "llama3", "no scaling for gpt_neox")
    keys.get("partial_rotary_factor")
    return NeoXConfig(
        vocab_size=keys.size("vocab_size"),
        n_layers=keys.size("num_hidden_layers"),
        hidden_size=keys.size("hidden_size"),
        n_heads=keys.size("num_attention_heads"),
        ffn_size=keys.size("intermediate_size"),
        norm_eps=float(keys.get("layer_norm_eps", 1e-5)),
        tied=bool(keys.known("tie_word_embeddings", False, False, True)),
        max_position=keys.get("max_position_embeddings", 2048),
        rope_theta=theta,
        rotary_pct=float(rest.get("partial_rotary_factor", percent)),
        parallel_block=bool(keys.known("use_parallel_residual", True, False, True)),
    )
