"""The slot `key`: what makes two documents the same. A document has one key in each band; equal keys are candidates."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, final

import numpy as np
from annotated_types import Interval
from numpy.typing import NDArray

from lmworks.core.errors import Problem
from lmworks.core.need import need
from lmworks.core.recipe import Fraction, PositiveInt
from lmworks.data.bands import best_bands
from lmworks.data.shingles import U64, Unit, mixed, plain, shingles

BLOCK = 100_000
"""Characters that are hashed in one go: what array operations make of them stays in a core's cache."""
LONG = 1_000_000
"""Characters from which on a text is hashed a block at a time, so that it needs no more than tens of megabytes."""


@dataclass(frozen=True, kw_only=True)
class Key(ABC):
    """What every key has."""

    libraries: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def bands(self) -> int:
        """Keys of one document."""

    @property
    def least(self) -> float | None:
        """Similarity that a candidate pair must have to count; none: candidates are not looked at again."""
        return None

    def survey_apart(self) -> frozenset[str]:
        """Settings that the keys do not depend on."""
        return frozenset()

    @abstractmethod
    def keys(self, texts: Sequence[str], seed: int) -> U64:
        """keys_DK: the keys of every text, of D documents and K bands."""

    def detail(self, text: str) -> NDArray[Any]:
        """What the similarity of a document is computed from, an array."""
        raise NotImplementedError

    def similarity(self, first: NDArray[Any], second: NDArray[Any]) -> float:
        """From 0 to 1, of two details."""
        raise NotImplementedError


@final
@dataclass(frozen=True, kw_only=True)
class Exact(Key):
    """Equal texts, by 64 bits of BLAKE2b: among a hundred million different texts, two are taken for equal with a
    chance of 1 in 3,700."""

    of: Literal["text", "plain"] = "text"
    """'text': every character counts; 'plain': in lower case, without ASCII punctuation, with single blanks."""

    @property
    def bands(self) -> int:
        """One."""
        return 1

    def keys(self, texts: Sequence[str], seed: int) -> U64:
        """A hash of each text. One that is empty when plain counts as it is."""
        chosen = (text if self.of == "text" else plain(text) or text for text in texts)
        return np.array([[text_hash(text)] for text in chosen], dtype=np.uint64).reshape(-1, 1)


@final
@dataclass(frozen=True, kw_only=True)
class MinHash(Key):
    """Near copies: documents that share most of their n-grams, found by MinHash (rensa) and bands. The default is
    SlimPajama's: 13-grams of characters, 128 permutations, 9 bands of 13 rows. That finds 40 % of the pairs whose
    Jaccard similarity is 0.8, 93 % at 0.9 and 99.8 % at 0.95; a document with fewer than n characters is the same as
    its exact copies only."""

    libraries: ClassVar[tuple[str, ...]] = ("rensa",)

    n: PositiveInt = 13
    """Length of an n-gram."""
    unit: Unit = "character"
    """What an n-gram is made of, after punctuation, case and white space are made plain."""
    permutations: PositiveInt = 128
    """Values of a signature."""
    threshold: Annotated[float, Interval(gt=0, lt=1)] = 0.8
    """Jaccard similarity for which bands and rows are chosen, where they are not given."""
    bands_rows: tuple[PositiveInt, PositiveInt] | None = None
    """Number of bands, and of values that must agree in one; left out: the pair nearest to a step at `threshold`."""
    verify: Fraction | None = None
    """Compute the true Jaccard similarity of each pair of candidates, and count those with at least this; left out:
    every candidate counts."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Bands that do not fit, or that find everything or nothing."""
        bands, rows = self.shape
        if bands * rows > self.permutations:
            text = f"{bands} bands of {rows} rows need {bands * rows} permutations, there are {self.permutations}"
            yield Problem(path="bands_rows", text=text)
        if min(bands, rows) == 1:
            what = "one band" if bands == 1 else "one row in a band"
            text = f"{what}: {'hardly any' if bands == 1 else 'nearly every'} pair would be found; more permutations"
            yield Problem(path="bands_rows" if self.bands_rows else "threshold", text=f"{text}, or another threshold")

    @property
    def shape(self) -> tuple[int, int]:
        """Bands, and rows of each."""
        return self.bands_rows or best_bands(self.threshold, self.permutations)

    @property
    def bands(self) -> int:
        """How many there are."""
        return self.shape[0]

    @property
    def least(self) -> float | None:
        """`verify`."""
        return self.verify

    def survey_apart(self) -> frozenset[str]:
        """`verify`."""
        return frozenset(("verify",))

    def keys(self, texts: Sequence[str], seed: int) -> U64:
        """One hash for each band of the signature."""
        bands, rows = self.shape
        signatures_DP, has_D = self.signatures(texts, seed)
        keys_DK = np.empty((len(texts), bands), dtype=np.uint64)
        for band in range(bands):
            keys_DK[:, band] = _folded(signatures_DP[:, band * rows : (band + 1) * rows], band)
        for i in np.flatnonzero(~has_D).tolist():
            own: U64 = np.arange(bands, dtype=np.uint64) + np.uint64(text_hash(texts[i]))
            keys_DK[i] = mixed(own)
        return keys_DK

    def signatures(self, texts: Sequence[str], seed: int) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """signatures_DP of P permutations, and which texts have an n-gram at all."""
        digest = need("rensa", extra="data", why="the key 'minhash'").RMinHash.digest_matrix_from_flat_token_hashes
        made, counts = [np.zeros((0, self.permutations), dtype=np.uint32)], [np.zeros(0, dtype=np.int64)]
        for some in batches_of(texts):
            hashes, starts = self.hashed(some)
            matrix = digest(hashes, starts.astype(np.uint64), self.permutations, seed % 2**63)
            made.append(np.array(matrix.to_rows(), dtype=np.uint32))
            counts.append(np.diff(starts))
        return np.concatenate(made), np.concatenate(counts) > 0

    def hashed(self, texts: Sequence[str]) -> tuple[U64, NDArray[np.int64]]:
        """Hashes of the n-grams of some texts, end to end, and where each text's begin, with the end of the last."""
        if len(texts) == 1 and len(texts[0]) > LONG:
            detail = self.detail(texts[0])
            return detail, np.array([0, len(detail)], dtype=np.int64)
        found = shingles([plain(text) for text in texts], self.n, self.unit)
        return found.hashes, found.starts

    def detail(self, text: str) -> U64:
        """The set of n-grams, as sorted hashes; of a document of any length, a block at a time."""
        flat = plain(text)
        if self.unit == "word":
            return np.unique(shingles([flat], self.n, self.unit).hashes)
        starts = range(0, max(1, len(flat) - self.n + 1), LONG)
        pieces = [np.unique(shingles([flat[i : i + LONG + self.n - 1]], self.n, self.unit).hashes) for i in starts]
        return np.unique(np.concatenate(pieces)) if len(pieces) > 1 else pieces[0]

    def similarity(self, first: NDArray[Any], second: NDArray[Any]) -> float:
        """Jaccard similarity of two sets; of two without n-grams 1, because only exact copies are candidates."""
        if np.array_equal(first, second):
            return 1.0
        both = len(np.intersect1d(first, second, assume_unique=True))
        return both / (len(first) + len(second) - both)


def text_hash(text: str) -> int:
    """64 bits of BLAKE2b; lone surrogates count as themselves."""
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _folded(values_DR: NDArray[np.uint32], band: int) -> U64:
    """64 bits of the values of each row, and of the band's number."""
    key_D = np.full(len(values_DR), band + 1, dtype=np.uint64)
    for column in range(values_DR.shape[1]):
        key_D = mixed(key_D ^ (values_DR[:, column].astype(np.uint64) + np.uint64(column + 1)))
    return key_D


def batches_of(texts: Sequence[str]) -> Iterator[list[str]]:
    """Texts in order, as many as make a block; a longer one alone."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > BLOCK:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch
