"""Verbs as a person meets them: help, answers, JSON, and mistakes that end with a message and exit code 2."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmworks.cli import app as commands
from lmworks.core import catalogue
from tests.cli.conftest import Command
from tests.train import toy


@pytest.mark.parametrize("verb", sorted(commands.VERBS))
def test_every_verb_has_help_with_an_example(lmworks: Command, verb: str) -> None:
    answer = lmworks(verb, "--help")
    assert answer.code == 0
    assert re.search(r"Example: .*lmworks", answer.out)


def test_no_verb_shows_help_and_all_verbs(lmworks: Command) -> None:
    answer = lmworks()
    assert answer.code in (0, 2)
    assert all(verb in answer.out + answer.err for verb in commands.VERBS)


def test_a_wrong_verb_is_a_usage_error(lmworks: Command) -> None:
    answer = lmworks("trian")
    assert answer.code == 2
    assert "train" in answer.err


def test_methods_lists_every_part(lmworks: Command) -> None:
    listed = json.loads(lmworks("methods", "--json").out)
    assert {(row["slot"], row["name"]) for row in listed} == {
        (slot, name) for slot, shelf in catalogue.SLOTS.items() for name in shelf.parts
    }
    only = json.loads(lmworks("methods", "--slot", "optimizer", "--json").out)
    assert {row["slot"] for row in only} == {"optimizer"}


def test_methods_shows_the_settings_of_a_part(lmworks: Command) -> None:
    answer = lmworks("methods", "adamw")
    assert answer.code == 0
    assert re.search(r"^weight_decay +0\.1 ", answer.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("methods", "adamv"), "did you mean 'adamw'"),
        (("methods", "--slot", "optimiser"), "did you mean 'optimizer'"),
        (("train", "quickstrat"), "did you mean 'quickstart'"),
        (("train", "quickstart", "--set", "optimizer.rl=1"), "optimizer.rl: adamw has no setting 'rl'"),
        (("train", "quickstart", "--set", "steps=zero"), "steps: got 'zero'"),
        (("train", "quickstart", "--set", "device=tpu"), "device"),
    ],
)
def test_a_mistake_ends_with_a_message_and_exit_code_2(lmworks: Command, words: tuple[str, ...], wanted: str) -> None:
    answer = lmworks(*words)
    assert answer.code == 2
    assert wanted in answer.err
    assert "Traceback" not in answer.err


def test_check_prints_the_resolved_recipe_and_runs_nothing(lmworks: Command, tmp_path: Path) -> None:
    answer = lmworks("train", "quickstart", "--check", "--set", "steps=77", "--set", "schedule.warmup=1")
    assert answer.code == 0
    assert "steps = 77" in answer.out
    assert list(tmp_path.iterdir()) == []


def test_train_ends_with_the_run_folder_and_goes_on_when_asked_again(lmworks: Command, tmp_path: Path) -> None:
    import tomli_w

    text = toy.corpus(tmp_path / "text")
    (tmp_path / "small.toml").write_text(tomli_w.dumps(toy.table(text, tmp_path / "cache", steps=3, checkpoints={})))
    answer = lmworks("train", "small.toml")
    assert answer.code == 0, answer.err
    assert answer.out.strip() == "runs/small"
    assert "step 3/3" in answer.err
    again = lmworks("train", "small.toml")
    assert again.code == 0
    assert "already done" in again.err


def test_a_machine_that_refuses_is_told_without_a_trace(lmworks: Command, tmp_path: Path) -> None:
    text = toy.corpus(tmp_path / "text")
    (tmp_path / "out").write_text("a file where a folder should be")
    answer = lmworks("tokenizer", "train", str(text / "*.txt"), "--vocab-size", "300", "--out", "out/tok")
    assert answer.code == 1
    assert "Not a directory" in answer.err
    assert "Traceback" not in answer.err


def test_a_new_tokenizer_is_trained_and_shown(lmworks: Command, tmp_path: Path) -> None:
    text = toy.corpus(tmp_path / "text")
    made = json.loads(
        lmworks("tokenizer", "train", str(text / "*.txt"), "--vocab-size", "300", "--out", "tok", "--json").out
    )
    assert made["vocab_size"] <= 300
    shown = json.loads(lmworks("tokenizer", "show", "tok", "--text", "line 0", "--json").out)
    assert "".join(shown["pieces"]) == "line 0"
    assert lmworks("tokenizer", "train", "--out", "tok").code == 2


def test_the_doctor_finds_training_in_order(lmworks: Command) -> None:
    answer = lmworks("doctor", "--json")
    found = {row["what"]: row["state"] for row in json.loads(answer.out)}
    assert found["python"] == found["training"] == found["cache"] == "ok"
    assert answer.code == (1 if "broken" in found.values() else 0)


@pytest.mark.slow
def test_help_is_there_before_a_person_wonders() -> None:
    """The bar is 0.3 s on a quiet machine (benchmarks/start_up.py); this only catches an import of torch."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "lmworks", "--help"], check=True, capture_output=True)
    assert time.perf_counter() - start < 5.0
