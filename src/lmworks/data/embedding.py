"""The key `embedding`: documents that say the same, by the cosine of their vectors."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, final

import numpy as np
from annotated_types import Interval
from numpy.typing import NDArray

from lmworks.core.need import must_be_there
from lmworks.core.recipe import Fraction, PositiveInt
from lmworks.core.seeds import seed_for
from lmworks.data.keys import Key, text_hash
from lmworks.data.shingles import U64, mixed

WEIGHTS = "weights/l2_supercat_256.safetensors"
TOKENIZER = "tokenizers/l2_supercat_tokenizer_config.json"


@final
@dataclass(frozen=True, kw_only=True)
class Embedding(Key):
    """Documents whose vectors point the same way: a vector is the mean of static word vectors, which the package
    wordllama carries (32,000 pieces, 256 numbers each). Vectors fall into cells, cut by random planes, once for each
    table; pairs in one cell are compared. A cell is gone through pair by pair, so `bits` must grow with the number of
    documents: about its binary logarithm."""

    libraries: ClassVar[tuple[str, ...]] = ("wordllama", "tokenizers")

    least_cosine: Fraction = 0.9
    """Cosine from which on two documents are the same."""
    tables: PositiveInt = 24
    """How often the vectors are cut into cells; more find more pairs."""
    bits: Annotated[int, Interval(ge=1, le=64)] = 12
    """Planes of a table: 2^bits cells."""
    characters: PositiveInt = 10_000
    """How much of a document's beginning is looked at."""

    @property
    def bands(self) -> int:
        """The tables."""
        return self.tables

    @property
    def least(self) -> float | None:
        """`least_cosine`: a cell holds many that are not alike."""
        return self.least_cosine

    def keys(self, texts: Sequence[str], seed: int) -> U64:
        """The cell of each text in every table. A text without a known word is in a cell with its copies only."""
        vectors_DH = np.stack([self.detail(text) for text in texts]) if texts else np.zeros((0, 256), dtype=np.float32)
        rng = np.random.default_rng(seed_for(seed, "embedding"))
        planes_HKb = rng.standard_normal((vectors_DH.shape[1], self.tables, self.bits)).astype(np.float32)
        keys_DK = np.empty((len(texts), self.tables), dtype=np.uint64)
        powers = np.uint64(1) << np.arange(self.bits, dtype=np.uint64)
        for table in range(self.tables):
            sides_Db = vectors_DH @ planes_HKb[:, table] > 0
            keys_DK[:, table] = mixed((sides_Db * powers).sum(axis=1, dtype=np.uint64) + np.uint64(table))
        for i in np.flatnonzero(~vectors_DH.any(axis=1)).tolist():
            own: U64 = np.arange(self.tables, dtype=np.uint64) + np.uint64(text_hash(texts[i]))
            keys_DK[i] = mixed(own)
        return keys_DK

    def detail(self, text: str) -> NDArray[np.float32]:
        """The document's vector, of length 1, or 0 where no word is known."""
        tokenizer, table_VH = _model()
        ids = tokenizer.encode(text[: self.characters], add_special_tokens=False).ids
        if not ids:
            return np.zeros(table_VH.shape[1], dtype=np.float32)
        mean_H = table_VH[ids].astype(np.float32).mean(axis=0)
        return np.asarray(mean_H / max(float(np.linalg.norm(mean_H)), 1e-12), dtype=np.float32)

    def similarity(self, first: NDArray[Any], second: NDArray[Any]) -> float:
        """The cosine, at least 0; of two without a vector 1, because only copies are candidates."""
        if not first.any() and not second.any():
            return 1.0
        return float(np.clip(first @ second, 0.0, 1.0))

    def survey_apart(self) -> frozenset[str]:
        """Cells do not depend on the cosine that is asked for."""
        return frozenset(("least_cosine",))


@cache
def _model() -> tuple[Any, NDArray[Any]]:
    """The tokenizer and the word vectors of the package, which itself is not imported: its code is not needed."""
    must_be_there("wordllama", extra="semantic", why="the key 'embedding'")
    from safetensors.numpy import load_file  # noqa: PLC0415  (only with this key)
    from tokenizers import Tokenizer  # noqa: PLC0415

    spec = importlib.util.find_spec("wordllama")
    assert spec is not None, "it is there"
    assert spec.origin is not None, "a package has a file"
    folder = Path(spec.origin).parent
    (table_VH,) = load_file(folder / WEIGHTS).values()
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, table_VH
