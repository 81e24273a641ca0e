"""Files that are old or new but never half; journals that survive a kill in the middle of a line."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core import files
from lmworks.core.events import Events
from lmworks.core.journal import Journal, rewind, rows


def test_writing_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"x": 1})
    files.write_json(path, {"x": "ä"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"x": "ä"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_the_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert files.sha256_of(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@given(cut=st.integers(0, 60))
def test_a_journal_cut_anywhere_keeps_its_complete_lines_and_goes_on(tmp_path_factory: object, cut: int) -> None:
    folder = tmp_path_factory.mktemp("journal")  # type: ignore[attr-defined]
    path = folder / "a.jsonl"
    journal = Journal(path)
    for i in range(4):
        journal.append({"step": i, "text": "é"})
    journal.flush()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut] if cut < len(whole) else b"")
    kept = path.read_bytes().count(b"\n")
    assert [row["step"] for row in rows(path)] == list(range(kept))
    again = Journal(path)
    again.append({"step": 99})
    again.flush()
    assert [row["step"] for row in rows(path)] == [*range(kept), 99]


def test_rows_wait_until_they_are_flushed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.jsonl", seconds=3600)
    journal.append({"step": 1})
    assert list(rows(journal.path)) == []
    journal.flush()
    assert list(rows(journal.path)) == [{"step": 1}]


def test_a_number_that_json_cannot_say_is_written_as_text(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.jsonl")
    journal.append({"loss": float("nan"), "norm": float("inf"), "step": 1})
    journal.flush()
    assert list(rows(journal.path)) == [{"loss": "nan", "norm": "inf", "step": 1}]


def test_rewinding_keeps_what_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    journal = Journal(path)
    for i in range(5):
        journal.append({"step": i})
    journal.flush()
    rewind(path, lambda row: row["step"] <= 2)
    assert [row["step"] for row in rows(path)] == [0, 1, 2]


def test_events_have_one_schema(tmp_path: Path) -> None:
    events = Events(tmp_path / "events.jsonl", run="r")
    events.step = 3
    events.write("point", note="x")
    with events.span("work") as attrs:
        attrs["found"] = 1
    events.flush()
    point, work = rows(tmp_path / "events.jsonl")
    assert (
        set(point) == set(work) == {"run", "step", "rank", "axes", "stream", "name", "start", "end", "bytes", "attrs"}
    )
    assert point["start"] == point["end"]
    assert work["end"] >= work["start"]
    assert work["attrs"] == {"found": 1}


def test_a_journal_that_finds_no_room_keeps_whole_lines_and_writes_the_rest_later(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.jsonl", seconds=1e9)
    journal.append({"step": 1})
    journal.flush()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    journal.append({"step": 2, "text": "x" * 500})
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            journal.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "a.jsonl").read_bytes() == b'{"step": 1}\n'
    journal.append({"step": 3})
    journal.sync()
    assert [row["step"] for row in rows(tmp_path / "a.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "disk full"),
        (OSError(122, "Disk quota exceeded"), "disk full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "disk full"),
        (OSError(13, "Permission denied"), "Permission denied"),
    ],
)
def test_a_failed_write_is_told_in_words(error: Exception, words: str) -> None:
    assert files.why_not_written(error) == words


def test_a_folder_may_be_renamed_as_soon_as_its_file_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rank renames a checkpoint's folder when it sees the last rank's list."""
    plain = Path.replace

    def seen_and_renamed(self: Path, target: Path) -> Path:
        found = plain(self, target)
        (tmp_path / "writing").rename(tmp_path / "final")
        return found

    (tmp_path / "writing").mkdir()
    monkeypatch.setattr(Path, "replace", seen_and_renamed)
    files.write_json(tmp_path / "writing" / "list.json", {"a": 1})
    assert json.loads((tmp_path / "final" / "list.json").read_text()) == {"a": 1}
