"""fetch, export, eval, generate and chat as a person meets them, on a run folder of a toy model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmworks.data.tokenizer import Bpe
from lmworks.model import hf
from lmworks.model.checkpoint import load
from tests.cli.conftest import Command
from tests.serve.runs import make_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_run(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def chatty(run: Path, tmp_path: Path) -> Path:
    """A folder with a chat template."""
    hf.save(load(run), tmp_path / "chatty", tokenizer_folder=run / "tokenizer")
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:"
    (tmp_path / "chatty" / "chat_template.jinja").write_text(template)
    return tmp_path / "chatty"


def test_generate_shows_the_prompt_and_what_follows_and_repeats_itself(lmworks: Command, run: Path) -> None:
    words = ("generate", str(run), "--prompt", "def", "--max-tokens", "8", "--seed", "3")
    first = lmworks(*words)
    assert first.code == 0
    assert first.out.startswith("def")
    assert "tokens" in first.err
    assert lmworks(*words).out == first.out
    assert lmworks(*words[:-1], "4").out != first.out


def test_generate_answers_as_json_for_many_prompts(lmworks: Command, run: Path) -> None:
    found = lmworks("generate", str(run), "--prompt", "a", "--prompt", "bcd", "--max-tokens", "4", "--json")
    value = json.loads(found.out)
    assert [answer["prompt"] for answer in value["answers"]] == ["a", "bcd"]
    assert all(0 <= answer["tokens"] <= 4 for answer in value["answers"])
    alone = lmworks("generate", str(run), "--prompt", "a", "--max-tokens", "4", "--json")
    assert json.loads(alone.out)["answers"][0] == value["answers"][0]


def test_generate_reads_a_prompt_from_standard_input(lmworks: Command, run: Path) -> None:
    found = lmworks("generate", str(run), "--max-tokens", "4", "--temperature", "0", stdin="import os")
    assert found.out.startswith("import os")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_generate_in_half_precision(lmworks: Command, run: Path, precision: str) -> None:
    found = lmworks("generate", str(run), "--prompt", "x", "--max-tokens", "4", "--precision", precision, "--json")
    assert found.code == 0
    assert json.loads(found.out)["answers"][0]["tokens"] <= 4


def test_chat_answers_each_line_and_remembers(lmworks: Command, chatty: Path) -> None:
    words = ("chat", str(chatty), "--max-tokens", "4", "--temperature", "0")
    both = lmworks(*words, stdin="hello\nagain\n")
    assert both.code == 0
    alone = lmworks(*words, stdin="hello\n")
    assert both.out.startswith(alone.out.rstrip("\n"))
    anew = lmworks(*words, stdin="hello\n/new\nhello\n")
    assert anew.out == alone.out * 2


def test_chat_with_a_model_that_was_not_tuned_to_answer_is_refused(lmworks: Command, run: Path) -> None:
    found = lmworks("chat", str(run), stdin="hello\n")
    assert found.code == 2
    assert "no chat template" in found.err
    assert "lmworks generate" in found.err


def test_eval_gives_the_figures_of_each_file_and_of_all(lmworks: Command, run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three " * 9)
    (tmp_path / "b.txt").write_text("größer")
    words = ("eval", str(run), "--text", "a.txt", "--text", "b.txt")
    value = json.loads(lmworks(*words, "--json").out)
    assert value["tokens"] == value["bytes"] == 14 * 9 + 8
    assert [row["path"] for row in value["files"]] == ["a.txt", "b.txt"]
    assert value["loss_per_token"] * value["tokens"] == pytest.approx(
        sum(row["loss_per_token"] * row["tokens"] for row in value["files"])
    )
    assert "all" in lmworks(*words).out


def test_eval_refuses_text_that_is_not_utf8(lmworks: Command, run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    found = lmworks("eval", str(run), "--text", "a.txt")
    assert found.code == 1
    assert "a.txt: is not UTF-8: byte 3 is 0xff" in found.err


@pytest.mark.parametrize("words", [("eval", "--text", "a.txt"), ("generate", "--prompt", "x"), ("export", "out")])
def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused(
    lmworks: Command, run: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    (tmp_path / "a.txt").write_text("one two three " * 90)
    Bpe(vocab_size=300).make(["one two three " * 90]).save(run / "tokenizer")
    verb, *rest = words
    found = lmworks(verb, str(run), *rest)
    assert found.code == 1
    assert "tokens, the model has rows for 257" in found.err


def test_eval_of_a_run_and_of_its_folder_agree(lmworks: Command, run: Path, chatty: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three " * 9)
    first, second = (json.loads(lmworks("eval", str(m), "--text", "a.txt", "--json").out) for m in (run, chatty))
    assert first["loss_per_token"] == second["loss_per_token"]


@pytest.mark.slow
def test_export_then_everything_works_on_the_folder(lmworks: Command, run: Path, tmp_path: Path) -> None:
    found = lmworks("export", str(run), "out", "--json")
    assert found.code == 0
    assert json.loads(found.out)["max_difference"] < 1e-5
    again = lmworks("export", str(run), "out")
    assert again.code == 1
    assert "already there" in again.err
    words = ("--prompt", "def", "--max-tokens", "8", "--seed", "3")
    assert lmworks("generate", "out", *words).out == lmworks("generate", str(run), *words).out


def test_a_model_that_is_not_there_is_refused_with_the_nearest_name(lmworks: Command, run: Path) -> None:
    found = lmworks("generate", str(run.with_name("rum")), "--prompt", "x")
    assert found.code == 1
    assert "did you mean 'run'?" in found.err


def test_fetch_of_an_unknown_name_is_refused_with_the_known_ones(lmworks: Command) -> None:
    found = lmworks("fetch", "smollm-135m")
    assert found.code == 2
    assert "did you mean 'smollm2-135m'?" in found.err
    assert "OWNER/NAME" in found.err


def test_fetch_without_a_hub_says_what_to_do(lmworks: Command) -> None:
    pytest.importorskip("huggingface_hub")
    found = lmworks("fetch", "owner/name")
    assert found.code == 1
    assert "hub did not give owner/name" in found.err
    assert "lmworks fetch smollm2-135m" in found.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("generate", "run", "--prompt", "x", "--top-p", "1.5"), "top_p is 1.5"),
        (("generate", "run", "--prompt", "x", "--temperature", "-1"), "temperature"),
        (("generate", "run", "--prompt", "x", "--precision", "int3"), "precision"),
        (("eval", "run", "--text", "a.txt", "--context", "1000"), "1 to 64"),
        (("eval", "run", "--text", "a.txt", "--device", "tpu"), "device"),
        (("generate", "run", "--prompt", "x", "--device", "tpu"), "device"),
        (("chat", "run", "--device", "tpu"), "device"),
    ],
)
def test_settings_outside_their_range_end_with_exit_2(
    lmworks: Command, run: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    (tmp_path / "a.txt").write_text("x")
    found = lmworks(*words)
    assert found.code == 2
    assert message in found.err
