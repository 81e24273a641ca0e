"""GGUF files: order of rows, names, tokenizers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from lmworks.core.errors import CheckpointError
from lmworks.data.tokenizer import load_tokenizer
from lmworks.model import hf
from lmworks.model.backbone import Backbone
from lmworks.model.decoder import DecoderConfig
from lmworks.model.gguf import PLACES, GGUFModel, halves

TOKENS = ["<|endoftext|>", *(chr(c) for c in range(ord("!"), ord("~") + 1)), "Ġ", "Ġa", "he"]
CONFIG = DecoderConfig(
    vocab_size=len(TOKENS),
    n_layers=2,
    hidden_size=32,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    ffn_size=64,
    max_position=128,
)


def pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Hugging Face's order of q and k to GGUF's, as llama.cpp's converter has it."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, model: Backbone, *, arch: str = "llama", pre: str = "smollm", **more: Any) -> None:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(CONFIG.n_layers)
    writer.add_context_length(CONFIG.max_position)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(CONFIG.norm_eps)
    writer.add_rope_freq_base(500.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_token_merges(["Ġ a", "h e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages }}")
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        words = module.split(".", 2)
        stored = f"blk.{words[1]}.{PLACES[words[2]]}" if words[0] == "blocks" else PLACES[module]
        value = parameter.detach()
        if module.endswith(("q_proj", "k_proj")):
            value = pairs(value, value.shape[0] // 8)
        writer.add_tensor(f"{stored}.{kind}", value.numpy().astype(np.float32))
    for name, value in more.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def model() -> Backbone:
    made: Backbone = CONFIG.build()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (3, 8), (2, 64)])
def test_rows_of_q_and_k_come_back_in_our_order(heads: int, head_dim: int) -> None:
    rows = torch.randn(heads * head_dim, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(halves(pairs(rows, heads), head_dim), rows)


def test_a_model_comes_back_with_its_shape_weights_and_tokenizer(model: Backbone, tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", model)
    found = GGUFModel(tmp_path / "a.gguf")
    assert found.config == DecoderConfig(**{**vars(CONFIG), "rope_theta": 500.0})
    assert found.tokens == hf.Tokens(bos=0, eos=0)
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter), name
    for name, text in found.tokenizer_files().items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == len(TOKENS)
    ids = tokenizer.encode("the a  12").tolist()
    assert [TOKENS[i] for i in ids] == ["t", "he", "Ġa", "Ġ", "Ġ", "1", "2"]
    assert tokenizer.decode(ids) == "the a  12"
    raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert raw.encode("a<|endoftext|>").ids[-1] == 0
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_model_that_we_do_not_have_is_refused_by_name(model: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, model, **{"blk.0.attn_q.bias": np.zeros(32, dtype=np.float32)})
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_q\.bias is no part"):
        GGUFModel(path)
    write_gguf(path, model, **{"rope_freqs.weight": np.ones(4, dtype=np.float32)})
    with pytest.raises(CheckpointError, match="scaled rotary positions"):
        GGUFModel(path)
    write_gguf(path, model, pre="mystery")
    with pytest.raises(CheckpointError, match="pre-tokenizer 'mystery'"):
        GGUFModel(path).tokenizer_files()
    write_gguf(path, model, arch="gemma")
    with pytest.raises(CheckpointError, match=r"general\.architecture = gemma"):
        GGUFModel(path)
    path.write_bytes(b"GGUF nonsense")
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        GGUFModel(path)
