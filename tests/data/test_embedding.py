"""The key embedding: cells are cut by planes, vectors are means of word vectors, and order does not matter."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

from lmworks.data.embedding import Embedding, _model

pytestmark = pytest.mark.skipif(find_spec("wordllama") is None, reason="the extra 'semantic' is not installed")

SAME = [
    "The river flooded the old village after heavy rain in spring.",
    "After heavy rain in spring, the old village was flooded by the river.",
    "A compiler translates source code into machine instructions.",
    "",
]


def test_a_vector_is_the_mean_of_its_words_vectors() -> None:
    tokenizer, table = _model()
    ids = tokenizer.encode(SAME[0], add_special_tokens=False).ids
    mean = sum(table[i].astype(np.float64) for i in ids) / len(ids)
    assert np.allclose(Embedding().detail(SAME[0]), mean / np.sqrt((mean**2).sum()), atol=1e-5)


def test_paraphrases_are_alike_and_others_are_not() -> None:
    key = Embedding()
    first, second, other, empty = (key.detail(text) for text in SAME)
    assert key.similarity(first, second) > 0.9
    assert key.similarity(first, other) < 0.5
    assert key.similarity(first, empty) == 0
    assert key.similarity(empty, empty) == 1


def test_vectors_at_an_angle_share_cells_as_often_as_planes_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    key = Embedding(tables=2000, bits=1)
    details = {"a": rng.standard_normal(256), "b": rng.standard_normal(256)}
    details["b"] = details["a"] + 0.5 * details["b"]
    cosine = details["a"] @ details["b"] / np.linalg.norm(details["a"]) / np.linalg.norm(details["b"])

    monkeypatch.setattr(Embedding, "detail", lambda self, text: details[text].astype(np.float32))
    keys = key.keys(["a", "b"], 0)
    wanted = 1 - np.arccos(cosine) / np.pi
    error = 4 * np.sqrt(wanted * (1 - wanted) / key.tables)
    assert abs((keys[0] == keys[1]).mean() - wanted) < error


def test_cells_depend_on_text_and_seed_alone() -> None:
    key = Embedding()
    keys = key.keys(SAME, 1)
    assert np.array_equal(key.keys(SAME[::-1], 1)[::-1], keys)
    assert not np.array_equal(key.keys(SAME, 2)[:3], keys[:3])
    assert np.array_equal(key.keys(SAME, 2)[3], keys[3])
    assert (keys[0] == keys[1]).any()
