"""The stage `licence`: documents whose licence allows what is planned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, final

from lmworks.core.errors import Problem
from lmworks.data.record import Dropped, Record
from lmworks.data.stage import Context, Stage


@final
@dataclass(frozen=True, kw_only=True)
class Licence(Stage):
    """Keeps documents by the licence that their reader gave them. Case does not matter."""

    allow: tuple[str, ...] = ()
    """Patterns of licences that are kept, as in ["MIT", "Apache-*", "CC0-*"]; none: all that are not denied."""
    deny: tuple[str, ...] = ()
    """Patterns of licences that are dropped, as in ["*-NC-*"], also where `allow` names them."""
    unknown: Literal["drop", "keep"] = "drop"
    """What becomes of documents without a licence."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """A filter that lets everything pass."""
        if not self.allow and not self.deny and self.unknown == "keep":
            yield Problem(path="", text="keeps every document: set `allow`, `deny`, or unknown = 'drop'")

    def run(self, records: Iterable[Record], context: Context) -> Iterator[Record | Dropped]:
        """The documents, or the licence for which one is left out."""
        for record in records:
            if record.licence is None:
                yield record if self.unknown == "keep" else Dropped(record.id, "licence unknown")
            elif self._allows(record.licence):
                yield record
            else:
                yield Dropped(record.id, "licence not allowed", record.licence)

    def _allows(self, licence: str) -> bool:
        allowed, denied = (
            any(fnmatchcase(licence.lower(), pattern.lower()) for pattern in patterns)
            for patterns in (self.allow, self.deny)
        )
        return (allowed or not self.allow) and not denied
