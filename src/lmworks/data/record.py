"""A record: one document on its way to tokens, and what is said when one is left out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

Fact = str | int | float | bool

MENDED = "mended"
"""The fact of a document whose bytes were not UTF-8: what they were taken for. Readers note it."""

NO_FACTS: Mapping[str, Fact] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of content as text."""

    text: str


@dataclass(frozen=True, slots=True)
class Ids:
    """A piece of content as token ids that somebody else made; taken over as they are."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """A named stretch of one content part: characters of a Text, tokens of an Ids, `end` not included."""

    kind: str
    part: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One document: its content in order, and what is known about it.

    Raises ValueError when a span lies outside the part that it names.
    """

    id: str
    """Unique within its reader: the file's name, with `#number` when a file holds many documents."""
    content: tuple[Text | Ids, ...]
    spans: tuple[Span, ...] = ()
    source: str
    """The reader's name."""
    licence: str | None = None
    facts: Mapping[str, Fact] = field(default_factory=lambda: NO_FACTS)

    def __post_init__(self) -> None:
        for span in self.spans:
            if not 0 <= span.part < len(self.content):
                raise ValueError(f"{self.id}: span '{span.kind}' names part {span.part} of {len(self.content)}")
            part = self.content[span.part]
            length = len(part.text) if isinstance(part, Text) else len(part.ids)
            if not 0 <= span.start <= span.end <= length:
                raise ValueError(f"{self.id}: span '{span.kind}' [{span.start}, {span.end}) is outside 0..{length}")


@dataclass(frozen=True, slots=True)
class Dropped:
    """A document that was seen and left out, by name and with the reason. Counted in every manifest."""

    id: str
    reason: str
    """A few words, the same for all documents that are left out for it."""
    detail: str = ""
    """What it was held against in this document: the figure, the matched text, the document that was kept."""


def content_hash(record: Record) -> int:
    """64 bits of BLAKE2b over the content alone.

    Equal documents have equal hashes wherever they lie, so a copy of a training document never lands in validation.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in record.content:
        data = part.text.encode("utf-8") if isinstance(part, Text) else b",".join(b"%d" % i for i in part.ids)
        digest.update(b"%s %d:" % (type(part).__name__.encode(), len(data)))
        digest.update(data)
    return int.from_bytes(digest.digest(), "big")
