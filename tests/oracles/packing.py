"""Packing by the definition, one token at a time. Documents are lists of integers that one can check by eye."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

Document = Sequence[int]
IGNORED = -100


@dataclass
class Row:
    tokens: list[int]
    targets: list[int]
    positions: list[int]
    documents: list[int]


def endless(documents: Sequence[Document], order: Callable[[int], Sequence[int]]) -> Iterator[tuple[int, bool]]:
    """Every token of every epoch, and whether it begins a document."""
    for epoch in count():
        for number in order(epoch):
            for place, token in enumerate(documents[number]):
                yield token, place == 0


def rows(stream: Iterator[tuple[int, bool]], length: int) -> Iterator[Row]:
    """Windows of length + 1 tokens; the last token of one is the first of the next."""
    window = list(islice(stream, 1))
    while True:
        window += list(islice(stream, length))
        yield row(window)
        window = window[-1:]


def row(window: list[tuple[int, bool]]) -> Row:
    """What a model sees of one window."""
    made = Row([], [], [], [])
    position, document = 0, 0
    for i, (token, begins) in enumerate(window[:-1]):
        if i > 0:
            position = 0 if begins else position + 1
            document = document + 1 if begins else document
        next_token, next_begins = window[i + 1]
        made.tokens.append(token)
        made.targets.append(IGNORED if next_begins else next_token)
        made.positions.append(position)
        made.documents.append(document)
    return made


def shuffle(windows: Sequence[Row], per_round: int, order: Callable[[int], Sequence[int]]) -> list[Row]:
    """The windows of each whole round in the order given for it."""
    whole = len(windows) // per_round
    return [windows[i * per_round + place] for i in range(whole) for place in order(i)]
