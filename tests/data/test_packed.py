from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmworks.core import recipe
from lmworks.core.errors import DataError, MissingExtra
from lmworks.data.pack import IGNORED
from lmworks.data.packed import Packed, Prepared
from lmworks.data.read import HuggingFace, Jsonl, PythonStdlib, TextFiles
from lmworks.data.tokenizer import Bpe, Bytes

WORDS = ["one", "two", "three", "four", "five", "six"]
TEXTS = [f"{a} {b} {c}." for a in WORDS for b in WORDS for c in WORDS[:2]]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """72 short documents in a JSON Lines file, and one longer text file."""
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (tmp_path / "b.txt").write_text("\n\n".join(f"paragraph {i} of a book" for i in range(40)))
    return tmp_path


def packed(corpus: Path, **settings: Any) -> Packed:
    readers = (
        Jsonl(paths=(str(corpus / "a.jsonl"),), weight=3.0),
        TextFiles(paths=(str(corpus / "b.txt"),), split="block", name="book"),
    )
    given = {"readers": readers, "sequence_length": 16, "tokenizer": Bpe(vocab_size=300), "validation": 0.2, **settings}
    return Packed(cache=str(corpus / "cache"), **given)


def rows(prepared: Prepared, n: int = 12) -> torch.Tensor:
    loader = prepared.train(prefetch=0)
    return loader.draw(n).tokens_BT


def test_prepared_data_are_what_the_recipe_says(corpus: Path) -> None:
    prepared = packed(corpus).prepare(seed=5)
    found = prepared.manifest["sources"]
    assert list(found) == ["jsonl", "book"]
    for source in found.values():
        splits = source["splits"]
        for key in ("tokens", "bytes"):
            assert source[key] == splits["training"][key] + splits["validation"][key]
        assert source["documents"]["kept"] == splits["training"]["documents"] + splits["validation"]["documents"]
    json.dumps(prepared.manifest)
    loader = prepared.train()
    counts: Counter[str] = Counter()
    for _ in range(4):
        loader.draw(8)
        counts.update(loader.state()["rows"])
    assert loader.state()["rows"] == {"jsonl": 24, "book": 8}
    loader.close()


def test_a_reader_of_weight_zero_is_held_out_and_never_trained_on(corpus: Path) -> None:
    data = packed(corpus, tokenizer=Bytes())  # byte pairs would be learnt from the readers by weight
    book = dataclasses.replace(data.readers[1], weight=0.0)
    prepared = dataclasses.replace(data, readers=(data.readers[0], book)).prepare(seed=5)
    loader = prepared.train(prefetch=0)
    loader.draw(40)
    assert loader.state()["rows"] == {"jsonl": 40, "book": 0}
    ours, both = prepared.validation(), data.prepare(seed=5).validation()
    assert [batch.sources_BT.tolist() for batch in ours] == [batch.sources_BT.tolist() for batch in both]


def test_the_two_splits_share_no_document(corpus: Path) -> None:
    prepared = packed(corpus, sequence_length=64).prepare(seed=0)
    decode = prepared.tokenizer.decode
    held_out = "".join(decode(batch.tokens_BT.ravel().tolist()) for batch in prepared.validation())
    trained = decode(prepared.train(prefetch=0).draw(200).tokens_BT.ravel().tolist())
    for i in range(40):
        inside = [f"paragraph {i} of a book" in text for text in (held_out, trained)]
        assert inside.count(True) == 1, i


def test_validation_counts_every_byte_once(corpus: Path) -> None:
    prepared = packed(corpus).prepare(seed=0)
    batches = list(prepared.validation())
    sources = prepared.manifest["sources"].values()
    assert sum(batch.n_bytes for batch in batches) == sum(s["splits"]["validation"]["bytes"] for s in sources)
    targets = sum(int((batch.targets_BT != IGNORED).sum()) for batch in batches)
    splits = [source["splits"]["validation"] for source in sources]
    assert targets == sum(split["tokens"] - split["documents"] for split in splits)
    assert sum(batch.rows for batch in prepared.validation(rows=3)) == 3


def test_the_same_recipe_gives_the_same_rows_from_any_cache(corpus: Path) -> None:
    first = packed(corpus).prepare(seed=5)
    again = packed(corpus).prepare(seed=5)
    elsewhere = dataclasses.replace(packed(corpus), cache=str(corpus / "other")).prepare(seed=5)
    assert first.fingerprint == again.fingerprint == elsewhere.fingerprint
    assert torch.equal(rows(first), rows(again))
    assert torch.equal(rows(first), rows(elsewhere))
    assert not torch.equal(rows(first), rows(packed(corpus).prepare(seed=6)))


def test_lmworks_home_is_the_cache_when_none_is_set(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMWORKS_HOME", str(corpus / "home"))
    dataclasses.replace(packed(corpus), cache=None).prepare(seed=0)
    assert {path.name for path in (corpus / "home").iterdir()} == {"sources", "tokenizers", "tokens"}


def test_progress_tells_what_is_done_and_how_long_it_takes(corpus: Path) -> None:
    seen: list[dict[str, Any]] = []
    packed(corpus).prepare(seed=0, progress=lambda **facts: seen.append(facts))
    stages = list(dict.fromkeys(facts["stage"] for facts in seen))
    assert stages == [
        "hashing jsonl",
        "hashing book",
        "training the tokenizer on",
        "tokenising jsonl",
        "tokenising book",
    ]
    assert seen[-1]["done"] == seen[-1]["total"]
    assert seen[-1]["seconds_left"] == 0.0


# --- resuming


def test_a_changed_source_refuses_to_resume_and_names_the_files(corpus: Path) -> None:
    loader = packed(corpus).prepare(seed=0).train(prefetch=0)
    loader.draw(8)
    state = json.loads(json.dumps(loader.state()))
    with (corpus / "b.txt").open("a") as file:
        file.write("\n\nanother paragraph")
    for attempt in (
        lambda: packed(corpus).prepare(seed=0, resume=state),
        lambda: packed(corpus).prepare(seed=0).train(prefetch=0).load(state),
    ):
        with pytest.raises(DataError, match="the data are not those of the run") as caught:
            attempt()
        assert f"files of 'book': changed: {corpus}/b.txt" in str(caught.value)
        assert "jsonl" not in str(caught.value)
        assert "the tokenizer is" not in str(caught.value), "it follows from the files; one cause, one complaint"


def test_a_refused_resume_makes_nothing(corpus: Path) -> None:
    state = packed(corpus).prepare(seed=0).train(prefetch=0).state()
    (corpus / "b.txt").write_text("quite another text")
    before = sorted(path.name for path in (corpus / "cache").glob("to*/*"))
    with pytest.raises(DataError, match="not those of the run"):
        packed(corpus).prepare(seed=0, resume=state)
    assert sorted(path.name for path in (corpus / "cache").glob("to*/*")) == before


def test_without_the_old_manifest_the_change_is_still_refused(corpus: Path) -> None:
    prepared = packed(corpus).prepare(seed=0)
    state = prepared.train(prefetch=0).state()
    (prepared.shards[1].folder / "manifest.json").unlink()
    (corpus / "b.txt").write_text("quite another text")
    with pytest.raises(DataError, match="which ones cannot be told"):
        packed(corpus).prepare(seed=0, resume=state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_length": 8}, "sequence_length is 8, was 16"),
        ({"validation": 0.3}, "validation is 0.3, was 0.2"),
        ({"tokenizer": Bytes()}, "the tokenizer is"),
        ({"tokenizer": Bpe(vocab_size=290)}, "the tokenizer is"),
    ],
)
def test_another_setting_is_named(corpus: Path, change: dict[str, Any], message: str) -> None:
    state = packed(corpus).prepare(seed=0).train(prefetch=0).state()
    with pytest.raises(DataError, match=message):
        packed(corpus, **change).prepare(seed=0, resume=state)


def test_another_weight_or_way_of_reading_is_named(corpus: Path) -> None:
    ours = packed(corpus, tokenizer=Bytes())
    state = ours.prepare(seed=0).train(prefetch=0).state()
    jsonl, book = ours.readers
    heavier = dataclasses.replace(ours, readers=(jsonl, dataclasses.replace(book, weight=2.0)))
    with pytest.raises(DataError, match=r"the weight of 'book' is 2\.0, was 1\.0"):
        heavier.prepare(seed=0, resume=state)
    whole = dataclasses.replace(ours, readers=(jsonl, TextFiles(paths=book.paths, name="book")))  # type: ignore[attr-defined]  # a reader of paths
    with pytest.raises(DataError, match="the tokens of 'book' differ"):
        whole.prepare(seed=0, resume=state)
    swapped = dataclasses.replace(ours, readers=(book, jsonl))
    with pytest.raises(DataError, match="the sources' order is book, jsonl, not jsonl, book"):
        swapped.prepare(seed=0, resume=state)


# --- too little data


def test_one_document_can_be_trained_on_but_not_split(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the only document there is")
    reader = TextFiles(paths=(str(tmp_path / "a.txt"),))
    part = Packed(readers=(reader,), sequence_length=8, tokenizer=Bytes(), validation=0.001, cache=str(tmp_path))
    with pytest.raises(DataError, match="there is one document, so none can be held out") as caught:
        part.prepare(seed=0).validation()
    assert "data.validation = 0" in str(caught.value)
    alone = dataclasses.replace(part, validation=0.0).prepare(seed=0)
    assert list(alone.validation()) == []
    batch = alone.train(prefetch=0).draw(7)
    rows = [alone.tokenizer.decode(row) for row in batch.tokens_BT.tolist()]
    assert all(row in 2 * "the only document there is" for row in rows)


def test_no_document_held_out_names_the_smallest_fraction_that_does(corpus: Path) -> None:
    with pytest.raises(DataError, match="none of 112 falls into the fraction 1e-06") as caught:
        packed(corpus, validation=1e-6).prepare(seed=0).validation()
    assert caught.value.legal is not None
    smallest = float(caught.value.legal.split()[3])
    assert len(list(packed(corpus, validation=smallest).prepare(seed=0).validation())) >= 1


def test_everything_held_out_names_the_largest_fraction_that_does_not(corpus: Path) -> None:
    with pytest.raises(DataError, match=r"nothing to train on: all documents of 'jsonl' \(72\)") as caught:
        packed(corpus, validation=0.9999).prepare(seed=0).train()
    largest = float((caught.value.legal or "").removeprefix("up to "))
    prepared = packed(corpus, validation=largest, sequence_length=2).prepare(seed=0)
    assert prepared.manifest["sources"]["jsonl"]["splits"]["training"]["documents"] == 1


def test_a_sequence_longer_than_the_data_names_the_source(corpus: Path) -> None:
    part = packed(corpus, sequence_length=100_000)
    with pytest.raises(DataError, match="sequence longer than the data: sequence_length = 100000") as caught:
        part.prepare(seed=0).train()
    assert "'jsonl'" in str(caught.value)


def test_empty_data_are_refused_before_a_tokenizer_is_trained(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    part = Packed(readers=(TextFiles(paths=(str(tmp_path / "a.txt"),)),), sequence_length=8, cache=str(tmp_path / "c"))
    with pytest.raises(DataError, match="no document is left of 1 seen; dropped: 1 empty"):
        part.prepare(seed=0)


def test_ids_alone_train_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": [1, 2, 3, 4, 5, 6, 7]}')
    reader = Jsonl(paths=(str(tmp_path / "a.jsonl"),))
    part = Packed(readers=(reader,), sequence_length=8, validation=0.0, cache=str(tmp_path / "c"))
    with pytest.raises(DataError, match="there is no text to train a tokenizer on"):
        part.prepare(seed=0)
    rows = dataclasses.replace(part, tokenizer=Bytes()).prepare(seed=0).train(prefetch=0).draw(1)
    assert rows.tokens_BT.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


def test_verify_looks_at_every_byte(corpus: Path) -> None:
    folder = packed(corpus).prepare(seed=0).shards[0].folder
    data = bytearray((folder / "tokens-00000.bin").read_bytes())
    data[3] ^= 1
    (folder / "tokens-00000.bin").write_bytes(data)
    packed(corpus).prepare(seed=0)
    with pytest.raises(DataError, match="SHA-256 differs"):
        packed(corpus, verify=True).prepare(seed=0)


# --- recipes


def decode(table: dict[str, Any]) -> Packed:
    part = recipe.decode_part("source", table)
    assert isinstance(part, Packed)
    return part


def test_a_recipe_table_becomes_the_part_and_back() -> None:
    table = {
        "use": "packed",
        "sequence_length": 512,
        "readers": [
            {"use": "python-stdlib", "tests": True},
            {"use": "text", "paths": ["a/*.txt"], "split": "block", "weight": 2.5},
            {"use": "jsonl", "paths": ["a.jsonl"], "field": "body"},
            {"use": "parquet", "paths": ["a.parquet"], "column": "body"},
            {"use": "huggingface", "path": "owner/name", "split": "train"},
        ],
        "tokenizer": {"use": "bpe", "vocab_size": 4096},
    }
    part = decode(table)
    assert [type(reader) for reader in part.readers] == [PythonStdlib, TextFiles, Jsonl, _parquet(), HuggingFace]
    assert decode(recipe.table_of(part)) == part
    assert list(part.check(None)) == []


def _parquet() -> type:
    from lmworks.data.read import Parquet

    return Parquet


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"validation": 1.0}, "validation"),
        ({"sequence_length": 0}, "sequence_length"),
        ({"tokenizer": {"use": "bpe", "vocab_size": 100}}, "tokenizer.vocab_size"),
        ({"tokenizer": {"use": "bpe", "split_digit": True}}, "tokenizer.split_digit"),
        ({"readers": [{"use": "python-stdlib", "weight": -1.0}]}, "readers.0.weight"),
        ({"readers": [{"use": "jsonl"}]}, "readers.0.paths"),
    ],
)
def test_settings_that_cannot_be_are_named(change: dict[str, Any], path: str) -> None:
    with pytest.raises(recipe.RecipeError) as caught:
        decode({"sequence_length": 8, "readers": ["python-stdlib"], **change})
    assert [problem.path.removeprefix("source.") for problem in caught.value.problems] == [path]


def test_readers_must_exist_and_be_told_apart() -> None:
    none = Packed(readers=(), sequence_length=8)
    assert [problem.path for problem in none.check(SimpleNamespace())] == ["readers"]
    idle = Packed(readers=(PythonStdlib(weight=0.0),), sequence_length=8)
    assert [str(problem) for problem in idle.check(SimpleNamespace())] == [
        "readers: all weights are 0: nothing would be trained on"
    ]
    twice = Packed(readers=(PythonStdlib(), PythonStdlib(tests=True), PythonStdlib(name="own")), sequence_length=8)
    assert [problem.path for problem in twice.check(SimpleNamespace())] == ["readers.0.name", "readers.1.name"]


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'lmworks\[hf\]'"):
        HuggingFace(path="owner/name").files()
