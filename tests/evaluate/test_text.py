"""Loss on text: every token once, and against a slow reading."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core.errors import DataError, UsageError
from lmworks.data.tokenizer import Bytes
from lmworks.evaluate.text import read_text, score_text, window_sizes, windows
from lmworks.model.backbone import Backbone
from lmworks.model.decoder import DecoderConfig
from lmworks.model.init import initialise

TOKENIZER = Bytes().make([])
TEXT = "Größe: the quick brown fox jumps over the lazy dog.\n" * 3


def model_of(max_position: int = 64) -> Backbone:
    config = DecoderConfig(
        vocab_size=257, n_layers=2, hidden_size=32, n_heads=4, ffn_size=48, max_position=max_position
    )
    model: Backbone = config.build()
    initialise(model, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def slow_loss(model: Backbone, ids: list[int], context: int, stride: int) -> float:
    """Each token on its own: as much context as the window that counts it shows."""
    total = 0.0
    for target in range(1, len(ids)):
        done = 0 if target <= context else context + (target - 1 - context) // stride * stride
        end = min(len(ids) - 1, context if target <= context else done + stride)
        begin = max(0, end - context)
        with torch.no_grad():
            logits_V = model.logits(model(torch.tensor([ids[begin:target]]))[0, -1])
        total -= float(logits_V.double().log_softmax(-1)[ids[target]])
    return total


@pytest.mark.parametrize(("context", "stride"), [(64, 32), (16, 16), (16, 1), (64, 64), (7, 3)])
def test_against_one_token_at_a_time(context: int, stride: int) -> None:
    model, text = model_of(), TEXT[:80]
    ids = [TOKENIZER.bos, *TOKENIZER.encode(text).tolist()]
    score = score_text(model, TOKENIZER, text, context=context, stride=stride)
    assert score.tokens == len(ids) - 1
    assert score.bytes == len(text.encode())
    assert score.loss == pytest.approx(slow_loss(model, ids, context, stride), rel=1e-5)


@given(st.integers(1, 300), st.integers(1, 40), st.data())
def test_every_token_counts_once_and_sees_enough(targets: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    found = list(windows(targets, context, stride))
    assert [t for w in found for t in range(w.first, w.end)] == list(range(targets))
    for window in found:
        assert 0 <= window.begin <= window.first < window.end <= window.begin + context
        assert window.begin == 0 or window.first - window.begin >= context - stride


def test_a_longer_context_is_used() -> None:
    model = model_of()
    assert score_text(model, TOKENIZER, TEXT, context=64).loss != score_text(model, TOKENIZER, TEXT, context=8).loss


def test_the_figures_agree_with_each_other() -> None:
    table = score_text(model_of(), TOKENIZER, TEXT).table()
    assert table["tokens"] == table["bytes"] == len(TEXT.encode())
    assert table["bits_per_byte"] == pytest.approx(table["loss_per_token"] / math.log(2))
    assert table["perplexity"] == pytest.approx(math.exp(table["loss_per_token"]))


def test_windows_that_cannot_be_are_refused() -> None:
    model = model_of()
    assert window_sizes(model, None, None) == (64, 32)
    for context, stride, word in ((65, None, "1 to 64"), (0, None, "1 to 64"), (16, 17, "1 to 16"), (16, 0, "1 to 16")):
        with pytest.raises(UsageError, match=word):
            window_sizes(model, context, stride)


def test_files_that_are_no_text_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with pytest.raises(DataError, match=r"a\.txt: cannot be read"):
        read_text(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="is empty"):
        read_text(path)
    path.write_bytes("ab\u00e9".encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8: byte 2 is 0xe9"):
        read_text(path)
    path.write_text(TEXT, encoding="utf-8")
    assert read_text(path) == TEXT


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    model = model_of()
    with torch.no_grad():
        model.get_parameter("norm.weight").fill_(torch.nan)
    with pytest.raises(DataError, match="not finite"):
        score_text(model, TOKENIZER, TEXT)
