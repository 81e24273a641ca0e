"""Models that lie on disk: what is found where, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lmworks.core import recipe
from lmworks.core.errors import CheckpointError, RecipeError
from lmworks.model import hf
from lmworks.model.checkpoint import load, locate, write_shape
from lmworks.model.pieces import whole_box
from lmworks.model.pretrained import Pretrained
from tests.serve.runs import CONFIG, make_run

ROWS = torch.arange(20).view(2, 10)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.logits(model(ROWS))
    return result


def test_a_run_folder_means_its_newest_complete_checkpoint(tmp_path: Path) -> None:
    model = make_run(tmp_path, steps=(5, 10, 20))
    newest = tmp_path / "checkpoints" / "step-00000020"
    assert locate(tmp_path).weights == newest
    assert torch.equal(logits(load(tmp_path)), logits(model))
    (newest / "manifest.json").unlink()
    assert locate(tmp_path).weights == tmp_path / "checkpoints" / "step-00000010"


def test_one_checkpoint_can_be_named(tmp_path: Path) -> None:
    make_run(tmp_path, steps=(5, 10))
    where = locate(tmp_path / "checkpoints" / "step-00000005")
    assert where.run == tmp_path
    assert where.config().vocab_size == 257
    assert not torch.equal(logits(load(where.weights)), logits(load(tmp_path)))


def test_a_hugging_face_folder_and_a_fetched_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_run(tmp_path / "run")
    hf.save(model, tmp_path / "home" / "models" / "owner" / "small")
    monkeypatch.setenv("LMWORKS_HOME", str(tmp_path / "home"))
    assert torch.equal(logits(load(Path("owner/small"))), logits(model))


def test_precisions_of_a_loaded_model(tmp_path: Path) -> None:
    make_run(tmp_path)
    model = load(tmp_path, dtype=torch.bfloat16, param_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(ROWS).dtype == torch.bfloat16
    masters = load(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in masters.parameters()} == {torch.float32}


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "quickstart").mkdir()
    with pytest.raises(CheckpointError, match=r"no such folder; did you mean 'quickstart'"):
        locate(tmp_path / "quikstart")
    with pytest.raises(CheckpointError, match="holds no model"):
        locate(tmp_path / "quickstart")
    make_run(tmp_path / "run", steps=())
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        locate(tmp_path / "run")


def test_damaged_weights_are_refused_by_name(tmp_path: Path) -> None:
    make_run(tmp_path)
    file = tmp_path / "checkpoints" / "step-00000005" / "model.safetensors"
    good = file.read_bytes()
    flipped = bytearray(good)
    flipped[-5] ^= 1
    for bad, words in (
        (bytes(flipped), "SHA-256 differs"),
        (good[:-8], r"model\.safetensors: is damaged or cut short"),
    ):
        file.write_bytes(bad)
        with pytest.raises(CheckpointError, match=words):
            load(tmp_path)
    make_run(tmp_path / "earlier", steps=(5, 10))
    (tmp_path / "earlier" / "checkpoints" / "step-00000010" / "model.safetensors").write_bytes(bytes(flipped))
    with pytest.raises(CheckpointError, match="step-00000005"):
        load(tmp_path / "earlier")
    file.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        load(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    make_run(tmp_path)
    write_shape(tmp_path, replace(CONFIG, ffn_size=40))
    with pytest.raises(CheckpointError, match=r"ffn\.gate_proj\.weight is \[48, 32\] there, \[40, 32\]"):
        load(tmp_path)
    write_shape(tmp_path, replace(CONFIG, tied=False))
    with pytest.raises(CheckpointError, match=r"lacks head\.weight"):
        load(tmp_path)
    write_shape(tmp_path, replace(CONFIG, n_layers=1))
    with pytest.raises(CheckpointError, match=r"also holds blocks\.1"):
        load(tmp_path)


def test_pretrained_is_a_part_of_a_recipe(tmp_path: Path) -> None:
    model = make_run(tmp_path)
    part = recipe.decode_part("model", {"use": "pretrained", "path": str(tmp_path)})
    assert isinstance(part, Pretrained)
    assert part.vocab_size == 257
    assert part.with_vocab(200) is part
    with pytest.raises(RecipeError, match="vocabulary of 257, the tokenizer has 300"):
        part.with_vocab(300)
    built = part.build(dtype=torch.float32)
    assert built.config == CONFIG.with_vocab(257)
    values = part.values()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            parameter.copy_(values(name, whole_box(parameter.shape)))
    assert torch.equal(logits(built), logits(model))
    assert part.cost(sequence=8).parameters == sum(parameter.numel() for parameter in model.parameters())


def recipe_with(model: dict[str, object], length: int, tokenizer: object) -> dict[str, object]:
    return {
        "do": "train",
        "steps": 1,
        "batch_size": 1,
        "optimizer": {"use": "adamw", "lr": 1e-3},
        "model": model,
        "data": {"readers": ["python-stdlib"], "sequence_length": length, "tokenizer": tokenizer},
    }


GPT2 = {"use": "gpt2", "n_layers": 1, "hidden_size": 32, "n_heads": 4, "ffn_size": 48, "max_position": 64}


def test_rows_longer_than_a_position_table_are_a_problem_of_the_recipe(tmp_path: Path) -> None:
    recipe.decode(recipe_with(GPT2, 64, "bytes"))
    with pytest.raises(RecipeError, match=r"model\.max_position: .* 64 rows, data\.sequence_length is 65; use 64 or"):
        recipe.decode(recipe_with(GPT2, 65, "bytes"))
    config = recipe.decode_part("model", GPT2).with_vocab(257)
    make_run(tmp_path, config)
    own = {"use": "file", "path": str(tmp_path / "tokenizer")}
    recipe.decode(recipe_with({"use": "pretrained", "path": str(tmp_path)}, 64, own))
    with pytest.raises(RecipeError, match=r"model\.path: the position table has 64 rows"):
        recipe.decode(recipe_with({"use": "pretrained", "path": str(tmp_path)}, 65, own))


def test_a_new_tokenizer_for_a_model_that_exists_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path)
    with pytest.raises(RecipeError, match="'bpe' makes tokens that these weights have not learned") as caught:
        recipe.decode(recipe_with({"use": "pretrained", "path": str(tmp_path)}, 16, "bpe"))
    assert f'path = "{tmp_path / "tokenizer"}"' in str(caught.value)


def test_a_run_that_began_from_a_model_stands_alone_once_its_shape_is_kept(tmp_path: Path) -> None:
    base = make_run(tmp_path / "base")
    hf.save(base, tmp_path / "hf")
    make_run(tmp_path / "tuned", Pretrained(path=str(tmp_path / "hf")))
    before = logits(load(tmp_path / "tuned"))
    write_shape(tmp_path / "tuned", base.config)
    (tmp_path / "hf").rename(tmp_path / "gone")
    assert torch.equal(logits(load(tmp_path / "tuned")), before)
