"""The stage `length`: documents that are too short or too long are dropped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, final

from lmworks.core.errors import Problem
from lmworks.core.recipe import NonNegativeInt, PositiveInt
from lmworks.data.record import Dropped, Record
from lmworks.data.shingles import plain
from lmworks.data.stage import Context, Stage, text_of


@final
@dataclass(frozen=True, kw_only=True)
class Length(Stage):
    """Keeps documents of a length. The default is SlimPajama's: 200 characters without punctuation and white space
    beyond one blank."""

    least: NonNegativeInt = 200
    """Shorter documents are dropped."""
    most: PositiveInt | None = None
    """Longer ones are dropped; left out: none are."""
    unit: Literal["plain characters", "characters", "words"] = "plain characters"
    """'plain characters': of the text in lower case, without ASCII punctuation, with single blanks."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """A range that holds nothing."""
        if self.most is not None and self.most < self.least:
            yield Problem(path="most", text=f"{self.most} is less than `least`, {self.least}: nothing would be kept")

    def run(self, records: Iterable[Record], context: Context) -> Iterator[Record | Dropped]:
        """The documents, or what they are too short or too long by."""
        for record in records:
            length = self._length(text_of(record))
            if length < self.least:
                yield Dropped(record.id, "too short", f"{length:,} {self.unit}")
            elif self.most is not None and length > self.most:
                yield Dropped(record.id, "too long", f"{length:,} {self.unit}")
            else:
                yield record

    def _length(self, text: str) -> int:
        if self.unit == "words":
            return len(text.split())
        return len(plain(text)) if self.unit == "plain characters" else len(text)
