"""Data that are ready: what the trainer draws rows from, and what it validates on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import numpy as np

from lmworks.core.errors import DataError
from lmworks.data.holdout import Holdout
from lmworks.data.identity import Identity
from lmworks.data.load import Loader
from lmworks.data.mixture import Mixture
from lmworks.data.pack import Documents, Int, Stream
from lmworks.data.shards import Shards
from lmworks.data.sharing import Sharing
from lmworks.data.tokenizer import Tokenizer


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """Data that are ready to be read: the tokenizer, the shards, and the loaders over them."""

    tokenizer: Tokenizer
    identity: Identity
    shards: tuple[Shards, ...]
    """One per reader, in the recipe's order."""
    held_out: tuple[Shards, ...] = ()
    """Those of the documents that are validated on, where readers of their own give them."""

    @property
    def fingerprint(self) -> str:
        """One hash over files, tokens, weights, split and sequence length."""
        return self.identity.fingerprint

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What the data are: per source counts, what was dropped and why, tokens of each split. JSON values."""
        names = ("documents", "licences", "tokens", "bytes", "source_id", "contents")
        sources = {}
        for i, (name, source) in enumerate(self.identity.sources.items()):
            shards = self.shards[i]
            kept = {key: shards.manifest[key] for key in names}
            splits = {"training": _counts(self._training[i])}
            if not self.held_out:
                splits["validation"] = _counts(self._held_out[i])
            sources[name] = {"weight": source.weight, **kept, "splits": splits, "shards": str(shards.folder)}
        found = {"fingerprint": self.fingerprint, "tokenizer_id": self.tokenizer.id, "sources": sources}
        return {**found, "held_out": self._apart()} if self.held_out else found

    def _apart(self) -> dict[str, Any]:
        """Documents that are validated on, and how many equal ones were taken out of those that are trained on."""
        before = sum(len(shards.hashes) for shards in self.shards)
        counts = zip(self.identity.held_out, self._held_out, strict=True)
        return {
            "equal_documents_left_out": before - sum(len(part) for part in self._training),
            "sources": {name: _counts(part) for name, part in counts},
        }

    def epochs(self, rows: Mapping[str, float]) -> dict[str, float]:
        """How often so many rows of each source read all of its tokens."""
        length = self.identity.sequence_length
        parts = zip(self.identity.sources, self._training, strict=True)
        return {name: rows[name] * length / max(1, part.n_tokens) for name, part in parts}

    def train(
        self,
        *,
        share: tuple[int, int] = (0, 1),
        prefetch: int = 2,
        pin: bool = False,
        sharing: Sharing | None = None,
    ) -> Loader:
        """Training rows from the first one on. share=(i, n): rows i, i + n, ... of every draw. `sharing` as in Loader.

        Raises DataError when a source is not longer than one sequence, or when all of it is held out.
        """
        streams = []
        for name, documents, shards in zip(self.identity.sources, self._training, self.shards, strict=True):
            if not len(documents) and self.held_out:
                raise _all_are_held_out(name, shards)
            if not len(documents):
                raise _nothing_to_train_on(name, self.identity.validation, shards)
            length, seed = self.identity.sequence_length, self.identity.seed
            streams.append(Stream(documents, sequence_length=length, seed=seed, name=name))
        mixture = Mixture([source.weight for source in self.identity.sources.values()])
        return Loader(streams, mixture, self.identity, share=share, prefetch=prefetch, pin=pin, sharing=sharing)

    def validation(self, rows: int | None = None, *, batch_rows: int = 16, share: tuple[int, int] = (0, 1)) -> Holdout:
        """Batches over the held-out documents, or their first `rows` rows; no batches when none are held out.

        Raises DataError when a fraction is to be held out but no document falls into it.
        """
        if self.identity.validation > 0 and not any(len(part) for part in self._held_out):
            raise _nothing_held_out(self.identity.validation, self.shards)
        asked = (rows, batch_rows, share)
        if asked not in self._holdouts:
            self._holdouts[asked] = Holdout(
                self._held_out,
                sequence_length=self.identity.sequence_length,
                rows=rows,
                batch_rows=batch_rows,
                share=share,
                piece_bytes=self._piece_bytes,
            )
        return self._holdouts[asked]

    @cached_property
    def _holdouts(self) -> dict[tuple[int | None, int, tuple[int, int]], Holdout]:
        """Those that were asked for: a run validates many times over the same rows."""
        return {}

    @cached_property
    def _training(self) -> tuple[Documents, ...]:
        parts = tuple(shards.training(self.identity.validation) for shards in self.shards)
        if not self.held_out:
            return parts
        apart = np.concatenate([shards.hashes for shards in self.held_out])
        return tuple(part.chosen(~np.isin(part.hashes, apart)) for part in parts)

    @cached_property
    def _held_out(self) -> tuple[Documents, ...]:
        if self.held_out:
            return tuple(shards.training(0.0) for shards in self.held_out)
        return tuple(shards.validation(self.identity.validation) for shards in self.shards)

    @cached_property
    def _piece_bytes(self) -> Int | None:
        pieces = self.tokenizer.pieces
        return None if pieces is None else np.array([len(piece) for piece in pieces], dtype=np.int64)


def _counts(documents: Documents) -> dict[str, int]:
    return {"documents": len(documents), "tokens": documents.n_tokens, "bytes": int(documents.n_bytes.sum())}


_FEW = "set data.validation = 0, or cut the text into more documents (reader 'text', split = 'block')"


def _nothing_held_out(fraction: float, shards: Sequence[Shards]) -> DataError:
    hashes = np.concatenate([one.hashes for one in shards])
    if len(hashes) == 1:
        return DataError("there is one document, so none can be held out", where="data.validation", next_step=_FEW)
    what = f"no document is held out: none of {len(hashes)} falls into the fraction {fraction}"
    legal = f"0 for none, {_above(int(hashes.min()))} for one"
    return DataError(what, where="data.validation", legal=legal, next_step=_FEW)


def _nothing_to_train_on(name: str, fraction: float, shards: Shards) -> DataError:
    count = len(shards.hashes)
    what = f"nothing to train on: all documents of '{name}' ({count}) fall into the fraction {fraction}, held out"
    legal = f"up to {_below(int(shards.hashes.max()))}"
    return DataError(what, where="data.validation", legal=legal, next_step=_FEW)


def _all_are_held_out(name: str, shards: Shards) -> DataError:
    what = f"nothing to train on: all {len(shards.hashes)} documents of '{name}' equal held-out ones"
    return DataError(what, where="data.held_out", next_step="hold out other documents than those of the readers")


def _above(hash: int) -> float:
    """The smallest fraction of four digits that holds out a document of this hash."""
    return (hash * 10_000 // 2**64 + 1) / 10_000


def _below(hash: int) -> float:
    """The largest fraction of four digits that does not hold it out."""
    return (hash * 10_000 // 2**64) / 10_000
