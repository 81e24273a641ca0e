"""Measures of repetition, counted the slow way."""

from __future__ import annotations

from collections import Counter


def _grams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _share(words: list[str], inside: set[int]) -> float:
    total = sum(len(word) for word in words)
    return sum(len(words[i]) for i in inside) / total if total else 0.0


def repeated_ngram_characters(text: str, n: int) -> float:
    """Characters of words in n-grams that were seen before, over all."""
    words, seen, inside = text.split(), set(), set()
    for i, gram in enumerate(_grams(words, n)):
        if gram in seen:
            inside |= set(range(i, i + n))
        seen.add(gram)
    return _share(words, inside)


def most_frequent_ngram_characters(text: str, n: int) -> float:
    """Characters of words in the n-gram that occurs most often, of those the one with the largest share."""
    words = text.split()
    grams = _grams(words, n)
    counts = Counter(grams)
    most = max(counts.values(), default=0)
    if most < 2:
        return 0.0
    shares = []
    for gram, count in counts.items():
        if count == most:
            places = [i for i, other in enumerate(grams) if other == gram]
            shares.append(_share(words, {j for i in places for j in range(i, i + n)}))
    return max(shares)


def repeated(items: list[str], characters: bool) -> float:
    """Of items: the share that stood there before, by number or by characters that are not white space."""
    weights = [len("".join(item.split())) if characters else 1 for item in items]
    again = sum(w for i, (item, w) in enumerate(zip(items, weights, strict=True)) if item in items[:i])
    return again / sum(weights) if sum(weights) else 0.0
