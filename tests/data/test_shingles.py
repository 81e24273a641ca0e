"""Hashed n-grams: equal exactly where the n-grams are, never across texts."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from lmworks.data.shingles import mixed, plain, shingles
from tests.oracles import dedup as oracle

TEXTS = st.lists(st.text(alphabet="ab \n.Éß😀", max_size=30), max_size=6)


@given(st.text(max_size=60))
@example("\x1c a\u2028B ")
@example("".join(map(chr, range(128))))
def test_plain_text_is_the_oracles(text: str) -> None:
    assert plain(text) == oracle.plain(text)


@given(TEXTS, st.integers(1, 6), st.sampled_from(["character", "word"]))
def test_hashes_are_equal_where_ngrams_are(texts: list[str], n: int, unit: str) -> None:
    flat = [plain(text) for text in texts]
    found = shingles(flat, n, unit)  # type: ignore[arg-type]
    named: dict[object, int] = {}
    for i, text in enumerate(flat):
        items = text if unit == "character" else text.split()
        grams = [tuple(items[j : j + n]) for j in range(len(items) - n + 1)]
        own = found.of(i).tolist()
        assert len(own) == len(grams)
        for gram, value in zip(grams, own, strict=True):
            assert named.setdefault(gram, value) == value
    assert len(set(named.values())) == len(named)


def test_hashes_stay_what_they_were() -> None:
    assert shingles(["to be or not to be"], 13, "character").hashes[:2].tolist() == GOLDEN["character"]
    assert shingles(["to be or not to be"], 2, "word").hashes[:2].tolist() == GOLDEN["word"]


GOLDEN = {"character": [12590865695442357257, 18225954660635728965], "word": [7934714420520186290, 2615948429391316081]}
"""Stored keys are found again by these; a change of them is a change of shingles.VERSION."""


def test_mixing_loses_nothing_and_moves_every_bit() -> None:
    values = np.arange(4096, dtype=np.uint64)
    assert len(np.unique(mixed(values))) == 4096
    flips = [(int(a) ^ int(b)).bit_count() for a, b in zip(mixed(values[::2]), mixed(values[1::2]), strict=True)]
    assert 30 < np.mean(flips) < 34
