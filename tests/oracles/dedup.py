"""Slow ways to say which documents are the same."""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from itertools import combinations


def plain(text: str) -> str:
    """Lower case, ASCII punctuation gone, white space single."""
    lower = "".join(c for c in text.lower() if c not in string.punctuation)
    words: list[str] = []
    word = ""
    for c in lower + " ":
        if c.isspace():
            words += [word] if word else []
            word = ""
        else:
            word += c
    return " ".join(words)


def ngrams(text: str, n: int, unit: str) -> set[object]:
    """The set of n-grams of a text that is plain."""
    items: Sequence[str] = text if unit == "character" else text.split()
    return {tuple(items[i : i + n]) for i in range(len(items) - n + 1)}


def jaccard(first: set[object], second: set[object]) -> float:
    """Shared over all; 1 for two empty sets."""
    return len(first & second) / len(first | second) if first | second else 1.0


def components(count: int, edges: Iterable[tuple[int, int]]) -> list[int]:
    """The smallest number that each can be reached from."""
    labels = list(range(count))
    todo = list(edges)
    changed = True
    while changed:
        changed = False
        for a, b in todo:
            least = min(labels[a], labels[b])
            if (labels[a], labels[b]) != (least, least):
                labels[a] = labels[b] = least
                changed = True
    return labels


def clusters(keys: Sequence[Sequence[int]], alike: Sequence[Sequence[bool]] | None = None) -> list[int]:
    """Components of all pairs that share a key in some band, and that are alike where that is looked at."""
    pairs = combinations(range(len(keys)), 2)
    edges = [(a, b) for a, b in pairs if any(x == y for x, y in zip(keys[a], keys[b], strict=True))]
    return components(len(keys), [(a, b) for a, b in edges if alike is None or alike[a][b]])
