"""What can be measured of a text, by name: the quantities that published quality rules put bounds on.

A word is what white space parts. A line or a paragraph counts when it holds something besides white space; paragraphs
are parted by blank lines. Shares of characters are shares of the characters that are not white space.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property
from typing import final

import numpy as np
from numpy.typing import NDArray

from lmworks.data.shingles import shingles

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
"""Gopher's eight."""
BULLETS = ("-", "*", "\u2022", "\u2023", "\u25cf", "\u25aa", "\u2013", "\u00b7")
ELLIPSES = ("...", "\u2026")
_ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f", "\u2026")
FINAL = (*_ENDS, *(end + quote for end in _ENDS for quote in ('"', "'", "\u201d", "\u2019", ")")))
"""What a sentence ends with, in a quotation too."""
SENTENCE = re.compile(r"[.!?\u3002\uff01\uff1f]+(?=[\s\"'\u201d\u2019)\]]|$)")


@final
class Measured:
    """A text, its words, lines and paragraphs, each found once."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        """What white space parts."""
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        """Lines that hold something, without the white space around them."""
        return [line.strip() for line in self.text.splitlines() if line.strip()]

    @cached_property
    def paragraphs(self) -> list[str]:
        """What blank lines part."""
        return [part.strip() for part in re.split(r"\n\s*\n", self.text) if part.strip()]

    @cached_property
    def word_lengths(self) -> NDArray[np.int64]:
        """Characters of each word."""
        return np.fromiter(map(len, self.words), dtype=np.int64, count=len(self.words))

    def ngrams(self, n: int) -> NDArray[np.int64]:
        """For each place where n words begin a number that is the same for equal n words."""
        hashes = shingles([" ".join(self.words)], n, "word").hashes
        return np.unique(hashes, return_inverse=True)[1].astype(np.int64)


def words(text: Measured) -> float:
    """Number of words."""
    return len(text.words)


def mean_word_length(text: Measured) -> float:
    """Characters of a word."""
    return float(text.word_lengths.mean()) if text.words else 0.0


def hashes_per_word(text: Measured) -> float:
    """Number signs over words."""
    return text.text.count("#") / max(1, len(text.words))


def ellipses_per_word(text: Measured) -> float:
    """Ellipses, of three dots or one sign, over words."""
    return sum(map(text.text.count, ELLIPSES)) / max(1, len(text.words))


def bullet_lines(text: Measured) -> float:
    """Share of lines that begin with a bullet."""
    return _share(text.lines, lambda line: line.startswith(BULLETS))


def ellipsis_lines(text: Measured) -> float:
    """Share of lines that end with an ellipsis."""
    return _share(text.lines, lambda line: line.endswith(ELLIPSES))


def lines_with_final_punctuation(text: Measured) -> float:
    """Share of lines that end like a sentence."""
    return _share(text.lines, lambda line: line.endswith(FINAL))


def short_lines(text: Measured, n: int) -> float:
    """Share of lines of fewer than n characters."""
    return _share(text.lines, lambda line: len(line) < n)


def alphabetic_words(text: Measured) -> float:
    """Share of words with a letter in them."""
    return _share(text.words, lambda word: any(map(str.isalpha, word)))


def stop_words(text: Measured) -> float:
    """How many of Gopher's eight English stop words occur."""
    return len(STOP_WORDS & {word.lower().strip(".,;:!?\"'()") for word in text.words})


def sentences(text: Measured) -> float:
    """Ends of sentences; a last one without an end counts."""
    found = len(SENTENCE.findall(text.text))
    return found + (bool(text.words) and not text.text.rstrip().endswith(FINAL))


def occurrences(text: Measured, phrase: str) -> float:
    """How often a phrase stands there, in any case."""
    return text.text.lower().count(phrase.lower())


def repeated_lines(text: Measured) -> float:
    """Share of lines that stood there before."""
    return _repeated(text.lines, lambda line: 1)


def repeated_paragraphs(text: Measured) -> float:
    """Share of paragraphs that stood there before."""
    return _repeated(text.paragraphs, lambda part: 1)


def repeated_line_characters(text: Measured) -> float:
    """Share of characters in lines that stood there before."""
    return _repeated(text.lines, _solid)


def repeated_paragraph_characters(text: Measured) -> float:
    """Share of characters in paragraphs that stood there before."""
    return _repeated(text.paragraphs, _solid)


def most_frequent_ngram_characters(text: Measured, n: int) -> float:
    """Share of characters in the n words that occur most often, twice at least; overlaps count once. Where several
    occur equally often, the largest share."""
    numbers = text.ngrams(n)
    counts = np.bincount(numbers) if len(numbers) else np.zeros(1, dtype=np.int64)
    if counts.max() < 2:
        return 0.0
    return max(_covered(text, numbers == number, n) for number in np.flatnonzero(counts == counts.max()))


def repeated_ngram_characters(text: Measured, n: int) -> float:
    """Share of characters in n words that stood there before; overlaps count once."""
    numbers = text.ngrams(n)
    again = np.ones(len(numbers), dtype=np.bool_)
    again[np.unique(numbers, return_index=True)[1]] = False
    return _covered(text, again, n)


Measure = Callable[..., float]

MEASURES: dict[str, Measure] = {
    function.__name__.replace("_", "-"): function
    for function in (
        words,
        mean_word_length,
        hashes_per_word,
        ellipses_per_word,
        bullet_lines,
        ellipsis_lines,
        lines_with_final_punctuation,
        short_lines,
        alphabetic_words,
        stop_words,
        sentences,
        occurrences,
        repeated_lines,
        repeated_paragraphs,
        repeated_line_characters,
        repeated_paragraph_characters,
        most_frequent_ngram_characters,
        repeated_ngram_characters,
    )
}
"""By the name that stands in a file of rules."""


def _share(items: list[str], holds: Callable[[str], bool]) -> float:
    return sum(map(holds, items)) / len(items) if items else 0.0


def _repeated(items: list[str], weight: Callable[[str], int]) -> float:
    seen: set[str] = set()
    again = total = 0
    for item in items:
        size = weight(item)
        total += size
        again += size if item in seen else 0
        seen.add(item)
    return again / total if total else 0.0


def _solid(text: str) -> int:
    """Characters that are not white space."""
    return sum(map(len, text.split()))


def _covered(text: Measured, begins: NDArray[np.bool_], n: int) -> float:
    """Share of characters in words that lie in one of the n-grams that begin at these places."""
    edges = np.zeros(len(text.words) + 1, dtype=np.int64)
    places = np.flatnonzero(begins)
    np.add.at(edges, places, 1)
    np.add.at(edges, places + n, -1)
    inside = np.cumsum(edges[:-1]) > 0
    return float(text.word_lengths[inside].sum() / text.word_lengths.sum()) if len(text.words) else 0.0
