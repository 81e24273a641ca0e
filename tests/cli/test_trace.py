"""lmworks trace: what a person and a script see, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

from tests.audit import traced
from tests.audit.test_hang import read, record
from tests.cli.conftest import Command


def test_the_slow_rank_is_named_on_a_terminal_and_in_json(lmworks: Command, tmp_path: Path) -> None:
    run = traced.write(tmp_path / "run", ranks=4, steps=30, slow=2)
    answer = lmworks("trace", str(run))
    assert answer.code == 0, answer.err
    assert "rank 2 is slow" in answer.out
    assert "backward" in answer.out.splitlines()[1]
    value = json.loads(lmworks("trace", str(run), "--steps", "11:30", "--json").out)
    assert value["steps"] == list(range(11, 31))
    assert [slow["rank"] for slow in value["slow"]] == [2]
    assert len(value["seconds"]["forward"]) == 4


def test_files_are_written_and_arrows_are_on_the_page(lmworks: Command, tmp_path: Path) -> None:
    run = traced.write(tmp_path / "run", ranks=2, steps=20)
    group = {"world": [0, 1]}
    records = record(0, 2, group, {"world": 7}, open_on="world"), record(1, 2, group, {"world": 6})
    read(run / "flight" / "20260101T000000-0", *records)
    page, spans = tmp_path / "t.html", tmp_path / "t.json"
    answer = lmworks("trace", str(run), "--html", str(page), "--perfetto", str(spans))
    assert answer.code == 0, answer.err
    assert "flight records are in" in answer.out
    assert "SUSPECT" in page.read_text(encoding="utf-8")
    assert json.loads(spans.read_text())["traceEvents"]
    hung = lmworks("trace", str(run), "--hang")
    assert "SUSPECT  rank 1" in hung.out
    assert json.loads(lmworks("trace", str(run), "--hang", "--json").out)["suspects"][0]["rank"] == 1


def test_mistakes_end_with_a_message(lmworks: Command, tmp_path: Path) -> None:
    run = traced.write(tmp_path / "run", ranks=1, steps=3)
    for words, said in (
        ((str(tmp_path),), "no run is here"),
        ((str(run), "--steps", "5"), "A:B"),
        ((str(run), "--steps", "a:9"), "A:B"),
        ((str(tmp_path / "nowhere"), "--hang"), "no run is here"),
    ):
        answer = lmworks("trace", *words)
        assert answer.code == 2, answer.out
        assert said in answer.err
    assert lmworks("trace", str(run), "--steps", "9:").code == 1
    nothing = lmworks("trace", str(run), "--hang")
    assert nothing.code == 0
    assert "none has waited in vain" in nothing.out
