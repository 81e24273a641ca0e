"""Test items in documents: found whole, in part and as templates, told word by word; the self-test can fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.core.errors import DataError
from lmworks.core.recipe import decode_part
from lmworks.data import decontaminate
from lmworks.data.decontaminate import PART, TEMPLATE, WHOLE, Decontaminate
from lmworks.data.record import Dropped
from lmworks.data.stage import Context
from tests.make.cleaning import answers, recipe, run, texts, write_jsonl

ITEM = "A train leaves the old station at 9 with 120 people and comes home after 7 hours. How many?"
SHORT = "What is the capital of the river people?"
TINY = "Two plus two?"


def stage_of(folder: Path, items: list[str] | None = None, **more: Any) -> tuple[Decontaminate, Path]:
    path = write_jsonl(folder / "test.jsonl", items or [ITEM, SHORT, TINY])
    reader = {"use": "jsonl", "name": "exam", "paths": [str(path)]}
    stage = decode_part("stage", {"use": "decontaminate", "sets": [reader], **more})
    place = folder / "verdict"
    place.mkdir()
    stage.settle([], [], place, Context(seed=0))
    return stage, place


def found(stage: Decontaminate, place: Path, some: list[str]) -> list[tuple[str, str] | None]:
    answered = answers(stage, some, verdict=place)
    return [(a.reason, a.detail) if isinstance(a, Dropped) else None for a in answered]


def test_items_are_found_whole_and_in_part(tmp_path: Path) -> None:
    stage, place = stage_of(tmp_path)
    words = ITEM.lower().replace(".", "").replace("?", "").split()
    documents = [
        f"So: {ITEM.upper()} Yes.",
        " ".join(["before", *words[2:16], "then"]),
        " ".join(["before", *words[2:14], "then"]),
        "nothing of the kind",
        SHORT.replace(" ", "\n"),
        TINY,
        ITEM.replace("120", "121"),
        "",
    ]
    name = next(iter(tmp_path.glob("*.jsonl"))).as_posix()
    assert found(stage, place, documents) == [
        (WHOLE, f"exam: {name}#1: {' '.join(words)}"),
        (PART, f"exam: {name}#1: {' '.join(words[2:16])}"),
        None,
        None,
        (WHOLE, f"exam: {name}#2: what is the capital of the river people"),
        None,
        None,
        None,
    ]
    told = stage.findings(place)
    assert told["test sets"] == {"exam": "3 items, 1 too short to be looked for"}
    assert told["self-test"] == "2 planted, all found"


def test_other_numbers_are_found_only_when_asked_for(tmp_path: Path) -> None:
    stage, place = stage_of(tmp_path, numbers="any")
    same, other = found(stage, place, [ITEM, ITEM.replace("120", "35").replace("9", "11")])
    assert same is not None
    assert other is not None
    assert same[0] == WHOLE
    assert other[0] == TEMPLATE
    assert "35 people" in other[1]


def test_a_document_is_marked_instead_of_dropped(tmp_path: Path) -> None:
    stage, place = stage_of(tmp_path, found="mark")
    marks = [a.facts["contaminated"] for a in answers(stage, [ITEM, "clean"], verdict=place)]  # type: ignore[union-attr]
    assert marks == [True, False]


@settings(max_examples=20)
@given(st.data())
def test_every_window_of_n_words_is_found_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**20)))
    n = data.draw(st.integers(3, 6))
    items = [" ".join(rng.choice(list("abc"), size=int(rng.integers(3, 12)))) for _ in range(4)]
    stage, place = stage_of(tmp_path_factory.mktemp("items"), items, n=n, short=3)
    documents = [" ".join(rng.choice(list("abcd"), size=int(rng.integers(0, 30)))) for _ in range(6)]
    for document, answer in zip(documents, found(stage, place, documents), strict=True):
        wanted = any(
            f" {' '.join(words[i : i + min(n, len(words))])} " in f" {document} "
            for words in (item.split() for item in items)
            for i in range(len(words) - min(n, len(words)) + 1)
        )
        assert (answer is not None) == wanted


def test_equal_hashes_of_other_words_are_no_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, place = stage_of(tmp_path)
    one = decontaminate.shingles

    def colliding(some: Any, n: int, unit: Any) -> Any:
        own = one(some, n, unit)
        own.hashes = np.full_like(own.hashes, np.load(next(place.glob("hashes-13.npy")))[0])
        return own

    monkeypatch.setattr(decontaminate, "shingles", colliding)
    assert found(stage, place, [texts(1)[0]]) == [None]


def test_the_self_test_fails_when_items_are_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decontaminate, "CARRIER", "nothing is planted here")
    with pytest.raises(DataError, match="of 2 planted test items 2 were not found, 'exam: "):
        stage_of(tmp_path)


def test_sets_without_an_item_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="hold no item of 8 words or more"):
        stage_of(tmp_path, [TINY])


def test_a_run_drops_contaminated_documents_and_runs_again_when_the_set_changes(tmp_path: Path) -> None:
    exam = write_jsonl(tmp_path / "exam.jsonl", [ITEM])
    corpus = write_jsonl(tmp_path / "books.jsonl", [*texts(10), f"As they say, {ITEM}", f"Or {SHORT}"])
    stages = [{"use": "decontaminate", "sets": [{"use": "jsonl", "name": "exam", "paths": [str(exam)]}]}]
    content, _ = run(recipe([corpus], stages), tmp_path / "out")
    assert content["steps"][1]["dropped"] == {WHOLE: 1}
    assert content["steps"][1]["samples"][WHOLE][0]["detail"].endswith("after 7 hours how many")
    write_jsonl(exam, [ITEM, SHORT])
    content, told = run(recipe([corpus], stages), tmp_path / "out")
    assert content["steps"][1]["dropped"] == {WHOLE: 2}
    assert set(told.made) == {"decontaminate: settling", "decontaminate", "writing documents"}
