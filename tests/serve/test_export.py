"""Export: written, read in a fresh process, compared; nothing is left that was not proved."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmworks.core.errors import CheckpointError, ExportError
from lmworks.generate.writer import open_writer
from lmworks.model import hf
from lmworks.serve.export import export_model
from lmworks.serve.proof import prove, token_rows
from tests.serve.runs import CONFIG, make_run

pytestmark = pytest.mark.slow  # each starts a process that imports torch: 2 s and more


def test_a_tied_run_is_exported_and_proved_with_both_readers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = make_run(tmp_path / "run")
    report = export_model(tmp_path / "run", tmp_path / "out")
    assert {check["reader"] for check in report["checks"]} == {"lmworks", "transformers"}
    assert report["max_difference"] <= 1e-5
    assert report["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_the_exported_tokenizer_begins_a_text_as_training_did(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    make_run(tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "out", transformers=False)
    run, out = open_writer(tmp_path / "run"), open_writer(tmp_path / "out")
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("def f")["input_ids"]
    assert run.ids("def f") == out.ids("def f") == ids
    assert ids[0] == run.tokenizer.bos
    assert run.stop == out.stop


def test_bfloat16_weights_are_compared_with_the_rounded_model(tmp_path: Path) -> None:
    make_run(tmp_path / "run", replace(CONFIG, tied=False))
    report = export_model(tmp_path / "run", tmp_path / "out", dtype="bf16", shard_bytes=20_000, transformers=False)
    assert report["max_difference"] <= 1e-6
    assert report["rounding_difference"] > 1e-5
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


def test_a_folder_that_fails_the_proof_is_not_left(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    with pytest.raises(ExportError, match="lmworks gives other logits"):
        export_model(tmp_path / "run", tmp_path / "out", tolerance=-1.0, transformers=False)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_changed_weight_fails_the_proof_with_its_place(tmp_path: Path) -> None:
    model = make_run(tmp_path / "run")
    hf.save(model, tmp_path / "out")
    rows_BT = token_rows(model, None)
    prove(model, tmp_path / "out", rows_BT=rows_BT, transformers=False)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 7] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"largest difference .* at row \d, position \d+, token \d+, logit \d+"):
        prove(model, tmp_path / "out", rows_BT=rows_BT, transformers=False)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ExportError, match="a fresh process cannot read the folder"):
        prove(model, tmp_path / "out", rows_BT=rows_BT, transformers=False)


def test_a_hugging_face_folder_keeps_its_special_tokens_and_template(tmp_path: Path) -> None:
    model = make_run(tmp_path / "run")
    source = tmp_path / "source"
    hf.save(model, source, tokenizer_folder=tmp_path / "run" / "tokenizer", tokens=hf.Tokens(bos=3, eos=7, pad=9))
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    export_model(source, tmp_path / "out", transformers=False)
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [found[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")] == [3, 7, 9]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_the_card_says_what_is_known(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"tokens": 12345, "val_loss": 2.5}))
    export_model(tmp_path / "run", tmp_path / "out", transformers=False)
    card = (tmp_path / "out" / "README.md").read_text()
    for words in ("library_name: transformers", "| tokens seen | 12345 |", "| validation loss | 2.5 |", 'do = "train"'):
        assert words in card


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step-00000005" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(CheckpointError):
        export_model(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_logits_are_compared_on_real_tokens(tmp_path: Path) -> None:
    model = make_run(tmp_path / "run")
    writer = open_writer(tmp_path / "run")
    rows_BT = token_rows(model, writer.tokenizer)
    assert rows_BT.shape == (2, 64)
    assert writer.tokenizer.decode(rows_BT[0].tolist()).startswith("# Author:")
    assert torch.equal(rows_BT, token_rows(model, writer.tokenizer))
