"""Journals that grow, are rewritten, cut short, damaged; files that are no files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.board import reading
from lmworks.core.journal import Journal, rewind


class Kept:
    """What a tail gives."""

    def __init__(self, path: Path) -> None:
        self.rows: list[dict[str, Any]] = []
        self.tail = reading.Tail(path, take=self.rows.append, forget=self.rows.clear)


def test_a_tail_gives_each_row_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = Kept(path)
    assert not kept.tail.look()
    journal = Journal(path)
    for step in range(3):
        journal.append({"step": step})
        journal.flush()
        assert kept.tail.look()
        assert not kept.tail.look()
    assert [row["step"] for row in kept.rows] == [0, 1, 2]


def test_a_line_is_taken_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"ste')
    kept = Kept(path)
    kept.tail.look()
    assert kept.rows == [{"step": 1}]
    with path.open("ab") as file:
        file.write(b'p": 2}\n')
    kept.tail.look()
    assert kept.rows == [{"step": 1}, {"step": 2}]


def test_a_journal_that_a_resumed_run_cut_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(10)))
    kept = Kept(path)
    kept.tail.look()
    rewind(path, lambda row: row["step"] < 4)
    with path.open("a") as file:  # longer than it was
        file.writelines(json.dumps({"step": step, "again": True}) + "\n" for step in range(4, 30))
    kept.tail.look()
    assert [row["step"] for row in kept.rows] == list(range(30))
    assert kept.rows[5]["again"]


@given(st.lists(st.binary(max_size=30), max_size=20))
def test_any_bytes_are_read_and_damage_is_counted(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("any") / "metrics.jsonl"
    data = b"".join(line + b"\n" for line in lines)
    path.write_bytes(data + b'{"step": 1}\n')
    kept = Kept(path)
    kept.tail.look()
    assert kept.rows[-1] == {"step": 1}
    assert len(kept.rows) + kept.tail.damaged == data.count(b"\n") + 1


def test_deep_nesting_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("[" * 200_000 + "\n" + '{"step": 1}\n')
    kept = Kept(path)
    kept.tail.look()
    assert (kept.rows, kept.tail.damaged) == ([{"step": 1}], 1)
    (tmp_path / "record.json").write_text('{"a":' * 200_000)
    assert reading.table(tmp_path / "record.json") == {}


def test_of_a_long_journal_the_end_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST", 100)
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1000)))
    kept = Kept(path)
    kept.tail.look()
    assert kept.rows[-1] == {"step": 999}
    assert 0 < len(kept.rows) < 10
    assert kept.tail.skipped == path.stat().st_size - sum(len(json.dumps(row)) + 1 for row in kept.rows)


def test_a_pipe_or_a_folder_is_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    (tmp_path / "record.json").mkdir()
    assert reading.ends(tmp_path / "metrics.jsonl") == []
    assert reading.table(tmp_path / "record.json") == {}
    assert list(reading.spread(tmp_path / "metrics.jsonl", 10)) == []


@given(st.integers(0, 400), st.integers(1, 60))
def test_spread_gives_rows_in_order_over_the_whole_file(
    tmp_path_factory: pytest.TempPathFactory, rows: int, points: int
) -> None:
    path = tmp_path_factory.mktemp("spread") / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(rows)))
    steps = [row["step"] for row in reading.spread(path, points)]
    assert steps == sorted(set(steps))
    assert len(steps) <= points
    if rows:
        assert steps[0] == 0
        assert len(steps) >= min(rows, points) // 2


def test_values_that_json_does_not_have_become_text() -> None:
    assert reading.plain({"a": float("nan"), "b": [float("inf"), 1.5], "c": None}) == {
        "a": "nan",
        "b": ["inf", 1.5],
        "c": None,
    }
    assert reading.number("3") is None
    assert reading.number(10**400) is None
    assert reading.number(True) is None
    assert reading.text("x" * 20, 5) == "xxxxx ..."
