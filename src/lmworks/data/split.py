"""The stage `split`: training, validation and test documents, told apart by a hash of their text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

from lmworks.core.errors import Problem
from lmworks.core.recipe import Fraction
from lmworks.data.record import Record
from lmworks.data.stage import Context, Stage, text_of, with_facts


@final
@dataclass(frozen=True, kw_only=True)
class Split(Stage):
    """Gives every document a side. Equal texts are always on the same side, and a document never changes sides when
    others come or go. Put it after `dedup`, so that near copies do not lie on both."""

    adds: ClassVar[Mapping[str, type]] = {"split": str}
    seeded: ClassVar[bool] = True

    validation: Fraction = 0.0017
    """Share of the documents; SlimPajama's."""
    test: Fraction = 0.0017
    """Share of the documents."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Shares that leave nothing to train on, or divide nothing."""
        held = self.validation + self.test
        if held >= 1:
            yield Problem(
                path="validation", text=f"validation and test take {held:g} of 1: nothing is left to train on"
            )
        if held == 0:
            yield Problem(path="validation", text="validation and test are both 0: the stage would do nothing")

    def run(self, records: Iterable[Record], context: Context) -> Iterator[Record]:
        """Every document with its side."""
        for record in records:
            place = self._place(text_of(record), context.seed)
            sides = ((self.validation, "validation"), (self.validation + self.test, "test"), (2.0, "train"))
            yield with_facts(record, split=next(side for end, side in sides if place < end))

    @staticmethod
    def _place(text: str, seed: int) -> float:
        """A number in [0, 1), as good as random. Salted: the training run holds out documents by a hash as well."""
        salt = b"split %d" % (seed % 2**60)
        digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, salt=hashlib.sha256(salt).digest()[:16]).digest()
        return int.from_bytes(digest, "big") / 2**64
