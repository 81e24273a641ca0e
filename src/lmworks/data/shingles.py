"""Documents as sets of hashed n-grams, of characters or of words, many documents at a time.

A hash is a polynomial in an odd base modulo 2^64, then mixed, so that it is a matter of a few array operations. It is
fixed: stored sketches stay good as long as `VERSION` does.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Literal, final

import numpy as np
from numpy.typing import NDArray

VERSION = 1
Unit = Literal["character", "word"]
U64 = NDArray[np.uint64]
BASE = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that multiplying by it loses nothing."""
OTHER = np.uint64(0xD1B54A32D192ED03)
"""The base over words, another one than within them."""
BLANK = ord(" ")
_DELETED = {ord(c): None for c in string.punctuation}
_ASCII = bytes(BLANK if chr(code).isspace() else ord(chr(code).lower()) for code in range(128)) + bytes(128)
"""What becomes of each byte of ASCII, the same as below, several times as fast."""


def plain(text: str) -> str:
    """SlimPajama's cleaning: lower case, no ASCII punctuation, every run of white space one blank, none at the ends."""
    if text.isascii():
        return b" ".join(text.encode().translate(_ASCII, string.punctuation.encode()).split()).decode()
    return " ".join(text.lower().translate(_DELETED).split())


@final
class Shingles:
    """Hashes of all n-grams of some texts, end to end; those of text i lie in [starts[i], starts[i + 1])."""

    def __init__(self, hashes: U64, starts: NDArray[np.int64]) -> None:
        self.hashes, self.starts = hashes, starts

    def of(self, text: int) -> U64:
        """The hashes of one text, in the order in which its n-grams begin."""
        return self.hashes[self.starts[text] : self.starts[text + 1]]


def shingles(texts: Sequence[str], n: int, unit: Unit) -> Shingles:
    """The n-grams of every text as it is: a caller that wants other characters to count first makes them `plain`.

    A word is a run of characters other than blanks. A text shorter than n has no n-gram.
    """
    codes, ends = _codes(texts)
    if unit == "character":
        return _windows(codes, np.concatenate([[0], ends]), n, BASE)
    words, word_starts = _words(codes, ends)
    return _windows(words, word_starts, n, OTHER)


def mixed(hashes: U64) -> U64:
    """A bijection of 64 bits after which every bit depends on every other (splitmix64's)."""
    x = hashes ^ (hashes >> np.uint64(30))
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def _codes(texts: Sequence[str]) -> tuple[U64, NDArray[np.int64]]:
    """All characters as code points, end to end, and where each text ends."""
    lengths = np.fromiter((len(text) for text in texts), dtype=np.int64, count=len(texts))
    joined = "".join(texts)
    if joined.isascii():
        codes = np.frombuffer(joined.encode("ascii"), dtype=np.uint8).astype(np.uint64)
    else:
        codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    return codes, np.cumsum(lengths)


def _windows(values: U64, starts: NDArray[np.int64], n: int, base: np.uint64) -> Shingles:
    """The hash of each n values in a row that do not cross from one text into the next."""
    counts = np.maximum(np.diff(starts) - n + 1, 0)
    inner = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    if inner[-1] == 0:
        return Shingles(np.zeros(0, dtype=np.uint64), inner)
    places = np.arange(inner[-1], dtype=np.int64) + np.repeat(starts[:-1] - inner[:-1], counts)
    return Shingles(mixed(_rolled(values + np.uint64(1), n, base)[places]), inner)


def _rolled(values: U64, n: int, base: np.uint64) -> U64:
    """sum of values[i + j] * base^(n - 1 - j) for j < n, at every i where there are n values; by doubling n."""
    whole, length, power = values, 1, int(base)  # of `length` values in a row; power = base^length
    for bit in bin(n)[3:]:
        behind = whole[length:]
        whole = whole[: len(behind)] * np.uint64(power) + behind
        length, power = 2 * length, power * power % 2**64
        if bit == "1":
            behind = values[length:]
            whole = whole[: len(behind)] * base + behind
            length, power = length + 1, power * int(base) % 2**64
    return whole


def _words(codes: U64, ends: NDArray[np.int64]) -> tuple[U64, NDArray[np.int64]]:
    """A hash for each word, and where each text's words begin (with the end of the last)."""
    is_word = codes != BLANK
    borders = np.zeros(len(codes) + 1, dtype=np.bool_)
    borders[np.concatenate([[0], ends])] = True
    starts = np.flatnonzero(is_word & (borders[:-1] | ~np.concatenate([[False], is_word[:-1]])))
    firsts = np.searchsorted(starts, np.concatenate([[0], ends])).astype(np.int64)
    if not len(starts):
        return np.zeros(0, dtype=np.uint64), firsts
    begins = np.zeros(len(codes), dtype=np.int64)
    begins[starts] = starts
    place = np.arange(len(codes), dtype=np.int64) - np.maximum.accumulate(begins)
    powers = _powers(int(place[is_word].max()) + 1)
    terms = np.where(is_word, (codes + np.uint64(1)) * powers[np.minimum(place, len(powers) - 1)], np.uint64(0))
    return mixed(np.add.reduceat(terms, starts)), firsts


def _powers(count: int) -> U64:
    powers = np.empty(count, dtype=np.uint64)
    powers[0] = 1
    powers[1:] = BASE
    return np.multiply.accumulate(powers)
