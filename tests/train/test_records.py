"""What a run leaves behind and tells, whom it keeps out, and what it goes on from."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lmworks.core import files
from lmworks.core.errors import CheckpointError, DataError, LmworksError, RecipeError, Stopped, UsageError
from lmworks.core.journal import rows
from lmworks.data.tokenizer import Bpe
from lmworks.model.checkpoint import complete, step_of
from lmworks.train import loop, records, save
from lmworks.train.loop import run
from tests.train import toy


def test_going_back_in_the_same_folder_leaves_no_stale_checkpoint(text: Path, cache: Path, tmp_path: Path) -> None:
    made = toy.recipe(text, cache)
    whole, _ = toy.train(made, tmp_path / "run")
    losses = toy.learned(whole)
    back = complete(whole.checkpoints)[0]
    assert step_of(back) == 8
    stop = toy.StopAt(9, signal.SIGTERM)
    with pytest.raises(Stopped):
        run(made, whole.path, resume=str(back), report=stop)
    assert [step_of(path) for path in complete(whole.checkpoints)] == [8, 9]
    assert "deleted: 12" in " ".join(stop.notes)
    folder, report = toy.train(made, whole.path)
    assert "going on from step 9" in " ".join(report.notes)
    assert toy.learned(folder) == losses


def test_events_say_how_an_attempt_ended(text: Path, cache: Path, tmp_path: Path) -> None:
    class Broken(toy.Silent):
        """Fails at a row."""

        def row(self, row: dict[str, Any]) -> None:
            if row["step"] == 5:
                raise ValueError("the fifth row")

    made, path = toy.recipe(text, cache), tmp_path / "run"
    toy.stopped(made, path, 3)
    with pytest.raises(ValueError, match="the fifth row"):
        run(made, path, resume="auto", report=Broken())
    toy.train(made, path)
    ends = [event for event in rows(path / "events.jsonl") if event["name"] in ("stopped", "failed")]
    assert [(event["name"], event["attrs"]["reason"]) for event in ends] == [
        ("stopped", "got SIGTERM"),
        ("failed", "ValueError: the fifth row"),
    ]


def test_a_second_process_in_the_folder_is_refused(text: Path, cache: Path, tmp_path: Path) -> None:
    made = toy.recipe(text, cache, steps=2)
    refusals = []

    class Greedy(toy.Silent):
        """Starts the same run again while it goes."""

        def row(self, row: dict[str, Any]) -> None:
            with pytest.raises(LmworksError, match=rf"another process trains here \(pid {os.getpid()}\)") as caught:
                toy.train(made, tmp_path / "run")
            refusals.append(caught.value)

    run(made, tmp_path / "run", resume="auto", report=Greedy())
    assert refusals


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"watchers": [{"use": "early-stop", "patience": 9}]}, "watchers: none there, early-stop in this recipe"),
        ({"optimizer": {"use": "lion", "lr": 1e-3}}, "optimizer: adamw there, lion in this recipe"),
        ({"gradient": []}, "gradient: clip there, none in this recipe"),
    ],
)
def test_a_checkpoint_of_other_parts_is_refused(
    change: dict[str, Any], words: str, text: Path, cache: Path, tmp_path: Path
) -> None:
    whole, _ = toy.train(toy.recipe(text, cache, steps=4), tmp_path / "a")
    made = toy.recipe(text, cache, validation={"every": 2}, **change)
    with pytest.raises(CheckpointError, match=words):
        toy.train(made, tmp_path / "b", resume=str(complete(whole.checkpoints)[-1]))


def test_a_new_folder_may_go_on_with_another_rate_and_says_so(text: Path, cache: Path, tmp_path: Path) -> None:
    first, _ = toy.train(toy.recipe(text, cache, steps=4), tmp_path / "a")
    made = toy.recipe(text, cache, steps=8, optimizer={"use": "adamw", "lr": 1e-3})
    folder, report = toy.train(made, tmp_path / "b", resume=str(complete(first.checkpoints)[-1]))
    assert "optimizer.lr 0.01 -> 0.001" in " ".join(report.notes)
    parent = json.loads(folder.record.read_text())["parent"]
    manifest = complete(first.checkpoints)[-1] / "manifest.json"
    assert parent == {"path": str(manifest.parent), "sha256": files.sha256_of(manifest)}


@pytest.mark.parametrize("error", [UsageError("the logits are not finite"), RuntimeError("can't allocate memory")])
def test_a_text_that_cannot_be_written_costs_no_checkpoint(
    error: Exception, text: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*words: Any, **more: Any) -> None:
        raise error

    monkeypatch.setattr(loop, "sample", fails)
    folder, report = toy.train(toy.recipe(text, cache, steps=4, samples={"prompts": ["li"]}), tmp_path / "run")
    assert folder.is_done()
    assert [step_of(path) for path in complete(folder.checkpoints)] == [4]
    assert f"no sample, the run goes on: {error}" in report.notes
    assert "sample failed" in {event["name"] for event in rows(folder.events)}


def test_a_prompt_longer_than_the_position_table_is_told_before_the_first_step(
    text: Path, cache: Path, tmp_path: Path
) -> None:
    model = {"use": "gpt2", "n_layers": 1, "hidden_size": 32, "n_heads": 2, "ffn_size": 48, "max_position": 32}
    made = toy.recipe(text, cache, model=model, samples={"prompts": ["ok", "x" * 40]})
    with pytest.raises(RecipeError, match=r"samples\.prompts\.1: is 41 tokens long, the model has 32 positions"):
        toy.train(made, tmp_path / "run")


def test_the_record_has_every_attempt_and_the_hardware(text: Path, cache: Path, tmp_path: Path) -> None:
    made = toy.recipe(text, cache, threads=1)
    toy.stopped(made, tmp_path / "run", 5)
    before = json.loads((tmp_path / "run" / "record.json").read_text())
    folder, _ = toy.train(made, tmp_path / "run")
    record = json.loads(folder.record.read_text())
    assert record["id"] == before["id"]
    assert [attempt["step"] for attempt in record["attempts"]] == [0, 5]
    assert record["attempts"][0] == before["attempts"][0]
    assert record["parent"]["path"].endswith("step-00000005")
    assert record["hardware"]["threads"] == 1
    assert record["hardware"]["device"] == "cpu"


def test_weights_that_a_run_began_with_are_in_its_record(text: Path, cache: Path, tmp_path: Path) -> None:
    first, _ = toy.train(toy.recipe(text, cache, steps=2), tmp_path / "a")
    model = {"use": "pretrained", "path": str(first.path)}
    data = toy.table(text, cache)["data"]
    made = toy.recipe(
        text, cache, steps=2, model=model, data={**data, "tokenizer": {"use": "file", "path": str(first.tokenizer)}}
    )
    folder, _ = toy.train(made, tmp_path / "b")
    file = complete(first.checkpoints)[-1] / "model.safetensors"
    want = {"path": str(first.path), "sha256": {"model.safetensors": files.sha256_of(file)}}
    assert json.loads(folder.record.read_text())["pretrained"] == want


def test_a_tokenizer_of_other_tokens_than_the_models_is_refused(text: Path, cache: Path, tmp_path: Path) -> None:
    first, _ = toy.train(toy.recipe(text, cache, steps=2), tmp_path / "a")
    other = Bpe(vocab_size=257).make(["some text"])
    other.save(tmp_path / "other")
    model = {"use": "pretrained", "path": str(first.path)}
    data = {**toy.table(text, cache)["data"], "tokenizer": {"use": "file", "path": str(tmp_path / "other")}}
    with pytest.raises(DataError, match="tokens are others in the recipe's tokenizer"):
        toy.train(toy.recipe(text, cache, steps=2, model=model, data=data), tmp_path / "b")


def test_documents_that_are_left_out_are_told(cache: Path, tmp_path: Path) -> None:
    text = toy.corpus(tmp_path / "text")
    (text / "latin.txt").write_bytes("größer".encode("latin-1"))
    (text / "empty.txt").write_text(" ")
    _, report = toy.train(toy.recipe(text, cache, steps=1), tmp_path / "run")
    (told,) = [note for note in report.notes if "left out" in note]
    assert told.startswith("text: 40 documents kept, 2 left out: ")
    assert "1 not utf-8 (" in told
    assert "latin.txt" in told
    assert "1 empty (" in told


def test_rows_are_on_disk_before_the_checkpoint_that_they_led_to(
    text: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noted(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    made = toy.recipe(text, cache, steps=4, samples={"prompts": ["li"], "tokens": 2})
    toy.train(made, tmp_path / "run")
    last = max(i for i, name in enumerate(synced) if "manifest.json" in name)
    assert {"metrics.jsonl", "samples.jsonl"} <= set(synced[:last])


def test_the_summary_counts_time_and_memory_over_all_attempts(
    text: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(toy.StopAt):
        """Takes its time before it stops."""

        def begin(self, step: int, steps: int) -> None:
            time.sleep(2.0)

    made = toy.recipe(text, cache)
    with monkeypatch.context() as patch:
        patch.setattr(records, "peak_memory_bytes", lambda device: 2**50)
        with pytest.raises(Stopped):
            run(made, tmp_path / "run", resume="auto", report=Slow(3, signal.SIGTERM))
    folder, _ = toy.train(made, tmp_path / "run")
    summary = json.loads(folder.summary.read_text())
    assert summary["wall_seconds"] > 2.0 + summary["seconds"]
    assert summary["peak_memory_bytes"] == 2**50


def test_a_signal_while_documents_are_made_ready_stops_the_run(text: Path, tmp_path: Path) -> None:
    class Impatient(toy.Silent):
        """Sends a signal as soon as something is told."""

        def preparing(self, **facts: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    made = toy.recipe(text, tmp_path / "cache")
    with pytest.raises(Stopped, match="while documents were made ready: got SIGTERM"):
        run(made, tmp_path / "run", resume="auto", report=Impatient())
    folder, _ = toy.train(made, tmp_path / "run")
    assert folder.is_done()


def test_every_default_generator_is_seeded_by_the_recipe(text: Path, cache: Path, tmp_path: Path) -> None:
    states = []
    for name in ("a", "b"):
        torch.manual_seed(len(name + str(states)))
        folder, _ = toy.train(toy.recipe(text, cache, steps=2), tmp_path / name)
        states.append(save.read(complete(folder.checkpoints)[-1]).tensors["random"]["cpu"])
    assert torch.equal(*states)


EARLY = {"watchers": ["early-stop"]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (EARLY, r"watchers\.0: has no effect without validation\.every"),
        ({**EARLY, "data": 0}, r"watchers\.0: has no effect: data\.validation is 0"),
        ({"validation": {"every": 2}, "data": 0}, r"validation\.every: has no effect"),
        ({"validation": {"rows": 2}, "data": 0}, r"validation\.rows: has no effect"),
        (
            {"optimizer": {"use": "sgd", "lr": 0.1, "momentum": 0.0, "nesterov": True}},
            r"optimizer\.nesterov: looks along",
        ),
    ],
)
def test_settings_without_effect_are_refused(change: dict[str, Any], words: str, text: Path, cache: Path) -> None:
    if "data" in change:
        change = {**change, "data": {**toy.table(text, cache)["data"], "validation": 0}}
    with pytest.raises(RecipeError, match=words):
        toy.recipe(text, cache, **change)
