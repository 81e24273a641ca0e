"""`lmworks data` as a whole: nothing is lost, nothing is done twice, a kill changes nothing, workers change nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lmworks.core.errors import DataError, LmworksError, RecipeError
from lmworks.core.run import RunFolder
from lmworks.data.units import read_records, read_rows
from lmworks.jobs.local import Local
from lmworks.make import account, rounds
from tests.make.cleaning import Quiet, hashes, recipe, run, texts, write_jsonl

STAGES: list[dict[str, Any]] = [
    {"use": "length", "least": 20, "unit": "words"},
    {"use": "private"},
    {"use": "split", "validation": 0.2, "test": 0.1},
]
SMALL_SHARDS = 0.005


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    some = [*texts(60), "short", "mail me at someone@example.org " * 12]
    return [
        write_jsonl(tmp_path / "books.jsonl", some),
        write_jsonl(tmp_path / "pages.jsonl", texts(30, seed=1), licence="MIT"),
    ]


def test_every_document_is_kept_or_dropped_with_a_reason(corpus: list[Path], tmp_path: Path) -> None:
    corpus[0].write_text(corpus[0].read_text() + "not json\n" + json.dumps({"text": " "}) + "\n")
    content, _ = run(recipe(corpus, STAGES), tmp_path / "out")
    names = [step["name"] for step in content["steps"]]
    assert names == ["reading", "length", "private", "split"]
    assert content["steps"][0]["dropped"] == {"not json": 1, "empty": 1}
    assert content["steps"][1]["dropped"] == {"too short": 1}
    assert content["steps"][2]["changed"] == 1
    assert content["steps"][0]["seen"] == 94
    assert sum(content["splits"].values()) == 91
    kept = [record for path in (tmp_path / "out/documents").rglob("*.zst") for record in read_records(path)]
    gone = [row for path in (tmp_path / "out/dropped").rglob("*.zst") for row in read_rows(path)]
    assert len(kept) + len(gone) == 94
    assert {row["reason"] for row in gone} == {"not json", "empty", "too short"}
    assert [row["text"] for row in gone if row["reason"] == "too short"] == ["short"]
    assert all("@example.org" not in str(record.content) for record in kept)
    assert {record.facts["split"] for record in kept} == {"train", "validation", "test"}


def test_an_equal_run_does_nothing_again(corpus: list[Path], tmp_path: Path) -> None:
    run(recipe(corpus, STAGES, shard_mb=SMALL_SHARDS), tmp_path / "out")
    before = hashes(tmp_path / "out")
    _, told = run(recipe(corpus, STAGES, shard_mb=SMALL_SHARDS), tmp_path / "out")
    assert told.made == {}
    assert hashes(tmp_path / "out") == before


def test_changed_settings_run_again_only_what_they_touch(corpus: list[Path], tmp_path: Path) -> None:
    run(recipe(corpus, STAGES), tmp_path / "out")
    stages = list((tmp_path / "out/work").iterdir())
    before = {stage.name: {unit.name for unit in stage.iterdir() if unit.is_dir()} for stage in stages}
    changed = [*STAGES[:2], {**STAGES[2], "validation": 0.3}]
    run(recipe(corpus, changed), tmp_path / "out")
    after = {stage.name: {unit.name for unit in stage.iterdir() if unit.is_dir()} for stage in stages}
    assert {name for name in before if after[name] != before[name]} == {"split", "documents"}
    run(recipe(corpus, STAGES, seed=1), tmp_path / "out")
    seeded = {stage.name: {unit.name for unit in stage.iterdir() if unit.is_dir()} for stage in stages}
    assert {name for name in before if seeded[name] != after[name]} == {"split", "documents"}


def test_a_stage_that_changes_nothing_does_not_run_those_behind_it(corpus: list[Path], tmp_path: Path) -> None:
    run(recipe(corpus, STAGES), tmp_path / "out")
    one_word_less = [{**STAGES[0], "least": 19}, *STAGES[1:]]
    run(recipe(corpus, one_word_less), tmp_path / "out")
    units = {stage.name: len([u for u in stage.iterdir() if u.is_dir()]) for stage in (tmp_path / "out/work").iterdir()}
    assert units["length"] == 4
    assert units["private"] == units["split"] == 2


def test_a_changed_file_runs_again_only_its_own_shard(corpus: list[Path], tmp_path: Path) -> None:
    run(recipe(corpus, STAGES), tmp_path / "out")
    write_jsonl(corpus[1], texts(31, seed=1), licence="MIT")
    _, told = run(recipe(corpus, STAGES), tmp_path / "out")
    assert told.made == {"reading": 1, "length > private > split": 1, "writing documents": 1}


def test_a_damaged_unit_is_made_again(corpus: list[Path], tmp_path: Path) -> None:
    run(recipe(corpus, STAGES), tmp_path / "out")
    before = hashes(tmp_path / "out")
    damaged = next((tmp_path / "out/work/private").glob("*/records.jsonl.zst"))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(bytes(data))
    _, told = run(recipe(corpus, STAGES), tmp_path / "out")
    assert told.made == {"length > private > split": 1}
    assert hashes(tmp_path / "out") == before


def test_shards_do_not_change_the_documents(corpus: list[Path], tmp_path: Path) -> None:
    whole, _ = run(recipe(corpus, STAGES), tmp_path / "whole")
    cut, told = run(recipe(corpus, STAGES, shard_mb=SMALL_SHARDS), tmp_path / "cut")
    assert told.made["length > private > split"] >= 4
    assert cut["splits"] == whole["splits"]

    def documents(name: str) -> list[Any]:
        paths = (tmp_path / name / "documents").rglob("*.zst")
        return sorted((r.source, r.id, r.content[0], r.facts["split"]) for path in paths for r in read_records(path))  # type: ignore[type-var]

    assert [str(d) for d in documents("cut")] == [str(d) for d in documents("whole")]


@pytest.mark.slow
def test_processes_give_the_same_bytes_as_one(
    corpus: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = 0.009
    run(recipe(corpus, STAGES, shard_mb=cut), tmp_path / "here")
    monkeypatch.setattr(rounds, "SMALL", 0)
    decoded = dataclasses.replace(recipe(corpus, STAGES, shard_mb=cut), executor=Local(processes=2))
    run(decoded, tmp_path / "there")
    assert list((tmp_path / "there/jobs/writing-documents").glob("*.result.json"))
    assert hashes(tmp_path / "there") == hashes(tmp_path / "here")


CHILD = """
import sys
from pathlib import Path
from lmworks.core import recipe as recipes
from tests.make.cleaning import run
run(recipes.load(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("units", [1, 9, 25])
def test_a_run_that_is_killed_goes_on_and_ends_the_same(corpus: list[Path], tmp_path: Path, units: int) -> None:
    decoded = recipe(corpus, STAGES, shard_mb=SMALL_SHARDS)
    run(decoded, tmp_path / "unbroken")
    path = tmp_path / "unbroken" / "recipe.toml"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path), str(tmp_path / "killed")], cwd=Path.cwd())
    while child.poll() is None and len(_units(tmp_path / "killed")) < units:
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = {unit: unit.stat().st_mtime_ns for unit in _units(tmp_path / "killed")}
    run(decoded, tmp_path / "killed")
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "unbroken")
    assert {unit: unit.stat().st_mtime_ns for unit in before} == before, "a unit that was whole was made again"


@pytest.mark.slow
def test_hash_seeds_do_not_change_a_byte(corpus: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("rensa", reason="the extra 'data' is not installed")
    stages = [*STAGES[:2], {"use": "dedup", "key": {"use": "minhash", "verify": 0.6}}, STAGES[2]]
    run(recipe(corpus, stages), tmp_path / "here")
    for seed in ("1", "2"):
        words = [sys.executable, "-c", CHILD, str(tmp_path / "here" / "recipe.toml"), str(tmp_path / seed)]
        subprocess.run(words, check=True, cwd=Path.cwd(), env={**os.environ, "PYTHONHASHSEED": seed})
        assert hashes(tmp_path / seed) == hashes(tmp_path / "here")


def _units(folder: Path) -> list[Path]:
    return list((folder / "work").glob("*/[!.]*/manifest.json"))


def test_only_one_process_works_in_a_folder(corpus: list[Path], tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path / "out").alone("works"),
        pytest.raises(LmworksError, match="another process works here"),
    ):
        rounds.clean(recipe(corpus, STAGES), tmp_path / "out", Quiet())


def test_old_documents_go_when_others_are_handed_on(corpus: list[Path], tmp_path: Path) -> None:
    run(recipe(corpus, STAGES), tmp_path / "out")
    assert (tmp_path / "out/documents/train").is_dir()
    run(recipe(corpus, STAGES[:1], output="parquet"), tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out/documents").iterdir())
    assert names == ["books-00000.parquet", "pages-00001.parquet"]


def test_parquet_holds_the_same_documents_with_a_column_for_each_fact(corpus: list[Path], tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    run(recipe(corpus, STAGES[:2], output="parquet"), tmp_path / "parquet")
    run(recipe(corpus, STAGES[:2]), tmp_path / "jsonl")
    rows = pq.read_table(tmp_path / "parquet/documents/pages-00001.parquet").to_pylist()
    lines = list(read_rows(tmp_path / "jsonl/documents/pages-00001.jsonl.zst"))
    assert rows == [{**{k: v for k, v in line.items() if k != "facts"}, **line["facts"]} for line in lines]
    assert {row["licence"] for row in rows} == {"MIT"}


def test_documents_that_do_not_add_up_are_an_error(corpus: list[Path], tmp_path: Path) -> None:
    decoded = recipe(corpus, STAGES)
    trail = rounds.clean(decoded, tmp_path / "out", Quiet())
    manifest = trail.stages[1][0] / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"kept": 61', '"kept": 60'))
    with pytest.raises(DataError, match="do not add up: 91 went into 'private', 90 are accounted for"):
        account.account(decoded, trail)


def test_nothing_left_is_an_error_and_the_old_documents_stay(corpus: list[Path], tmp_path: Path) -> None:
    run(recipe(corpus, STAGES), tmp_path / "out")
    before = hashes(tmp_path / "out")
    decoded = recipe(corpus, [{"use": "length", "least": 10_000}])
    trail = rounds.clean(decoded, tmp_path / "out", Quiet())
    assert account.gone_sources(account.account(decoded, trail)) == {"books": "length", "pages": "length"}
    with pytest.raises(DataError, match="no document is left"):
        rounds.publish(decoded, tmp_path / "out", trail)
    assert hashes(tmp_path / "out") == before


def test_a_reader_of_token_ids_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ids.jsonl").write_text(json.dumps({"text": [1, 2, 3]}) + "\n")
    with pytest.raises(DataError, match="not one text, and stages work on text"):
        run(recipe([tmp_path / "ids.jsonl"], STAGES), tmp_path / "out")


def test_mistakes_in_a_recipe_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(
            [tmp_path / "a" / "x.jsonl", tmp_path / "b" / "x.jsonl"],
            [{"use": "split", "validation": 0.6, "test": 0.5}, {"use": "split"}, {"use": "length", "most": 3}],
        )
    for text in ("2 readers are called 'x'", "nothing is left to train on", "has added 'split' before", "is less than"):
        assert text in str(caught.value)
    with pytest.raises(RecipeError, match="no effect here"):
        recipe([], STAGES, readers=[{"use": "python-stdlib", "weight": 2.0}])
