"""GGUF files to our model: shape, weights (dequantised) and tokenizer. Llama-shaped files only.

What a reader would get wrong: GGUF keeps the rows of q and k of a Llama in another order than Hugging Face and we do.
A head's rotary pairs stand side by side there (0, h/2, 1, h/2 + 1, ...), half a head apart here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from lmworks.core.errors import CheckpointError
from lmworks.model.decoder import DecoderConfig
from lmworks.model.hf_write import Tokens

PLACES = {
    "embed": "token_embd",
    "norm": "output_norm",
    "head": "output",
    "attn_norm": "attn_norm",
    "attn.q_proj": "attn_q",
    "attn.k_proj": "attn_k",
    "attn.v_proj": "attn_v",
    "attn.o_proj": "attn_output",
    "ffn_norm": "ffn_norm",
    "ffn.gate_proj": "ffn_gate",
    "ffn.up_proj": "ffn_up",
    "ffn.down_proj": "ffn_down",
}
"""Our module name (within a block, where there is one) -> the name in a GGUF file."""

CONTROL = 3
"""tokenizer.ggml.token_type of special tokens."""


class GGUFModel(Mapping[str, Tensor]):
    """One GGUF file: `config`, `tokens`, `tokenizer_files()`, and parameters by our names, dequantised lazily."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError) as error:
            raise CheckpointError(f"is not a GGUF file that can be read: {error}", where=str(path)) from error
        self._facts: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self._stored = {tensor.name: tensor for tensor in reader.tensors}
        self.config = self._config()
        self._shapes = dict(self.config.shapes())
        wanted = {self._name(ours) for ours in self._shapes}
        odd = sorted(wanted ^ set(self._stored))
        if odd:
            raise CheckpointError(
                f"{odd[0]} is {'missing' if odd[0] in wanted else 'no part of a Llama-shaped model'}", where=str(path)
            )

    def _fact(self, key: str) -> Any:
        if key not in self._facts:
            raise CheckpointError(f"does not say {key}", where=str(self.path))
        return self._facts[key]

    def _config(self) -> DecoderConfig:
        kind = self._fact("general.architecture")
        scaled = next((key for key in self._facts if key.startswith("llama.rope.scaling.")), None)
        if kind != "llama" or scaled is not None or "rope_freqs.weight" in self._stored:
            what = f"general.architecture = {kind}" if kind != "llama" else "scaled rotary positions"
            raise CheckpointError(
                f"{what} is not supported", where=str(self.path), legal="llama, plain rotary positions"
            )
        heads, width = self._fact("llama.attention.head_count"), self._fact("llama.embedding_length")
        return DecoderConfig(
            vocab_size=len(self._fact("tokenizer.ggml.tokens")),
            n_layers=self._fact("llama.block_count"),
            hidden_size=width,
            n_heads=heads,
            n_kv_heads=self._facts.get("llama.attention.head_count_kv", heads),
            head_dim=self._facts.get("llama.attention.key_length", width // heads),
            ffn_size=self._fact("llama.feed_forward_length"),
            norm_eps=float(f"{self._fact('llama.attention.layer_norm_rms_epsilon'):.6g}"),
            tied="output.weight" not in self._stored,
            max_position=self._fact("llama.context_length"),
            rope_theta=float(self._facts.get("llama.rope.freq_base", 10000.0)),
        )

    @property
    def tokens(self) -> Tokens:
        """The special token ids."""
        facts = self._facts
        return Tokens(
            bos=facts.get("tokenizer.ggml.bos_token_id"),
            eos=facts.get("tokenizer.ggml.eos_token_id"),
            pad=facts.get("tokenizer.ggml.padding_token_id"),
        )

    def _name(self, ours: str) -> str:
        module, _, kind = ours.rpartition(".")
        if not module.startswith("blocks."):
            return f"{PLACES[module]}.{kind}"
        _, block, rest = module.split(".", 2)
        return f"blk.{block}.{PLACES[rest]}.{kind}"

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, ours: str) -> Tensor:
        stored = self._stored[self._name(ours)]
        values = gguf.dequantize(stored.data, stored.tensor_type)
        tensor = torch.from_numpy(values.copy()).reshape(self._shapes[ours])
        module = ours.split(".")[-2]
        if module in ("q_proj", "k_proj"):
            return halves(tensor, self.config.blocks()[0].head_dim)
        return tensor

    def tokenizer_files(self) -> dict[str, str]:
        """tokenizer.json, tokenizer_config.json and the chat template, by file name."""
        names = self._fact("tokenizer.ggml.tokens")
        special = {"bos_token": self.tokens.bos, "eos_token": self.tokens.eos, "pad_token": self.tokens.pad}
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": self.config.max_position,
            **{kind: names[token] for kind, token in special.items() if token is not None},
        }
        found = {"tokenizer.json": self._tokenizer().to_str(pretty=True)}
        template = self._facts.get("tokenizer.chat_template")
        if template:
            found["chat_template.jinja"] = template
        found["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        return found

    def _tokenizer(self) -> Tokenizer:
        kind, cut = self._fact("tokenizer.ggml.model"), self._facts.get("tokenizer.ggml.pre", "default")
        if kind != "gpt2" or cut not in CUTS:
            raise CheckpointError(
                f"tokenizer '{kind}' with pre-tokenizer '{cut}' is not supported",
                where=str(self.path),
                legal=f"gpt2 with {', '.join(CUTS)}",
            )
        names, types = self._fact("tokenizer.ggml.tokens"), self._fact("tokenizer.ggml.token_type")
        merges = [tuple(pair.split(" ")) for pair in self._fact("tokenizer.ggml.merges")]
        made = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=merges))
        made.pre_tokenizer = CUTS[cut]()
        made.decoder = decoders.ByteLevel()
        control = [AddedToken(name, special=True) for name, kind in zip(names, types, strict=True) if kind == CONTROL]
        made.add_special_tokens(control)
        return made


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm() -> pre_tokenizers.PreTokenizer:
    """Every digit alone, then as GPT-2."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _llama3() -> pre_tokenizers.PreTokenizer:
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(words), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


CUTS = {"gpt-2": _gpt2, "smollm": _smollm, "llama-bpe": _llama3}
"""How text is cut into words, by tokenizer.ggml.pre."""


def halves(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k from GGUF's order (rotary pairs side by side) to ours (pairs half a head apart)."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
