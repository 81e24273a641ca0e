"""The stage `repair`: text that was decoded wrongly is mended, and one spelling is taken for each character."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from lmworks.core.need import need
from lmworks.data.record import Dropped, Record
from lmworks.data.stage import Context, Stage, text_of, with_text


@final
@dataclass(frozen=True, kw_only=True)
class Repair(Stage):
    """Mojibake is undone and Unicode normalised, by ftfy. What is no text afterwards is dropped."""

    libraries: ClassVar[tuple[str, ...]] = ("ftfy",)

    form: Literal["NFC", "NFKC"] = "NFC"
    """Unicode normal form: 'NFC' joins letters and accents, 'NFKC' also unfolds ligatures, widths and the like."""
    mojibake: bool = True
    """Undo text that was read in the wrong encoding. Left as it is where there is no sign of it."""
    quotes: bool = False
    """Make curly quotes straight."""
    entities: bool = False
    """Decode HTML entities such as &amp; in texts without HTML tags."""

    def run(self, records: Iterable[Record], context: Context) -> Iterator[Record | Dropped]:
        """Every document with its text repaired."""
        ftfy = need("ftfy", extra="data", why="the stage 'repair'")
        config = ftfy.TextFixerConfig(
            unescape_html="auto" if self.entities else False,
            fix_encoding=self.mojibake,
            uncurl_quotes=self.quotes,
            fix_latin_ligatures=self.form == "NFKC",
            fix_character_width=self.form == "NFKC",
            normalization=self.form,
            explain=False,
        )
        for record in records:
            text = ftfy.fix_text(text_of(record), config)
            yield with_text(record, text) if text.strip() else Dropped(record.id, "empty after repair")
