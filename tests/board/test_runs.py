"""Which folders are runs, what they are called, and how they go: running, done, stopped, failed, dead."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lmworks.board.facts import differences, run_facts
from lmworks.board.runs import Run, Runs
from lmworks.core.events import Events
from lmworks.core.run import RunFolder
from tests.board import folders

GONE = 4_194_303
"""A process number that no machine gives by default."""


def only(path: Path) -> Run:
    """The one run below a folder."""
    (found,) = Runs([path]).all()
    return found


def test_runs_are_found_below_folders_and_named_by_where_they_lie(tmp_path: Path) -> None:
    folders.make(tmp_path / "runs" / "a")
    folders.make(tmp_path / "runs" / "proof" / "runs" / "b")
    folders.make(tmp_path / "elsewhere" / "c")
    (tmp_path / "runs" / "not-a-run").mkdir()
    (tmp_path / "runs" / "a" / "checkpoints" / "x").mkdir()
    (tmp_path / "runs" / "round").symlink_to(tmp_path / "runs", target_is_directory=True)
    assert [run.name for run in Runs([tmp_path / "runs"]).all()] == ["a", "proof/runs/b"]
    assert [run.name for run in Runs([tmp_path / "runs" / "a"]).all()] == ["a"]
    both = Runs([tmp_path / "runs", tmp_path / "elsewhere"])
    assert [run.name for run in both.all()] == ["elsewhere/c", "runs/a", "runs/proof/runs/b"]


def test_an_id_stays_and_a_folder_that_goes_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmworks.board.runs.LOOK_EVERY", 0.0)
    monkeypatch.setattr("lmworks.board.runs.LOOKS_EVERY", 0)
    path = folders.make(tmp_path / "a")
    runs = Runs([tmp_path])
    (run,) = runs.all()
    assert Runs([tmp_path]).get(run.id).path == run.path
    assert runs.get(run.id) is run
    path.rename(tmp_path / "b")
    assert runs.get(run.id) is None


@pytest.mark.parametrize("asked", ["../a", "/etc", "", "a", "%2e%2e", "runs"])
def test_a_path_is_no_id(tmp_path: Path, asked: str) -> None:
    folders.make(tmp_path / "a")
    assert Runs([tmp_path]).get(asked) is None


def test_a_run_that_is_done(tmp_path: Path) -> None:
    folders.make(tmp_path / "a")
    row = only(tmp_path).row()
    assert (row["status"], row["step"], row["steps"], row["seconds_left"]) == ("done", 200, 200, None)
    assert row["val_loss"] == pytest.approx(3.0 * (1.05 + 0.0067379), rel=1e-4)
    assert row["tokens_per_second"] == pytest.approx(10_000, rel=0.05)
    assert 10 <= len(row["curve"]) <= 60


def test_a_run_whose_lock_is_held_runs(tmp_path: Path) -> None:
    path = folders.make(tmp_path / "a", steps=150, done=False)
    folders.silent(path, 3600)  # a step of an hour
    with RunFolder(path).alone():
        row = only(tmp_path).row()
    assert row["status"] == "running"
    assert row["seconds_left"] == pytest.approx(50 * 0.1)


def test_a_run_that_was_killed_is_dead(tmp_path: Path) -> None:
    path = folders.make(tmp_path / "a", done=False)
    hold = (
        "import sys, time; from pathlib import Path; from lmworks.core.run import RunFolder\n"
        f"with RunFolder(Path({str(path)!r})).alone():\n    print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        folders.silent(path, 30)
        assert only(tmp_path).row()["status"] == "running"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    row = only(tmp_path).row()
    assert row["status"] == "dead"
    assert f"process {process.pid} is gone" in row["why"]


def test_a_lock_that_nobody_holds_is_believed_while_rows_come(tmp_path: Path) -> None:
    path = folders.make(tmp_path / "a", done=False)
    folders.lock(path, GONE)
    folders.silent(path, 0)
    assert only(tmp_path).row()["status"] == "running"
    folders.silent(path, 30)
    assert only(tmp_path).row()["status"] == "dead"


def test_a_run_of_another_machine_may_be_silent_for_longer(tmp_path: Path) -> None:
    path = folders.make(tmp_path / "a", done=False)
    record = json.loads((path / "record.json").read_text())
    record["attempts"][-1]["hardware"]["system"] = "Linux of a cluster"
    (path / "record.json").write_text(json.dumps(record))
    folders.lock(path, GONE)
    folders.silent(path, 30)
    assert only(tmp_path).status(None) == ("running", "on another machine")
    folders.silent(path, 61)
    assert only(tmp_path).status(None)[0] == "dead"
    assert only(tmp_path).status(10.0)[0] == "running"


def test_how_a_run_ended_is_in_its_events(tmp_path: Path) -> None:
    path = folders.make(tmp_path / "a", steps=20, done=False)
    assert only(tmp_path).row()["status"] == "stopped"
    events = Events(path / "events.jsonl", run="a")
    events.write("failed", reason="NonFinite: loss is nan")
    events.flush()
    assert only(tmp_path).status(None) == ("failed", "NonFinite: loss is nan")
    events.write("start")
    events.write("stopped", reason="got SIGTERM")
    events.flush()
    assert only(tmp_path).status(None) == ("stopped", "got SIGTERM. The same command goes on.")


def test_recipes_are_held_against_each_other(tmp_path: Path) -> None:
    folders.make(tmp_path / "a", optimizer={"use": "adamw", "lr": 1e-3})
    folders.make(tmp_path / "b", optimizer={"use": "sophia", "lr": 2e-3, "rho": 0.04})
    folders.make(tmp_path / "c", seed=2)
    found = {one["path"]: one["values"] for one in differences(Runs([tmp_path]).all())}
    assert found == {
        "optimizer.use": ["adamw", "sophia", "adamw"],
        "optimizer.lr": [1e-3, 2e-3, 1e-3],
        "optimizer.rho": [None, 0.04, None],
        "seed": [1, 1, 2],
    }


def test_the_facts_of_a_run(tmp_path: Path) -> None:
    folders.make(tmp_path / "a")
    facts = run_facts(only(tmp_path))
    assert facts["samples"] == [{"step": 200, "prompt": "def read_", "text": "file(path):\n    return path"}]
    assert facts["memory"][0]["classes"][0] == {"name": "weights", "predicted": 40_000_000, "measured": 42_800_000}
    assert facts["command"] == "lmworks train toy"
    assert 'use = "adamw"' in facts["recipe"]


@pytest.mark.parametrize("damaged", ["record.json", "recipe.toml", "summary.json", "metrics.jsonl", "events.jsonl"])
@pytest.mark.parametrize("bytes_", [b"", b"[]", b"null\n[1]\n", b"\xff\xfe", b'{"attempts": 3, "command": "x"}\n'])
def test_damaged_files_show_less_and_break_nothing(tmp_path: Path, damaged: str, bytes_: bytes) -> None:
    path = folders.make(tmp_path / "a")
    (path / damaged).write_bytes(bytes_)
    run = only(tmp_path)
    facts = run_facts(run)
    json.dumps([facts, run.curves.picture(), run.system.time()], allow_nan=False)
    assert facts["name"] == "a"
