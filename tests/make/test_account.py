"""What people see of a data run: the budget before, table, picture and page after, and errors that say what to do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lmworks.data.fingerprint import scan
from lmworks.data.read import Jsonl
from lmworks.make import report
from lmworks.make.rounds import groups
from lmworks.make.trial import budget
from tests.cli.conftest import Command, lmworks  # noqa: F401  (a fixture)
from tests.make.cleaning import recipe, run, texts, write_jsonl

STAGES = [{"use": "length", "least": 3, "unit": "words"}, {"use": "private"}, {"use": "dedup", "key": "exact"}]
RECIPE = """do = "data"
[[readers]]
use = "jsonl"
name = "books"
paths = ["books.jsonl"]
[[stages]]
use = "length"
least = 3
unit = "words"
[[stages]]
use = "dedup"
key = "exact"
"""


def test_a_budget_of_all_documents_is_exact(tmp_path: Path) -> None:
    found = texts(50)
    told = budget(recipe([write_jsonl(tmp_path / "books.jsonl", found)], STAGES))
    assert (told.documents, told.tried) == (50, 50)
    assert told.text_bytes == sum(len(text.encode()) for text in found)
    assert told.memory_bytes > 0
    assert told.disk_bytes > 0
    assert "budget: 50 documents" in told.line()


def test_a_budget_of_a_part_is_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmworks.make.trial.LEAST", 20_000)
    paths = [write_jsonl(tmp_path / f"part{i}.jsonl", texts(100, seed=i)) for i in range(8)]
    told = budget(recipe([], STAGES, readers=[{"use": "jsonl", "name": "all", "paths": [str(p) for p in paths]}]))
    assert 50 < told.tried < 400
    assert 640 < told.documents < 960


def test_files_are_read_in_groups_that_fill_a_shard(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}.jsonl").write_text("x" * 40)
    reader = Jsonl(paths=(f"{tmp_path}/*.jsonl",))
    found = scan(reader, tmp_path / "cache")
    assert [len(group) for group in groups(reader, found, 80)] == [2, 2, 1]
    assert [len(group) for group in groups(reader, found, 1)] == [1] * 5
    stopping = Jsonl(paths=reader.paths, max_bytes=50)
    assert [len(group) for group in groups(stopping, found, 1)] == [5]


def test_the_report_shows_what_each_stage_did(tmp_path: Path) -> None:
    found = [*texts(20), "too <b>short</b>", "mail a@b.example.org at once, please"]
    content, _ = run(recipe([write_jsonl(tmp_path / "books.jsonl", found)], STAGES), tmp_path / "out")
    page = report.write(content, tmp_path / "out")
    text = page.read_text()
    assert "too &lt;b&gt;short&lt;/b&gt;" in text
    assert "mail [EMAIL] at once" in text
    assert "mail a@b.example.org at once" in text
    assert re.search(r"books like books</td><td>[1-9]", text)
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "account.json").read_text())["steps"][1]["dropped"] == {"too short": 1}
    rows = report.rows(content)
    assert [row[0] for row in rows] == ["reading", "length", "private", "dedup"]
    assert rows[1][1:4] == ["22", "21", "95.45"]


def test_documents_that_were_mended_are_kept_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("caf\u00e9 ol\u00e9 et th\u00e9".encode("latin-1"))
    (tmp_path / "b.txt").write_text("three plain words")
    readers = [{"use": "text", "name": "mixed", "paths": [str(tmp_path / "*.txt")], "broken": "mend"}]
    content, _ = run(recipe([], STAGES, readers=readers), tmp_path / "out")
    assert content["steps"][0]["kept"] == 2
    assert content["steps"][0]["findings"] == {"documents that were not UTF-8 and were mended, as": {"windows-1252": 1}}
    assert "windows-1252" in report.write(content, tmp_path / "out").read_text()


def test_the_verb_answers_in_text_and_json(lmworks: Command, tmp_path: Path) -> None:  # noqa: F811
    write_jsonl(tmp_path / "books.jsonl", ["one two three", "one two three", "four five six", "seven"])
    Path("clean.toml").write_text(RECIPE)
    answer = lmworks("data", "clean.toml", "--out", "out")
    assert answer.code == 0, answer.err
    assert "2 all" in answer.out
    assert "budget: 4 documents" in answer.err
    again = lmworks("data", "clean.toml", "--out", "out", "--json")
    content = json.loads(again.out)
    assert content["jobs"] == 0
    assert "budget" not in again.err
    assert content["splits"] == {"all": 2}
    assert {path.name for path in Path("out").iterdir()} >= {
        *("recipe.toml", "record.json", "account.json", "report.png", "report.html", "documents", "dropped", "tables")
    }
    assert lmworks("data", "out/recipe.toml", "--out", "out", "--json").out == again.out, "the resolved recipe runs"


def test_check_tells_the_budget_and_runs_nothing(lmworks: Command, tmp_path: Path) -> None:  # noqa: F811
    write_jsonl(tmp_path / "books.jsonl", texts(10))
    Path("clean.toml").write_text(RECIPE)
    answer = lmworks("data", "clean.toml", "--check", "--set", "stages.0.least=4")
    assert answer.code == 0
    assert "least = 4" in answer.out
    assert "# budget: 10 documents" in answer.out
    assert not Path("runs").exists()


def test_a_source_of_which_nothing_is_left_is_an_error_with_a_report(
    lmworks: Command,  # noqa: F811
    tmp_path: Path,
) -> None:
    write_jsonl(tmp_path / "books.jsonl", ["one two", "three"])
    Path("clean.toml").write_text(RECIPE)
    answer = lmworks("data", "clean.toml", "--out", "out")
    assert answer.code == 1
    assert "nothing is left of the source 'books': 'length' dropped its last documents" in answer.err
    assert "Traceback" not in answer.err
    assert Path("out/report.html").is_file()
    assert len(list(Path("out/dropped").rglob("*.zst"))) == 1


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("{}", "no such file"),
        (RECIPE.replace("exact", "exect"), "did you mean 'exact'"),
        (RECIPE.replace('do = "data"', 'do = "train"'), "not for 'data'"),
    ],
)
def test_a_persons_mistakes_are_usage_errors(lmworks: Command, body: str, text: str) -> None:  # noqa: F811
    if body != "{}":
        Path("clean.toml").write_text(body)
    answer = lmworks("data", "clean.toml")
    assert answer.code == 2
    assert text in answer.err
