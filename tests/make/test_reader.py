"""The reader `cleaned`: a data recipe that is run when it is first read, and again as far as something changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from lmworks.core.errors import DataError
from lmworks.data.fingerprint import scan
from lmworks.data.record import Record
from lmworks.data.stage import text_of
from lmworks.make import rounds
from lmworks.make.reader import Cleaned
from tests.make.cleaning import texts, write_jsonl

pytest.importorskip("rensa", reason="the extra 'data' is not installed")
SHARED = "this long sentence lies in both of the sources, letter by letter, and nowhere else at all"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMWORKS_HOME", str(tmp_path / "home"))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Two sources with a document in common; deduplicated and split."""
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", [*texts(40, seed=i), SHARED]) for i, n in enumerate(("a", "b"))]
    readers = [{"use": "jsonl", "name": path.stem, "paths": [str(path)]} for path in paths]
    stages: list[dict[str, Any]] = [{"use": "dedup"}, {"use": "split", "validation": 0.3, "test": 0.0}]
    path = tmp_path / "clean.toml"
    path.write_text(tomli_w.dumps({"do": "data", "readers": readers, "stages": stages}))
    return path


def read(reader: Cleaned) -> list[str]:
    found = []
    for item in reader.read():
        assert isinstance(item, Record)
        assert item.source == reader.label
        assert not item.facts
        found.append(text_of(item))
    return found


def test_sides_and_sources_come_out_as_the_recipe_leaves_them(recipe: Path, tmp_path: Path) -> None:
    sides = {
        (source, side): read(Cleaned(recipe=str(recipe), source=source, side=side))
        for source in ("a", "b")
        for side in ("train", "validation")
    }
    whole = [text for found in sides.values() for text in found]
    assert len(whole) == len(set(whole))
    assert whole.count(SHARED) == 1
    local = {"stages.0.scope": "per-source"}
    both = [
        text
        for source in ("a", "b")
        for side in ("train", "validation")
        for text in read(Cleaned(recipe=str(recipe), source=source, side=side, set=local))
    ]
    assert both.count(SHARED) == 2
    assert len(both) == len(whole) + 1


def test_what_is_made_is_not_made_again_and_what_changed_is(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Cleaned(recipe=str(recipe), source="a")
    first = scan(reader, tmp_path / "cache")
    made: list[int] = []
    clean = rounds.clean

    def counted(*words: Any) -> rounds.Trail:
        trail = clean(*words)
        made.append(trail.made)
        return trail

    monkeypatch.setattr(rounds, "clean", counted)
    assert scan(reader, tmp_path / "cache") == first
    write_jsonl(tmp_path / "a.jsonl", texts(41))
    assert scan(reader, tmp_path / "cache").id != first.id
    assert len(made) == 1, "the first of the two scans had nothing to do"
    assert made[0] > 0


def test_the_executor_does_not_decide_the_documents(recipe: Path) -> None:
    plain = Cleaned(recipe=str(recipe), source="a")
    other = Cleaned(recipe=str(recipe), source="a", set={"executor.processes": 1})
    assert plain.settings() == other.settings()
    assert plain.settings() != Cleaned(recipe=str(recipe), source="a", set={"seed": 4}).settings()


def test_a_recipe_can_read_what_another_leaves(recipe: Path, tmp_path: Path) -> None:
    held = {"use": "cleaned", "name": "held", "recipe": str(recipe), "source": "a", "side": "validation"}
    raw = {
        "do": "data",
        "readers": [{"use": "jsonl", "name": "a", "paths": [str(tmp_path / "a.jsonl")]}],
        "stages": [{"use": "dedup", "scope": "against", "against": [held]}],
    }
    path = tmp_path / "raw.toml"
    path.write_text(tomli_w.dumps(raw))
    apart = set(read(Cleaned(recipe=str(recipe), source="a", side="validation")))
    left = read(Cleaned(recipe=str(path), source="a", side="all"))
    assert apart
    assert not apart & set(left)
    assert len(left) > 10


def test_what_is_not_there_is_told(recipe: Path, tmp_path: Path) -> None:
    def problem(**settings: Any) -> str:
        return " ".join(p.text for p in Cleaned(**{"recipe": str(recipe), "source": "a", **settings}).check(None))

    assert problem() == ""
    assert "has no reader 'c'" in problem(source="c")
    assert "no such file" in problem(recipe="nowhere")
    assert "no setting 'colour'" in problem(set={"stages.0.colour": 3})
    with pytest.raises(DataError, match="no documents on the side 'test'") as caught:
        read(Cleaned(recipe=str(recipe), source="a", side="test"))
    assert caught.value.legal == "side = train, validation"


def test_recipes_that_read_each_other_are_told(tmp_path: Path) -> None:
    paths = [tmp_path / "one.toml", tmp_path / "two.toml"]
    for path, other in zip(paths, paths[::-1], strict=True):
        reader = {"use": "cleaned", "name": "a", "recipe": str(other), "source": "a"}
        path.write_text(tomli_w.dumps({"do": "data", "readers": [reader], "stages": ["repair"]}))
    (problem,) = Cleaned(recipe=str(paths[0]), source="a").check(None)
    assert problem.text == f"is read to make itself: {paths[0]} > {paths[1]} > {paths[0]}"


def test_a_source_of_which_nothing_is_left_is_told_before_training(recipe: Path) -> None:
    short = Cleaned(recipe=str(recipe), source="a", set={"stages.1": {"use": "length", "least": 10**6}}, side="all")
    with pytest.raises(DataError, match="nothing is left of the source 'a': 'length' dropped its last documents"):
        read(short)


def test_ids_and_licences_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(json.dumps({"text": t, "licence": "MIT"}) for t in texts(5)))
    table = {
        "do": "data",
        "readers": [{"use": "jsonl", "name": "c", "paths": [str(path)], "licence_field": "licence"}],
        "stages": [{"use": "length", "least": 1}],
    }
    (tmp_path / "c.toml").write_text(tomli_w.dumps(table))
    found = list(Cleaned(recipe=str(tmp_path / "c.toml"), source="c", side="all").read())
    assert [item.id for item in found] == [f"{path.as_posix()}#{i}" for i in range(1, 6)]
    assert {item.licence for item in found if isinstance(item, Record)} == {"MIT"}
