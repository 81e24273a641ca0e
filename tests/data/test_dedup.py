"""The stage dedup: its curve, its clusters against brute force, and that nothing but documents and settings matters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.core.errors import RecipeError
from lmworks.data.bands import best_bands, collision
from lmworks.data.clusters import Components, join_alike, shared
from lmworks.data.dedup import Dedup
from lmworks.data.joining import Corpus, clusters_of
from lmworks.data.keys import Exact, Key, MinHash
from lmworks.data.record import Dropped
from lmworks.data.stage import Context, Surveyed
from lmworks.data.units import LineFile, row_of
from tests.make.cleaning import answers, recipe, records, texts, write_jsonl
from tests.oracles import dedup as oracle

rensa = pytest.importorskip("rensa", reason="the extra 'data' is not installed")


def surveyed(
    stage: Dedup, shards: Sequence[Sequence[str]], folder: Path, sources: Sequence[str] = ()
) -> list[Surveyed]:
    found = []
    for number, shard in enumerate(shards):
        source = sources[number] if sources else "toy"
        own = records(shard, source=source)
        place = folder / f"survey{number}-{len(list(folder.iterdir()))}"
        place.mkdir()
        lines = LineFile(place / "documents.jsonl.zst")
        for record in own:
            lines.write(row_of(record))
        lines.close()
        stage.survey(own, place, Context(seed=0))
        found.append(Surveyed(folder=place, records=place / "documents.jsonl.zst"))
    return found


def verdict(stage: Dedup, shards: Sequence[Sequence[str]], folder: Path, **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    against = surveyed(stage, more.pop("against", []), folder, ["old"] * 9)
    own = surveyed(stage, shards, folder, **more)
    place = folder / "verdict"
    place.mkdir()
    stage.settle(own, against, place, Context(seed=0))
    return place


def kept(stage: Dedup, shards: Sequence[Sequence[str]], folder: Path, **more: Any) -> list[str]:
    """The texts that are kept, in order."""
    place = verdict(stage, shards, folder, **more)
    found = [answers(stage, shard, verdict=place, shard=i) for i, shard in enumerate(shards)]
    pairs = [(a, t) for own, shard in zip(found, shards, strict=True) for a, t in zip(own, shard, strict=True)]
    return [text for answer, text in pairs if not isinstance(answer, Dropped)]


# --- the curve


@pytest.mark.parametrize(
    ("threshold", "permutations", "wanted"), [(0.8, 128, (9, 13)), (0.7, 128, (14, 9)), (0.8, 256, (17, 15))]
)
def test_bands_are_those_of_the_reference(threshold: float, permutations: int, wanted: tuple[int, int]) -> None:
    assert best_bands(threshold, permutations) == wanted


def test_bands_are_those_of_datasketch() -> None:
    lsh = pytest.importorskip("datasketch", reason="the oracle is not installed").MinHashLSH(threshold=0.9, num_perm=64)
    assert best_bands(0.9, 64) == (lsh.b, lsh.r)


def test_the_curve_is_the_one_that_the_docs_tell() -> None:
    told = [(0.7, 0.084), (0.8, 0.399), (0.9, 0.929), (0.95, 0.9985)]
    assert [collision(s, 9, 13) for s, _ in told] == pytest.approx([p for _, p in told], abs=5e-4)


def planted(count: int, seed: int) -> list[tuple[str, str, float]]:
    """Pairs of texts with their true Jaccard similarity of 13-grams, from about 0.6 to 1."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    found = []
    for i in range(count):
        first = "".join(rng.choice(letters, size=600))
        second = list(first)
        for place in rng.choice(600, size=i % 11, replace=False):
            second[place] = "0"
        other = "".join(second)
        sets = [oracle.ngrams(text, 13, "character") for text in (first, other)]
        found.append((first, other, oracle.jaccard(*sets)))
    return found


def test_estimates_and_recall_follow_the_formulas() -> None:
    pairs = planted(400, seed=3)
    key = MinHash()
    first, _ = key.signatures([a for a, _, _ in pairs], 0)
    second, _ = key.signatures([b for _, b, _ in pairs], 0)
    true = np.array([s for _, _, s in pairs])
    estimate = (first == second).mean(axis=1)
    expected = np.sqrt(np.mean(true * (1 - true) / 128))
    assert np.sqrt(np.mean((estimate - true) ** 2)) < 1.25 * expected
    keys = key.keys([a for a, _, _ in pairs], 0), key.keys([b for _, b, _ in pairs], 0)
    found = (keys[0] == keys[1]).any(axis=1)
    chance = np.array([collision(s, 9, 13) for s in true])
    for low in (0.6, 0.7, 0.8, 0.9):
        chosen = (true >= low) & (true < low + 0.1)
        error = 3 * np.sqrt((chance[chosen] * (1 - chance[chosen])).sum())
        assert abs(found[chosen].sum() - chance[chosen].sum()) <= max(error, 1), low


def test_the_true_similarity_is_the_oracles() -> None:
    key = MinHash(verify=0.5)
    for first, second, true in planted(25, seed=1):
        assert key.similarity(key.detail(first), key.detail(second)) == pytest.approx(true, abs=1e-12)


def test_a_document_of_many_blocks_has_the_set_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(texts(6))
    whole = MinHash().detail(text)
    keys = MinHash().keys([text, text[:100]], 0)
    for name in ("BLOCK", "LONG"):
        monkeypatch.setattr(f"lmworks.data.keys.{name}", 64)
    assert np.array_equal(MinHash().detail(text), whole)
    assert np.array_equal(MinHash().keys([text, text[:100]], 0), keys)


# --- clusters


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), max_size=24), st.integers(1, 3))
def test_components_are_the_oracles_however_keys_are_cut(keys: list[list[int]], passes: int) -> None:
    matrix = np.array(keys, dtype=np.uint64).reshape(-1, 3).T
    shards = np.array_split(matrix, 2, axis=1)
    found = Components(len(keys))
    for band in range(3):
        for part in shared(shards, band, max(1, len(keys) * 40 // passes)):
            assert all(len(group) > 1 for group in part.groups())
            found.join(part.members, part.firsts)
    assert found.labels().tolist() == oracle.clusters(keys)


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=2), max_size=14), st.integers(0, 2**32))
def test_verified_components_are_those_of_all_alike_pairs(keys: list[list[int]], seed: int) -> None:
    count = len(keys)
    alike = np.random.default_rng(seed).random((count, count)) < 0.5
    alike = np.triu(alike, 1) | np.triu(alike, 1).T
    found, refused = Components(count), set[tuple[int, int]]()
    for band in range(2):
        for part in shared([np.array(keys, dtype=np.uint64).reshape(-1, 2).T], band, 10**9):
            for group in part.groups():
                join_alike(found, group, lambda a, b: bool(alike[a, b]), refused)
    assert found.labels().tolist() == oracle.clusters(keys, alike.tolist())


def test_a_long_chain_is_one_component() -> None:
    found = Components(5000)
    numbers = np.arange(4999)
    found.join(numbers + 1, numbers)
    assert not found.labels().any()


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_verified_clusters_equal_brute_force(count: int, tmp_path: Path) -> None:
    some = texts(count, seed=5, words=30)
    stage = Dedup(key=MinHash(verify=0.8))
    corpus = Corpus(surveyed(stage, [some[:40], some[40:]], tmp_path), [], stage.key, memory=10**9)
    found = list(range(count))
    clusters = clusters_of(corpus, prefer=(), per_source=False, folder=tmp_path)
    for row, number in zip(clusters.table(), clusters.numbers.tolist(), strict=True):
        end = clusters.starts[row["cluster"]] + clusters.sizes[row["cluster"]]
        found[number] = int(clusters.numbers[clusters.starts[row["cluster"]] : end].min())
        if "like" in row:
            pair = (number, int(clusters.numbers[clusters.starts[row["cluster"]]]))
            sets = [oracle.ngrams(oracle.plain(some[i]), 13, "character") for i in pair]
            assert row["similarity"] == pytest.approx(oracle.jaccard(*sets), abs=6e-5)
    sets = [oracle.ngrams(oracle.plain(text), 13, "character") for text in some]
    alike = [[oracle.jaccard(a, b) >= 0.8 for b in sets] for a in sets]
    assert found == oracle.clusters(stage.key.keys(some, 0).tolist(), alike)


# --- the stage


def test_one_of_each_cluster_is_kept_and_says_for_how_many_it_stands(tmp_path: Path) -> None:
    some = ["a long text about the river and the stone", "other words altogether, on time and people"]
    shards = [[some[0], some[1]], [some[0], some[0] + " at last"]]
    place = verdict(Dedup(), shards, tmp_path)
    found = answers(Dedup(), shards[1], verdict=place, shard=1)
    first = answers(Dedup(), shards[0], verdict=place, shard=0)
    assert found[0] == Dropped("0", "duplicate", "toy: 1")
    assert [found[1].facts["copies"], first[1].facts["copies"]] == [3, 1]  # type: ignore[union-attr]
    assert first[0] == Dropped("0", "duplicate", "toy: 1")


KEYS: list[Key] = [MinHash(), MinHash(verify=0.75), Exact(of="plain")]


@pytest.mark.parametrize("key", KEYS, ids=["minhash", "verified", "exact"])
@settings(max_examples=6)
@given(order=st.permutations(range(40)), cut=st.integers(0, 40))
def test_order_and_shards_do_not_change_what_is_kept(
    tmp_path_factory: pytest.TempPathFactory, key: Key, order: list[int], cut: int
) -> None:
    some = texts(40, seed=2)
    folder = tmp_path_factory.mktemp("order")
    mixed = [some[i] for i in order]
    kept_then = sorted(kept(Dedup(key=key), [some], folder / "one"))
    kept_now = kept(Dedup(key=key), [mixed[:cut], mixed[cut:]], folder / "two")
    assert sorted(kept_now) == kept_then
    assert kept(Dedup(key=key), [kept_now], folder / "again") == kept_now, "a second pass finds nothing more"


def test_scope_global_compares_sources_and_per_source_does_not(tmp_path: Path) -> None:
    shards = [texts(30, seed=2), texts(30, seed=2)]
    stages = {scope: Dedup(scope=scope) for scope in ("global", "per-source")}  # type: ignore[arg-type]
    found = {
        scope: len(kept(stage, shards, tmp_path / scope, sources=["books", "pages"])) for scope, stage in stages.items()
    }
    alone = len(kept(stages["global"], shards[:1], tmp_path / "alone"))
    assert found == {"global": alone, "per-source": 2 * alone}


def test_a_preferred_source_keeps_its_documents(tmp_path: Path) -> None:
    text = texts(1)[0]
    shards = [[text + " and more words at the end"], [text]]
    sources = ["books", "pages"]
    assert kept(Dedup(), shards, tmp_path / "longest", sources=sources) == shards[0]
    assert kept(Dedup(prefer=("pages",)), shards, tmp_path / "preferred", sources=sources) == shards[1]


def test_references_drop_what_is_like_them_and_are_never_handed_on(tmp_path: Path) -> None:
    old, new = texts(20, seed=1), texts(20, seed=2)
    shards = [[*new, old[3], old[4] + " you see", old[5][:40]]]
    for scope, left in (("global", len(kept(Dedup(), [new], tmp_path / "new"))), ("against", 20)):
        stage = Dedup(scope=scope, key=MinHash(verify=0.5))  # type: ignore[arg-type]
        found = kept(stage, shards, tmp_path / scope, against=[old])
        assert len(found) == left + 1
        assert found[-1] == old[5][:40]
        table = (tmp_path / scope / "verdict" / "findings.json").read_text()
        assert "toy like old" in table


def test_texts_without_an_ngram_are_the_same_as_their_copies_only(tmp_path: Path) -> None:
    shards = [["", "!", "?", "short", "Short", "short", "\ud800 odd", "123456789012"]]
    assert kept(Dedup(), shards, tmp_path) == ["", "!", "?", "short", "Short", "\ud800 odd", "123456789012"]


def test_a_cluster_that_is_large_is_told(tmp_path: Path) -> None:
    place = verdict(Dedup(), [["All rights reserved, whatever that may mean."] * 5 + texts(5)], tmp_path)
    (warning,) = json.loads((place / "findings.json").read_text())["warnings"]
    assert warning.startswith("a cluster of 5 documents")


@pytest.mark.parametrize(
    ("stage", "text"),
    [
        ({"key": {"use": "minhash", "bands_rows": [20, 13]}}, "20 bands of 13 rows need 260 permutations"),
        ({"key": {"use": "minhash", "threshold": 0.01}}, "nearly every pair would be found"),
        ({"key": {"use": "minhash", "bands_rows": [1, 20]}}, "hardly any pair would be found"),
        ({"scope": "against"}, "needs reference documents"),
        ({"prefer": ["bokos"]}, "did you mean 'books'"),
        ({"scope": "per-source", "against": [{"use": "python-stdlib"}]}, "has no effect with scope = 'per-source'"),
        ({"key": "simhash"}, "no key is called 'simhash'"),
    ],
)
def test_mistakes_are_told(stage: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=text):
        recipe([write_jsonl(tmp_path / "books.jsonl", [])], [{"use": "dedup", **stage}])
