"""Mixtures by name, epochs that are allowed, and hold-outs of readers of their own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmworks.core import recipe as recipes
from lmworks.core.errors import DataError, RecipeError
from lmworks.data.mixture import Mixture
from lmworks.data.packed import Packed
from lmworks.data.read import Jsonl
from lmworks.data.shares import ROUNDING, shares_in, shipped
from lmworks.data.tokenizer import Bytes

TEXTS = {
    "github": [f"def f{i}(): return {i}" for i in range(60)],
    "commoncrawl": [f"page {i} of a site" for i in range(90)],
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for name, found in TEXTS.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in found))
    return tmp_path


def reader(corpus: Path, name: str, **more: Any) -> Jsonl:
    return Jsonl(paths=(str(corpus / f"{name}.jsonl"),), name=name, **more)


def packed(corpus: Path, *names: str, **settings: Any) -> Packed:
    readers = tuple(reader(corpus, name) for name in names or TEXTS)
    given = {"readers": readers, "sequence_length": 16, "tokenizer": Bytes(), "validation": 0.0, **settings}
    return Packed(cache=str(corpus / "cache"), **given)


def problems(corpus: Path, *, readers: list[dict[str, Any]], **data: Any) -> dict[str, str]:
    """What a training recipe with this data is told, by path."""
    table = {
        "do": "train",
        "steps": 10,
        "batch_size": 4,
        "model": {"use": "decoder", "n_layers": 1, "hidden_size": 16, "n_heads": 2, "ffn_size": 16},
        "optimizer": {"use": "adamw", "lr": 1e-3},
        "data": {"tokenizer": "bytes", "sequence_length": 16, "validation": 0, "readers": readers, **data},
    }
    with pytest.raises(RecipeError) as caught:
        recipes.decode(table)
    found: dict[str, str] = {}
    for problem in caught.value.problems:
        found[problem.path] = "; ".join([*filter(None, [found.get(problem.path)]), problem.text])
    return found


def lines(corpus: Path, name: str, **more: Any) -> dict[str, Any]:
    return {"use": "jsonl", "name": name, "paths": [str(corpus / f"{name}.jsonl")], **more}


# --- mixtures


def test_the_shipped_mixtures_come_to_100() -> None:
    assert shipped() == [f"dc-{i}" for i in range(1, 8)]
    for name in shipped():
        assert abs(sum(shares_in(name).values()) - 100) <= ROUNDING
    assert len(shares_in("dc-6")) == 7


def test_rows_come_in_the_shares_of_the_mixture(corpus: Path) -> None:
    mixed = packed(corpus, mixture="dc-3")
    assert mixed.shares == pytest.approx({"github": 0.242, "commoncrawl": 0.758})
    loader = mixed.prepare(seed=0).train(prefetch=0)
    loader.draw(1000)
    assert loader.state()["rows"] == {"github": 242, "commoncrawl": 758}
    assert loader.state()["made_with"]["sources"]["github"]["weight"] == 24.2


def test_a_long_draw_stays_within_three_standard_errors_and_resumes_within_an_epoch() -> None:
    shares = shares_in("dc-6")
    mixture, draws = Mixture(list(shares.values())), 100_000
    _, counts = mixture.take([0] * 7, draws)
    chance = np.array(list(shares.values())) / sum(shares.values())
    assert (np.abs(np.array(counts) - draws * chance) < 3 * np.sqrt(draws * chance * (1 - chance))).all()
    order, _ = mixture.take([0] * 7, 500)
    first, there = mixture.take([0] * 7, 321)
    assert first + mixture.take(there, 179)[0] == order


def test_another_mixture_does_not_go_on_with_a_run(corpus: Path) -> None:
    state = packed(corpus, mixture="dc-3").prepare(seed=0).train(prefetch=0).state()
    with pytest.raises(DataError, match=r"the weight of 'github' is 9\.1, was 24\.2"):
        packed(corpus, mixture="dc-2").prepare(seed=0, resume=state)


def test_a_mixture_that_does_not_fit_its_readers_is_told(corpus: Path) -> None:
    readers = [lines(corpus, "github"), lines(corpus, "commoncrawl")]
    assert "takes nothing from 'github'" in problems(corpus, readers=readers, mixture="dc-1")["data.mixture"]
    assert "takes 24.2 % from 'wikipedia', and no reader" in str(problems(corpus, readers=readers, mixture="dc-4"))
    found = problems(corpus, readers=[lines(corpus, "github", weight=2.0), readers[1]], mixture="dc-3")
    assert found["data.readers.0.weight"] == "has no effect: mixture = 'dc-3' gives it"
    assert "did you mean 'dc-" in problems(corpus, readers=readers, mixture="dc-9")["data.mixture"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("shares = 3", "is no mixture"),
        ("[shares]\ngithub = 'half'", "is no mixture"),
        ("[shares]\ngithub = 0\ncommoncrawl = 100", "a number above 0"),
        ("[shares]\ngithub = 30\ncommoncrawl = 60", "the shares come to 90, not to 100 per cent"),
        ("[shares", "is not TOML"),
    ],
)
def test_a_file_that_is_no_mixture_is_told(corpus: Path, text: str, why: str) -> None:
    path = corpus / "mine.toml"
    path.write_text(text)
    readers = [lines(corpus, "github"), lines(corpus, "commoncrawl")]
    assert why in problems(corpus, readers=readers, mixture=str(path))["data.mixture"]


# --- epochs


def test_a_mixture_that_needs_more_epochs_than_allowed_is_told_how_many(corpus: Path) -> None:
    allowed = packed(corpus, mixture="dc-3", most_epochs=4.0)
    prepared = allowed.prepare(seed=0)
    tokens = {name: part["splits"]["training"]["tokens"] for name, part in prepared.manifest["sources"].items()}
    rows = int(4 * tokens["commoncrawl"] / 16 / 0.758)  # the larger share runs out first
    allowed.must_last(prepared, rows)
    with pytest.raises(DataError, match=r"would read 'commoncrawl' 8\.0\d times, and most_epochs is 4") as caught:
        allowed.must_last(prepared, 2 * rows + 2)
    assert caught.value.legal == f"up to {rows:,} rows with these shares"
    dataclasses.replace(allowed, most_epochs=None).must_last(prepared, 10**9)


# --- hold-outs of their own


def test_held_out_readers_are_validated_on_and_what_equals_them_is_not_trained_on(corpus: Path) -> None:
    (corpus / "clean.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in [*TEXTS["github"][:7], "a new one"]))
    prepared = packed(corpus, held_out=(reader(corpus, "clean"),)).prepare(seed=0)
    decode = prepared.tokenizer.decode
    held = "".join(decode(batch.tokens_BT.ravel().tolist()) for batch in prepared.validation())
    for text in (*TEXTS["github"][:7], "a new one"):
        assert held.count(text) == 1
    trained = {name: part["splits"]["training"]["documents"] for name, part in prepared.manifest["sources"].items()}
    assert trained == {"github": 53, "commoncrawl": 90}
    assert prepared.manifest["held_out"]["equal_documents_left_out"] == 7
    assert prepared.manifest["held_out"]["sources"]["clean"]["documents"] == 8


def test_other_held_out_documents_do_not_go_on_with_a_run(corpus: Path) -> None:
    (corpus / "clean.jsonl").write_text(json.dumps({"text": "a new one"}))
    held = packed(corpus, held_out=(reader(corpus, "clean"),))
    state = held.prepare(seed=0).train(prefetch=0).state()
    held.prepare(seed=0, resume=state)
    with pytest.raises(DataError, match="the held-out documents are others"):
        packed(corpus).prepare(seed=0, resume=state)


def test_all_documents_of_a_source_held_out_is_told(corpus: Path) -> None:
    held = packed(corpus, held_out=(reader(corpus, "github"),)).prepare(seed=0)
    with pytest.raises(DataError, match="all 60 documents of 'github' equal held-out ones"):
        held.train(prefetch=0)


def test_settings_beside_held_out_that_would_do_nothing_are_told(corpus: Path) -> None:
    held = [lines(corpus, "github", weight=2.0), lines(corpus, "github")]
    found = problems(corpus, readers=[lines(corpus, "commoncrawl")], held_out=held, validation=0.01)
    assert "must be 0 beside held_out" in found["data.validation"]
    assert "read once" in found["data.held_out.0.weight"]
    assert "2 readers are called 'github'" in found["data.held_out.1.name"]
