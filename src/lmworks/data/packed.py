"""The part `packed`: documents, tokenised once and packed into rows. The trainer calls `prepare` and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, final

import numpy as np
from annotated_types import Interval

from lmworks.core import files
from lmworks.core.errors import DataError, Problem
from lmworks.core.recipe import PositiveInt, Slot
from lmworks.data.cache import MANIFEST, cache_folder, make_once
from lmworks.data.fingerprint import Fingerprint, Progress, digest, scan
from lmworks.data.holdout import Holdout
from lmworks.data.identity import Identity, SourceIdentity
from lmworks.data.load import Loader
from lmworks.data.mixture import Mixture
from lmworks.data.pack import Documents, Int, Stream
from lmworks.data.read import Reader
from lmworks.data.sample import sample_texts
from lmworks.data.shards import Shards, make_shards
from lmworks.data.tokenise import Tally
from lmworks.data.tokenizer import Bpe, Tokenizer, TokenizerPart, load_tokenizer


@final
@dataclass(frozen=True, kw_only=True)
class Packed:
    """Documents of one or more readers, tokenised once, packed into rows, some held out for validation."""

    readers: Annotated[tuple[Reader, ...], Slot("reader")]
    """Where the documents come from; rows are mixed by the readers' weights."""
    sequence_length: PositiveInt
    """Tokens of a row."""
    tokenizer: Annotated[TokenizerPart, Slot("tokenizer")] = Bpe()
    """How text becomes tokens."""
    validation: Annotated[float, Interval(ge=0, lt=1)] = 0.01
    """Fraction of the documents that is held out, chosen by a hash of their text: new documents never move old ones
    from one side to the other. 0 holds none out."""
    cache: str | None = None
    """Folder of tokens and trained tokenizers; left out: $LMWORKS_HOME, or ~/.cache/lmworks."""
    verify: bool = False
    """Hash all tokens before the run begins. Their sizes are checked always."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Readers that are missing or that cannot be told apart."""
        if not self.readers:
            yield Problem(path="readers", text="needs at least one reader, as in readers = [{ use = 'python-stdlib' }]")
        elif not any(reader.weight for reader in self.readers):
            yield Problem(path="readers", text="all weights are 0: nothing would be trained on")
        counts = Counter(reader.label for reader in self.readers)
        for i, reader in enumerate(self.readers):
            if counts[reader.label] > 1:
                text = f"{counts[reader.label]} readers are called '{reader.label}'; give each a name of its own"
                yield Problem(path=f"readers.{i}.name", text=text)

    @property
    def shares(self) -> dict[str, float]:
        """Each reader's name and its share of the rows, in the order of the recipe."""
        whole = sum(reader.weight for reader in self.readers)
        return {reader.label: reader.weight / whole for reader in self.readers}

    def prepare(
        self, *, seed: int, progress: Progress | None = None, resume: Mapping[str, Any] | None = None
    ) -> Prepared:
        """Make the tokenizer and the token shards, or find them in the cache.

        resume: the loader's state in the checkpoint that is to go on; changed documents are then refused before
        anything is made. Raises DataError for data that cannot be used; the message names what and where.
        """
        cache = cache_folder(self.cache)
        found = {reader.label: scan(reader, cache, progress) for reader in self.readers}
        prints = [found[reader.label] for reader in self.readers]
        if resume is not None:
            self._identity(seed, cache, prints, None, None).must_match(resume["made_with"])
        tokenizer = self._tokenizer(cache, prints, progress)
        shards = [
            make_shards(reader, source, tokenizer, cache, progress=progress)
            for reader, source in zip(self.readers, prints, strict=True)
        ]
        if self.verify:
            for one in shards:
                one.verify()
        identity = self._identity(seed, cache, prints, tokenizer, shards)
        if resume is not None:
            identity.must_match(resume["made_with"])
        return Prepared(tokenizer=tokenizer, identity=identity, shards=tuple(shards))

    def make_tokenizer(self, *, progress: Progress | None = None) -> Tokenizer:
        """Only the tokenizer, trained or loaded."""
        cache = cache_folder(self.cache)
        return self._tokenizer(cache, [scan(reader, cache, progress) for reader in self.readers], progress)

    def _identity(
        self,
        seed: int,
        cache: Path,
        prints: Sequence[Fingerprint],
        tokenizer: Tokenizer | None,
        shards: Sequence[Shards] | None,
    ) -> Identity:
        sources = {}
        for i, (reader, source) in enumerate(zip(self.readers, prints, strict=True)):
            made = {} if shards is None else {"key": shards[i].key, "contents": shards[i].contents}
            sources[reader.label] = SourceIdentity(weight=float(reader.weight), source_id=source.id, **made)
        return Identity(
            seed=seed,
            sequence_length=self.sequence_length,
            validation=float(self.validation),
            tokenizer=tokenizer.id if tokenizer is not None else None,
            sources=sources,
            cache=cache,
            files={reader.label: source for reader, source in zip(self.readers, prints, strict=True)},
        )

    def _tokenizer(self, cache: Path, prints: Sequence[Fingerprint], progress: Progress | None) -> Tokenizer:
        part = self.tokenizer
        if part.sample_limit == 0:
            return part.make(())
        whole = sum(reader.weight for reader in self.readers)
        limits = [max(1, int(part.sample_limit * reader.weight / whole)) for reader in self.readers]
        inputs = [
            [reader.settings(), source.id, limit]
            for reader, source, limit in zip(self.readers, prints, limits, strict=True)
        ]
        folder = cache / "tokenizers" / digest([repr(part), inputs])[:32]

        def build(temporary: Path) -> None:
            texts: list[str] = []
            for reader, source, limit in zip(self.readers, prints, limits, strict=True):
                tally = Tally()
                texts += sample_texts(tally.watch(reader.read(source.source_files())), limit)
                tally.must_hold_documents(reader.label)
            if not texts:
                what = "the documents are token ids, and there is no text to train a tokenizer on"
                raise DataError(what, next_step="use the tokenizer that made these ids: use = 'file'")
            if progress is not None:
                size = sum(len(text) for text in texts)
                progress(stage="training the tokenizer on", done=size, total=size, unit="characters")
            part.make(texts).save(temporary)
            files.write_json(temporary / MANIFEST, {"part": repr(part), "inputs": inputs})

        make_once(folder, build)
        return load_tokenizer(folder)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """Data that are ready to be read: the tokenizer, the shards, and the loaders over them."""

    tokenizer: Tokenizer
    identity: Identity
    shards: tuple[Shards, ...]
    """One per reader, in the recipe's order."""

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
            splits = {"training": _counts(self._training[i]), "validation": _counts(self._held_out[i])}
            sources[name] = {"weight": source.weight, **kept, "splits": splits, "shards": str(shards.folder)}
        return {"fingerprint": self.fingerprint, "tokenizer_id": self.tokenizer.id, "sources": sources}

    def train(self, *, share: tuple[int, int] = (0, 1), prefetch: int = 2, pin: bool = False) -> Loader:
        """Training rows from the first one on. share=(i, n): rows i, i + n, ... of every draw.

        Raises DataError when a source is not longer than one sequence, or when all of it is held out.
        """
        streams = []
        for name, documents, shards in zip(self.identity.sources, self._training, self.shards, strict=True):
            if not len(documents):
                raise _nothing_to_train_on(name, self.identity.validation, shards)
            length, seed = self.identity.sequence_length, self.identity.seed
            streams.append(Stream(documents, sequence_length=length, seed=seed, name=name))
        mixture = Mixture([source.weight for source in self.identity.sources.values()])
        return Loader(streams, mixture, self.identity, share=share, prefetch=prefetch, pin=pin)

    def validation(self, rows: int | None = None, *, batch_rows: int = 16, share: tuple[int, int] = (0, 1)) -> Holdout:
        """Batches over the held-out documents, or their first `rows` rows; no batches when data.validation is 0.

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
        return tuple(shards.training(self.identity.validation) for shards in self.shards)

    @cached_property
    def _held_out(self) -> tuple[Documents, ...]:
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


def _above(hash: int) -> float:
    """The smallest fraction of four digits that holds out a document of this hash."""
    return (hash * 10_000 // 2**64 + 1) / 10_000


def _below(hash: int) -> float:
    """The largest fraction of four digits that does not hold it out."""
    return (hash * 10_000 // 2**64) / 10_000
