"""Lengths of documents: limits, seeds, and the forms that their page tells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core.errors import UsageError
from lmworks.data import lengths
from lmworks.data.lengths import MIXES, drawn, of_reader
from lmworks.data.read import Jsonl, TextFiles

K = 1024


@given(st.sampled_from(list(MIXES)), st.integers(1, 200), st.integers(0, 10**6), st.integers(0, 50))
def test_lengths_keep_their_limits_and_their_seed(mix: str, least: int, more: int, seed: int) -> None:
    made = drawn(mix, 50, least=least, longest=least + more, seed=seed)
    assert made.shape == (50,)
    assert least <= made.min()
    assert made.max() <= least + more
    assert np.array_equal(made, drawn(mix, 50, least=least, longest=least + more, seed=seed))


def test_octaves_of_log_uniform_lengths_are_alike() -> None:
    counts, _ = np.histogram(drawn("log-uniform", 90_000, least=256, longest=128 * K), 256 * 2 ** np.arange(10))
    assert counts.min() > 0.95 * counts.max()


def test_the_tail_of_pretrain_is_a_power_and_holds_nearly_half_of_the_tokens() -> None:
    made = drawn("pretrain", 1_000_000, longest=512 * K)
    assert np.median(made) == pytest.approx(lengths.BODY_MEDIAN, rel=0.04)
    beyond = [(made > x).mean() for x in (64 * K, 256 * K)]
    assert beyond[0] / beyond[1] == pytest.approx(4**lengths.TAIL_POWER, rel=0.15)
    assert 0.4 < made[made > lengths.TAIL_START].sum() / made.sum() < 0.5


def test_three_tokens_of_five_of_long_are_in_long_documents() -> None:
    made = drawn("long", 200_000, longest=512 * K)
    short = drawn("pretrain", 200_000, longest=512 * K)
    there = short[short >= lengths.LONG_START].sum() / short.sum()
    share = made[made >= lengths.LONG_START].sum() / made.sum()
    assert share == pytest.approx(lengths.LONG_TOKENS + (1 - lengths.LONG_TOKENS) * there, abs=0.02)


@pytest.mark.parametrize(
    ("mix", "least", "longest", "told"),
    [
        ("pretrian", 1, 8, "did you mean 'pretrain'"),
        ("long", 9, 8, "documents of 9 to 8 tokens"),
        ("long", 0, 8, "documents of 0 to 8 tokens"),
    ],
)
def test_what_cannot_be_drawn_is_refused(mix: str, least: int, longest: int, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        drawn(mix, 3, least=least, longest=longest)


def test_documents_of_files_are_counted_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("four", encoding="utf-8")
    (tmp_path / "b.txt").write_text("", encoding="utf-8")
    (tmp_path / "c.txt").write_text("äöü", encoding="utf-8")
    (tmp_path / "ids.jsonl").write_text('{"text": [1, 2, 3]}\n', encoding="utf-8")
    assert of_reader(TextFiles(paths=(str(tmp_path / "*.txt"),))).tolist() == [4, 6]
    assert of_reader(TextFiles(paths=(str(tmp_path / "*.txt"),)), bytes_per_token=4).tolist() == [1, 2]
    assert of_reader(Jsonl(paths=(str(tmp_path / "ids.jsonl"),)), bytes_per_token=4).tolist() == [3]
