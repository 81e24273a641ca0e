"""Runs whose store is slow, full or killed: training goes on, all ranks alike, and what is missing is said."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest

from lmworks.core import recipe as recipes
from lmworks.core.errors import CheckpointError, RecipeError
from lmworks.core.journal import rows
from lmworks.core.run import RunFolder
from lmworks.model.checkpoint import complete, step_of
from lmworks.parallel import gang
from lmworks.train import save
from tests.train import ranked, toy


def events(folder: RunFolder) -> list[tuple[str, int]]:
    """What became of checkpoints: the event's name, and of which step."""
    return [(row["name"], row["attrs"]["of"]) for row in rows(folder.events) if "checkpoint" in row["name"]]


def full(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """A disk that has no room for the checkpoints of some steps."""
    written = save.write

    def write(folder: Path, *words: Any, **named: Any) -> None:
        if int(folder.name[-8:]) in steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        written(folder, *words, **named)

    monkeypatch.setattr(save, "write", write)


def test_a_run_outlives_a_full_disk(text: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And learns what a run learns whose disk was never full."""
    whole, _ = toy.train(toy.recipe(text, cache), tmp_path / "whole")
    full(monkeypatch, 4, 8)
    folder, report = toy.train(toy.recipe(text, cache), tmp_path / "run")
    assert toy.learned(folder) == toy.learned(whole)
    missing = [note for note in report.notes if "NO CHECKPOINT" in note]
    assert "of step 4: could not be written: disk full" in missing[0]
    assert "of step 8, 2 in a row" in missing[1]
    assert [step_of(path) for path in complete(folder.checkpoints)] == [12]
    assert [of for name, of in events(folder) if name == "checkpoint failed"] == [4, 8]
    assert ("checkpoint written", 12) in events(folder)
    blocked = {row["step"]: row.get("checkpoint/blocked_seconds") for row in rows(folder.metrics) if "loss" in row}
    assert [step for step, seconds in blocked.items() if seconds is not None] == [5, 9]
    assert not [t for t in threading.enumerate() if t.name.startswith(("checkpoint", "lmworks-loader"))]


def test_a_run_that_cannot_be_saved_at_its_end_is_an_error(
    text: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full(monkeypatch, 12)
    with pytest.raises(CheckpointError, match="disk full"):
        toy.train(toy.recipe(text, cache), tmp_path / "run")
    assert not RunFolder(tmp_path / "run").is_done()
    monkeypatch.undo()
    folder, report = toy.train(toy.recipe(text, cache), tmp_path / "run")
    assert folder.is_done()
    assert any("going on from step 8" in note for note in report.notes)


def test_half_a_checkpoint_is_passed_over_with_a_word(text: Path, cache: Path, tmp_path: Path) -> None:
    toy.stopped(toy.recipe(text, cache), tmp_path / "run", 10)
    kept = tmp_path / "run" / "checkpoints"
    (kept / "step-00000010" / "manifest.json").unlink()
    (kept / ".writing-step-00000011").mkdir()
    _, report = toy.train(toy.recipe(text, cache), tmp_path / "run")
    said = [note for note in report.notes if "not written to its end" in note]
    assert [note.split()[1] for note in said] == ["step-00000010", "step-00000011"]
    assert any("going on from step 8" in note for note in report.notes)


def test_patience_without_a_thread_has_no_effect(text: Path, cache: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        toy.recipe(text, cache, checkpoints={"background": False, "patience": 3})
    assert "checkpoints.patience: has no effect without checkpoints.background" in str(refused.value)


@pytest.mark.ranks
def test_ranks_skip_the_same_checkpoint(text: Path, cache: Path, tmp_path: Path) -> None:
    """The second rank's store takes nothing until the last step: the first one, whose store is quick, skips as well."""
    spec = ranked.table(text, cache, layout={"dp_replicate": 2}, checkpoints={"every": 3, "patience": 0, "keep": 9})
    notes = gang.run(ranked.slow_store, 2, spec, str(tmp_path / "run"), 1)
    assert sum("NO CHECKPOINT" in note for note in notes[0]) == 2
    assert "that of step 3 is still being written" in next(note for note in notes[0] if "NO CHECKPOINT" in note)
    assert [step_of(path) for path in complete(tmp_path / "run" / "checkpoints")] == [3, 12]
    for folder in (RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run").of_rank(1)):
        assert [of for name, of in events(folder) if name == "checkpoint skipped"] == [6, 9]
    whole = tmp_path / "whole"
    gang.run(ranked.train, 2, {**spec, "checkpoints": {"every": 3, "keep": 9}}, str(whole))
    assert recipes.decode(spec).checkpoints.patience == 0
    assert ranked.losses(tmp_path / "run") == ranked.losses(whole)
