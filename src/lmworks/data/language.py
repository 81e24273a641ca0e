"""The stage `language`: which language a document is in, and whether it is one that is wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, final

from lmworks.core.errors import Problem
from lmworks.core.need import need
from lmworks.core.recipe import Fraction, PositiveInt
from lmworks.data.record import Dropped, Record
from lmworks.data.stage import Context, Stage, text_of, with_facts


@final
@dataclass(frozen=True, kw_only=True)
class Language(Stage):
    """Marks each document with its language, by py3langid, and keeps the wanted ones. The model lies in the package:
    139 languages, by their ISO 639-1 codes."""

    adds: ClassVar[Mapping[str, type]] = {"language": str, "language_probability": float}
    libraries: ClassVar[tuple[str, ...]] = ("py3langid",)

    keep: tuple[str, ...] = ()
    """Codes of the languages that are kept, as in ["en", "de"]; none: all, and they are only marked."""
    least: Fraction = 0.65
    """Probability below which a document is dropped as uncertain. 0.65 is FineWeb's, with another model."""
    characters: PositiveInt = 5000
    """How much of a document's beginning is looked at."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Codes that the model does not know."""
        known = _identifier().labels if self.keep else ()
        for code in self.keep:
            if code not in known:
                text = f"the model knows no language '{code}'. Legal: {', '.join(sorted(known))}"
                yield Problem(path="keep", text=text)

    def run(self, records: Iterable[Record], context: Context) -> Iterator[Record | Dropped]:
        """Every document with its language, or the language as the reason why it is left out."""
        identifier = _identifier()
        for record in records:
            code, probability = identifier.classify(text_of(record)[: self.characters])
            if float(probability) < self.least:
                yield Dropped(record.id, "language uncertain", f"{code} {float(probability):.2f}")
            elif self.keep and code not in self.keep:
                yield Dropped(record.id, "another language", code)
            else:
                yield with_facts(record, language=str(code), language_probability=round(float(probability), 4))


@cache
def _identifier() -> Any:
    """py3langid's own model, with probabilities that add up to one."""
    langid = need("py3langid.langid", extra="data", why="the stage 'language'")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
