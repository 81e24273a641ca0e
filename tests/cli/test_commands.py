"""Verbs as a person meets them: help, answers, JSON, and mistakes that end with a message and exit code 2."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from lmworks.cli import app as commands
from lmworks.cli import quickstart
from lmworks.core import catalogue
from lmworks.core.papers import METHODS
from lmworks.core.run import RunFolder
from tests.cli.conftest import Command
from tests.train import toy

PLANNED = next(name for name, method in METHODS.items() if method.planned)


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


def test_methods_lists_every_published_method_without_torch(lmworks: Command) -> None:
    listed = json.loads(lmworks("methods", "--json").out)
    assert [row["name"] for row in listed] == list(METHODS)
    assert {row["name"] for row in listed if not row["planned"]} >= {"sophia", "colm", "megascale"}
    call = "from lmworks.cli.methods import methods; methods(None, None, False, False)"
    code = f"import sys; {call}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_methods_lists_every_part(lmworks: Command) -> None:
    listed = json.loads(lmworks("methods", "--parts", "--json").out)
    assert {(row["slot"], row["name"]) for row in listed} == {
        (slot, name) for slot, shelf in catalogue.SLOTS.items() for name in shelf.parts
    }
    only = json.loads(lmworks("methods", "--slot", "optimizer", "--json").out)
    assert {row["slot"] for row in only} == {"optimizer"}
    assert {row["name"] for row in only if row["published"]} == {"sophia", "lamb", "coat"}


def test_methods_shows_a_page_with_settings_and_claims(lmworks: Command) -> None:
    answer = lmworks("methods", "sophia")
    assert answer.code == 0
    for wanted in ("## How it works", "## optimizer =", "## Claims", "## Evidence"):
        assert wanted in answer.out
    value = json.loads(lmworks("methods", "sophia", "--json").out)
    assert {part["name"] for part in value["parts"]} >= {"sophia"}
    assert value["claims"]
    planned = lmworks("methods", PLANNED)
    assert planned.code == 0
    assert "Planned" in planned.out
    assert "lmworks methods megascale" in lmworks("methods", "lamb").out


def test_a_planned_method_has_nothing_to_prove(lmworks: Command) -> None:
    answer = lmworks("prove", PLANNED)
    assert answer.code == 2
    assert "planned" in answer.err


def test_prove_checks_a_shipped_proof_by_the_methods_name(lmworks: Command) -> None:
    answer = lmworks("prove", "megascale", "--check", "--seeds", "5")
    assert answer.code == 0
    assert 'method = "megascale"' in answer.out
    assert re.search(r"seeds = \[\s*1,\s*2,\s*3,\s*4,\s*5,?\s*\]", answer.out)


@pytest.mark.slow
def test_compare_two_recipes_with_one_seed_shows_both_and_refuses_a_verdict(lmworks: Command, tmp_path: Path) -> None:
    import tomli_w

    shared = toy.table(toy.corpus(tmp_path / "text"), tmp_path / "cache", steps=4, checkpoints={})
    for name, rate in (("low", 1e-3), ("high", 1e-2)):
        shared["optimizer"] = {"use": "adamw", "lr": rate}
        (tmp_path / f"{name}.toml").write_text(tomli_w.dumps(shared))
    words = ("compare", str(tmp_path / "low.toml"), str(tmp_path / "high.toml"), "--seeds", "1", "--json")
    answer = lmworks(*words, "--set", "batch_size=2", "--out", str(tmp_path / "out"))
    assert answer.code == 0, answer.err
    content = json.loads(answer.out)
    assert [arm["name"] for arm in content["arms"]] == ["low", "high"]
    (finding,) = content["findings"]
    assert finding["verdict"] == "refused"
    assert (tmp_path / "out" / "report.html").is_file()
    assert "two recipes" in lmworks("compare", "quickstart").err


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
    assert tomllib.loads(answer.out)["steps"] == 77, "what it takes in memory stands in comments"
    assert "# optimizer state          20.5 MB" in answer.out
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
    assert found["float8"] == ("ok" if importlib.util.find_spec("torchao") is not None else "absent")
    assert answer.code == (1 if "broken" in found.values() else 0)


@pytest.mark.slow
def test_help_is_there_before_a_person_wonders() -> None:
    """The bar is 0.3 s on a quiet machine (benchmarks/start_up.py); this only catches an import of torch."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "lmworks", "--help"], check=True, capture_output=True)
    assert time.perf_counter() - start < 5.0


def test_quickstart_without_prompts_or_held_out_documents_still_ends_with_an_answer(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert "samples.prompts is empty" in quickstart._sample(folder)
    figures = {"parameters": 1, "tokens": 2, "tokens_per_second": 3.0, "peak_memory_bytes": 4}
    folder.summary.write_text(json.dumps(figures))
    seen = quickstart.Killed(step=3, checkpoint=2, rows={})
    found = quickstart._result(folder, seen=seen, same=1, proof={"max_difference": 0.0}, seconds=1.0)
    assert "validation_loss" not in found
    folder.summary.write_text(json.dumps({**figures, "val_loss": 1.23456, "val_bits_per_byte": 2.0}))
    found = quickstart._result(folder, seen=seen, same=1, proof={"max_difference": 0.0}, seconds=1.0)
    assert found["validation_loss"] == 1.2346
