"""The part `packed`: documents, tokenised once and packed into rows. The trainer calls `prepare` and nothing else."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, final

from annotated_types import Interval

from lmworks.core import files
from lmworks.core.errors import DataError, Problem
from lmworks.core.recipe import PositiveFloat, PositiveInt, Slot
from lmworks.data.cache import MANIFEST, cache_folder, make_once
from lmworks.data.fingerprint import Fingerprint, digest, scan
from lmworks.data.identity import Identity, SourceIdentity
from lmworks.data.prepared import Prepared
from lmworks.data.read import Progress, Reader
from lmworks.data.sample import sample_texts
from lmworks.data.shards import Shards, make_shards
from lmworks.data.shares import misfits, shares_in
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
    mixture: str | None = None
    """Name of a shipped mixture (dc-1 to dc-7) or path of a TOML file, which gives each source its share of the rows by
    the reader's name, in place of the readers' weights."""
    most_epochs: PositiveFloat | None = None
    """How often a source may be read; a run that would read one more often is refused, with the number."""
    held_out: Annotated[tuple[Reader, ...], Slot("reader")] = ()
    """Documents that are validated on, in place of a fraction of the readers'. What equals one of them is not trained
    on. A side that `lmworks data` has split off, most often."""
    cache: str | None = None
    """Folder of tokens and trained tokenizers; left out: $LMWORKS_HOME, or ~/.cache/lmworks."""
    verify: bool = False
    """Hash all tokens before the run begins. Their sizes are checked always."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Readers that are missing or that cannot be told apart; a mixture or a hold-out that does not fit them."""
        if not self.readers:
            yield Problem(path="readers", text="needs at least one reader, as in readers = [{ use = 'python-stdlib' }]")
        elif self.mixture is None and not any(reader.weight for reader in self.readers):
            yield Problem(path="readers", text="all weights are 0: nothing would be trained on")
        for slot in ("readers", "held_out"):
            counts = Counter(reader.label for reader in getattr(self, slot))
            for i, reader in enumerate(getattr(self, slot)):
                if counts[reader.label] > 1:
                    text = f"{counts[reader.label]} readers are called '{reader.label}'; give each a name of its own"
                    yield Problem(path=f"{slot}.{i}.name", text=text)
        if self.held_out and self.validation > 0:
            text = "must be 0 beside held_out: documents are validated on in place of a fraction of the readers'"
            yield Problem(path="validation", text=text)
        yield from self._check_weights()

    def _check_weights(self) -> Iterator[Problem]:
        for i, reader in enumerate(self.held_out):
            if reader.weight != 1.0:
                yield Problem(path=f"held_out.{i}.weight", text="has no effect: all held-out documents are read once")
        if self.mixture is None:
            return
        for i, reader in enumerate(self.readers):
            if reader.weight != 1.0:
                yield Problem(path=f"readers.{i}.weight", text=f"has no effect: mixture = '{self.mixture}' gives it")
        try:
            shares = shares_in(self.mixture)
        except DataError as error:
            yield Problem(path="mixture", text=str(error))
            return
        for text in misfits(self.mixture, shares, [reader.label for reader in self.readers]):
            yield Problem(path="mixture", text=text)

    @cached_property
    def weights(self) -> dict[str, float]:
        """Each reader's name and its weight, by the mixture or its own, in the order of the recipe."""
        shares = shares_in(self.mixture) if self.mixture is not None else None
        return {r.label: float(r.weight) if shares is None else shares[r.label] for r in self.readers}

    @property
    def shares(self) -> dict[str, float]:
        """Each reader's name and its share of the rows, in the order of the recipe."""
        whole = sum(self.weights.values())
        return {name: weight / whole for name, weight in self.weights.items()}

    @property
    def validates(self) -> bool:
        """Whether documents are held out."""
        return self.validation > 0 or bool(self.held_out)

    @property
    def validated(self) -> list[str]:
        """Names of the sources whose documents are held out, in the order of a hold-out."""
        return [reader.label for reader in self.held_out or self.readers]

    def prepare(
        self, *, seed: int, progress: Progress | None = None, resume: Mapping[str, Any] | None = None
    ) -> Prepared:
        """Make the tokenizer and the token shards, or find them in the cache.

        resume: the loader's state in the checkpoint that is to go on; changed documents are then refused before
        anything is made. Raises DataError for data that cannot be used; the message names what and where.
        """
        cache = cache_folder(self.cache)
        every = (*self.readers, *self.held_out)
        prints = [scan(reader, cache, progress) for reader in every]
        if resume is not None:
            self._identity(seed, cache, prints, None, None).must_match(resume["made_with"])
        tokenizer = self._tokenizer(cache, prints, progress)
        shards = [
            make_shards(reader, source, tokenizer, cache, progress=progress)
            for reader, source in zip(every, prints, strict=True)
        ]
        if self.verify:
            for one in shards:
                one.verify()
        identity = self._identity(seed, cache, prints, tokenizer, shards)
        if resume is not None:
            identity.must_match(resume["made_with"])
        count = len(self.readers)
        return Prepared(
            tokenizer=tokenizer, identity=identity, shards=tuple(shards[:count]), held_out=tuple(shards[count:])
        )

    def must_last(self, prepared: Prepared, rows: int) -> None:
        """Raise DataError when a run of so many rows would read a source more often than `most_epochs` allows."""
        if self.most_epochs is None:
            return
        needed = prepared.epochs({name: share * rows for name, share in self.shares.items()})
        over = {name: times for name, times in needed.items() if times > self.most_epochs}
        if over:
            listed = ", ".join(f"'{name}' {times:.2f} times" for name, times in over.items())
            most = int(rows * min(self.most_epochs / times for times in over.values()))
            raise DataError(
                f"the mixture would read {listed}, and most_epochs is {self.most_epochs:g}",
                where="data.most_epochs",
                legal=f"up to {most:,} rows with these shares",
                next_step="train for fewer steps, give these sources smaller shares or more text, or allow more epochs",
            )

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
        made = [SourceIdentity(weight=w, source_id=source.id) for w, source in self._weighed(prints)]
        if shards is not None:
            made = [
                dataclasses.replace(one, key=shard.key, contents=shard.contents)
                for one, shard in zip(made, shards, strict=True)
            ]
        count = len(self.readers)
        return Identity(
            seed=seed,
            sequence_length=self.sequence_length,
            validation=float(self.validation),
            tokenizer=tokenizer.id if tokenizer is not None else None,
            sources=dict(zip(self.weights, made[:count], strict=True)),
            held_out=dict(zip((reader.label for reader in self.held_out), made[count:], strict=True)),
            cache=cache,
            files=dict(zip(self.weights, prints[:count], strict=True)),
        )

    def _weighed(self, prints: Sequence[Fingerprint]) -> Iterator[tuple[float, Fingerprint]]:
        """Every scanned reader's files with its weight; held-out documents have that of one."""
        return zip([*self.weights.values(), *(1.0 for _ in self.held_out)], prints, strict=True)

    def _tokenizer(self, cache: Path, prints: Sequence[Fingerprint], progress: Progress | None) -> Tokenizer:
        part = self.tokenizer
        if part.sample_limit == 0:
            return part.make(())
        prints = prints[: len(self.readers)]
        limits = [max(1, int(part.sample_limit * share)) for share in self.shares.values()]
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
