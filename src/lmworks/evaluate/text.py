"""The loss of a model on text: per token, per byte (so that tokenizers can be compared), as perplexity.

A text longer than the context is read in overlapping windows. Every token of the text counts exactly once, behind as
much context as fits: `context - stride` tokens or more, all of it at the start. The first token is predicted from bos.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lmworks.core.errors import DataError, UsageError
from lmworks.data.tokenizer import Tokenizer
from lmworks.model.backbone import Backbone
from lmworks.model.head import IGNORE

CONTEXT = 2048
"""Tokens of a window when nobody says otherwise, and the model was made for as many."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a text costs a model. Losses are in nats."""

    loss: float
    """Sum over the tokens."""
    tokens: int
    bytes: int
    """UTF-8 bytes of the text."""

    @property
    def loss_per_token(self) -> float:
        """Mean over the tokens."""
        return self.loss / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte."""
        return self.loss / math.log(2) / self.bytes

    @property
    def perplexity(self) -> float:
        """exp(loss per token); inf where that is too large for a float."""
        return math.exp(self.loss_per_token) if self.loss_per_token < 700 else math.inf

    def table(self) -> dict[str, Any]:
        """Every figure, for JSON."""
        return {
            "loss_per_token": self.loss_per_token,
            "bits_per_byte": self.bits_per_byte,
            "perplexity": self.perplexity,
            **{key: value for key, value in asdict(self).items() if key != "loss"},
        }


def read_text(path: Path) -> str:
    """The text of a file. Raises DataError when it is missing, empty, or not UTF-8 (naming the first bad byte)."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}",
            where=str(path),
            next_step=f"convert it: iconv -f latin1 -t utf-8 {path.name}",
        ) from error
    if not text:
        raise DataError("is empty", where=str(path))
    return text


def score_text(
    model: Backbone, tokenizer: Tokenizer, text: str, *, context: int | None = None, stride: int | None = None
) -> Score:
    """The loss of every token of `text`, which stands behind bos. Raises UsageError for windows that cannot be.

    `context` defaults to the model's max_position, at most CONTEXT; `stride` to half of it.
    """
    tokens = tokenizer.encode(text).tolist()
    context, stride = window_sizes(model, context, stride)
    loss = sum(_window_losses(model, [tokenizer.bos, *tokens], context, stride))
    return Score(loss=loss, tokens=len(tokens), bytes=len(text.encode("utf-8")))


def window_sizes(model: Backbone, context: int | None, stride: int | None) -> tuple[int, int]:
    """The settings filled in and checked."""
    longest = int(getattr(model.config, "max_position", CONTEXT))
    context = min(CONTEXT, longest) if context is None else context
    if context < 1 or context > longest:
        raise UsageError(f"a context of {context} tokens does not fit the model", legal=f"1 to {longest}")
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise UsageError(f"a stride of {stride} would leave tokens out", legal=f"1 to {context} (the context)")
    return context, stride


@dataclass(frozen=True)
class Window:
    """Tokens begin..end are read; each is asked for the token after it, and the answers from `first` on count."""

    begin: int
    end: int
    first: int


def windows(targets: int, context: int, stride: int) -> Iterator[Window]:
    """Windows over `targets` tokens behind one start token: each target counts in exactly one window."""
    done = 0
    while done < targets:
        end = min(targets, context if done == 0 else done + stride)
        yield Window(max(0, end - context), end, done)
        done = end


def _window_losses(model: Backbone, ids: Sequence[int], context: int, stride: int) -> Iterator[float]:
    """The summed loss of each batch of windows, in float64."""
    device = next(model.parameters()).device
    at_once = max(1, (8 if device.type == "cuda" else 1) * CONTEXT // context)
    ids_T = torch.tensor(ids)
    left = windows(len(ids) - 1, context, stride)
    while batch := list(islice(left, at_once)):
        width = max(window.end - window.begin for window in batch)
        tokens_BT = torch.zeros(len(batch), width, dtype=torch.int64)
        targets_BT = torch.full((len(batch), width), IGNORE)
        for row, window in enumerate(batch):
            length, skipped = window.end - window.begin, window.first - window.begin
            tokens_BT[row, :length] = ids_T[window.begin : window.end]
            targets_BT[row, skipped:length] = ids_T[window.first + 1 : window.end + 1]
        yield _loss(model, tokens_BT.to(device), targets_BT.to(device))


@torch.inference_mode()
def _loss(model: Backbone, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> float:
    hidden_BTD = model(tokens_BT)  # padding stands on the right, where a causal model does not look
    losses_N = model.cross_entropy_each(hidden_BTD, targets_BT).flatten()
    total = float(losses_N.double().sum())
    if not math.isfinite(total):
        raise DataError("the model's loss on this text is not finite", next_step="try --precision fp32")
    return total
