"""Hugging Face folders: what is written byte for byte, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmworks.core.errors import CheckpointError, ExportError
from lmworks.model import hf
from lmworks.model.backbone import Backbone
from lmworks.model.decoder import DecoderConfig
from lmworks.model.gpt2 import GPT2Config
from lmworks.model.init import initialise

CONFIG = DecoderConfig(vocab_size=257, n_layers=2, hidden_size=32, n_heads=4, n_kv_heads=2, ffn_size=48, tied=True)


def model_of(config: Any = CONFIG) -> Backbone:
    model: Backbone = config.build()
    initialise(model, 0)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hf.save(model_of(), tmp_path / "model", tokens=hf.Tokens(bos=0, eos=0))
    return tmp_path / "model"


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    table = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in table.items() if value != "drop"}))


def test_a_round_trip_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    hf.save(hf.load(folder), tmp_path / "again", tokens=hf.Tokens(bos=0, eos=0))
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_a_tied_table_is_written_once(folder: Path) -> None:
    names = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in names
    assert names["model.embed_tokens.weight"].shape == (257, 32)


@pytest.mark.parametrize("limit", [1, 20_000, 10**9])
def test_shards_hold_the_same_tensors_and_none_is_above_the_limit(limit: int, tmp_path: Path) -> None:
    model = model_of()
    hf.save(model, tmp_path / "out", shard_bytes=limit)
    again = hf.load(tmp_path / "out")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(shards) == 1) == (limit == 10**9)
    for shard in shards:
        tensors = load_file(shard)
        assert sum(t.nbytes for t in tensors.values()) <= limit or len(tensors) == 1
    if len(shards) > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())


def test_weights_can_be_written_in_bfloat16(tmp_path: Path) -> None:
    model = model_of()
    hf.save(model, tmp_path / "out", dtype=torch.bfloat16)
    again = hf.load(tmp_path / "out", param_dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.to(torch.bfloat16), again.get_parameter(name))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_occupied_place_is_refused_and_left_alone(folder: Path) -> None:
    before = (folder / "config.json").read_bytes()
    with pytest.raises(ExportError, match="already there"):
        hf.save(model_of(), folder)
    assert (folder / "config.json").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_rope_scaling_of_old_files_is_read(folder: Path) -> None:
    scaling = {
        "type": "llama3",
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    edit(folder, rope_parameters="drop", rope_theta=500, rope_scaling=scaling)
    config = hf.read_folder(folder).config
    assert isinstance(config, DecoderConfig)
    assert config.rope_theta == 500.0
    assert config.rope_scaling is not None
    assert config.rope_scaling.factor == 2.0


def test_an_old_gpt2_folder_without_prefix_and_with_mask_buffers_is_read(tmp_path: Path) -> None:
    model = model_of(GPT2Config(vocab_size=257, n_layers=1, hidden_size=32, n_heads=4, ffn_size=128, max_position=16))
    hf.save(model, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(bare | {"h.0.attn.bias": torch.ones(1, 1, 16, 16)}, file)
    again = hf.load(tmp_path / "out")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


REFUSED = {
    "family": ({"model_type": "bert"}, "model_type"),
    "no family": ({"model_type": "drop"}, "model_type is missing"),
    "activation": ({"hidden_act": "relu"}, 'hidden_act is "relu"'),
    "bias": ({"mlp_bias": True}, "mlp_bias is true"),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters"),
    "old linear": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "unknown": ({"residual_scale": 0.5}, "residual_scale = 0.5"),
    "own code": ({"auto_map": {"AutoModel": "x.y"}}, "auto_map"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "no size": ({"hidden_size": "drop"}, "hidden_size is missing"),
    "windows": ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_value_that_we_do_not_have_is_refused_by_key_and_value(name: str, folder: Path) -> None:
    changes, words = REFUSED[name]
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=words):
        hf.read_folder(folder)


def test_a_key_that_changes_nothing_is_passed_over(folder: Path) -> None:
    edit(folder, _name_or_path="x", initializer_range=0.1, some_future_switch=False)
    assert hf.read_folder(folder).config == CONFIG.__class__(**{**vars(CONFIG), "head_dim": 8})


def test_missing_unknown_and_misshapen_tensors_are_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    good = load_file(file)
    save_file({name: tensor for name, tensor in good.items() if name != "model.norm.weight"}, file)
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.norm\.weight"):
        hf.load(folder)
    save_file(good | {"model.extra.weight": torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match=r"model\.extra\.weight is no part"):
        hf.load(folder)
    save_file(good | {"model.norm.weight": torch.ones(31)}, file)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight gives norm\.weight the shape \[31\]"):
        hf.load(folder)


def test_a_tied_folder_may_hold_the_head_only_if_it_is_the_table(folder: Path) -> None:
    file = folder / "model.safetensors"
    good = load_file(file)
    save_file(good | {"lm_head.weight": good["model.embed_tokens.weight"].clone()}, file)
    hf.load(folder)
    save_file(good | {"lm_head.weight": good["model.embed_tokens.weight"] + 1}, file)
    with pytest.raises(CheckpointError, match="is not the token table"):
        hf.load(folder)


def test_output_bias_of_attention_is_read_only_when_it_is_zero(folder: Path) -> None:
    file = folder / "model.safetensors"
    biases = {}
    for i in range(2):
        for letter, width in (("q", 32), ("k", 16), ("v", 16)):
            biases[f"model.layers.{i}.self_attn.{letter}_proj.bias"] = torch.ones(width)
        biases[f"model.layers.{i}.self_attn.o_proj.bias"] = torch.zeros(32)
    edit(folder, attention_bias=True)
    good = load_file(file) | biases
    save_file(good, file)
    assert hf.load(folder).get_parameter("blocks.0.attn.q_proj.bias").sum() == 32
    save_file(good | {"model.layers.1.self_attn.o_proj.bias": torch.ones(32)}, file)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.o_proj\.bias"):
        hf.load(folder)


def test_damaged_files_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is damaged"):
        hf.load(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        hf.load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="pickled"):
        hf.load(folder)
    hf.save(model_of(), tmp_path / "sharded", shard_bytes=20_000)
    next((tmp_path / "sharded").glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match="model-00002"):
        hf.load(tmp_path / "sharded")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        hf.load(tmp_path)
