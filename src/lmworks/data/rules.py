"""The stages `rules` and `lines`: documents and lines by published quality rules, which are data files with sources."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

from lmworks.core.errors import Problem, did_you_mean
from lmworks.core.recipe import NonNegativeInt, recipes_folder
from lmworks.data.measures import FINAL, MEASURES, Measured
from lmworks.data.record import Dropped, Record
from lmworks.data.stage import Context, Stage, text_of, with_text

BOUNDS = ("least", "most", "above", "below")


@final
@dataclass(frozen=True, kw_only=True)
class Rule:
    """A measure and the range in which a document is kept."""

    measure: str
    n: int | None = None
    phrase: str | None = None
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def value(self, text: Measured) -> float:
        """The measure of a text."""
        more = {name: getattr(self, name) for name in ("n", "phrase") if getattr(self, name) is not None}
        return float(MEASURES[self.measure](text, **more))

    def holds(self, value: float) -> bool:
        """Whether a document with this value is kept."""
        return not (
            (self.least is not None and value < self.least)
            or (self.most is not None and value > self.most)
            or (self.above is not None and value <= self.above)
            or (self.below is not None and value >= self.below)
        )

    @property
    def name(self) -> str:
        """The measure with what it is of, as a reason."""
        of = self.n if self.n is not None else self.phrase
        return self.measure.replace("-", " ") + (f" ({of})" if of is not None else "")

    @property
    def bounds(self) -> str:
        """The range in words."""
        return ", ".join(f"{b} {getattr(self, b):g}" for b in BOUNDS if getattr(self, b) is not None)


@final
@dataclass(frozen=True, kw_only=True)
class Rules(Stage):
    """Drops a document at the first rule that it breaks. Rules are TOML files: Gopher's, C4's and FineWeb's are
    shipped, and a file of one's own has the same form."""

    rules: tuple[str, ...]
    """Names of shipped rules (gopher-quality, gopher-repetition, c4, fineweb) or paths of TOML files, in this order."""
    skip: tuple[str, ...] = ()
    """Measures whose rules are left out, as in ["stop-words"] for text that is not English."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Files that are not there, or whose rules cannot be followed."""
        if not self.rules:
            yield Problem(path="rules", text=f"names no rules. Shipped: {', '.join(shipped())}")
        measures: set[str] = set()
        for i, name in enumerate(self.rules):
            path = rules_file(name)
            if not path.is_file():
                text = f"no such rules{did_you_mean(name, shipped())} Shipped: {', '.join(shipped())}; or a path"
                yield Problem(path=f"rules.{i}", text=text)
                continue
            for problem in problems_in(path):
                yield Problem(path=f"rules.{i}", text=f"{path}: {problem}")
            measures |= {str(entry.get("measure")) for entry in _entries(path)}
        for i, name in enumerate(self.skip):
            if name not in measures:
                text = f"no rule measures '{name}'{did_you_mean(name, measures)}"
                yield Problem(path=f"skip.{i}", text=text)

    def inputs(self) -> Sequence[Path]:
        """The files of rules."""
        return [rules_file(name) for name in self.rules]

    @cached_property
    def loaded(self) -> list[Rule]:
        """All rules, in order."""
        entries = [entry for path in self.inputs() for entry in _entries(path)]
        return [Rule(**entry) for entry in entries if entry["measure"] not in self.skip]

    def run(self, records: Iterable[Record], context: Context) -> Iterator[Record | Dropped]:
        """The documents, or the first rule that one breaks."""
        for record in records:
            text = Measured(text_of(record))
            broken = next(((rule, v) for rule in self.loaded if not rule.holds(v := rule.value(text))), None)
            if broken is None:
                yield record
            else:
                rule, value = broken
                yield Dropped(record.id, rule.name, f"{value:.4g}, kept is {rule.bounds}")


@final
@dataclass(frozen=True, kw_only=True)
class Lines(Stage):
    """Takes out lines and leaves the others as they are. The default is C4's: lines that end like a sentence, have five
    words or more, and do not speak of JavaScript."""

    final_punctuation: bool = True
    """Lines without an end of a sentence go: . ! ? and their like, also before a closing quotation mark."""
    least_words: NonNegativeInt = 5
    """Lines with fewer words go."""
    without: tuple[str, ...] = ("javascript",)
    """Lines with one of these in them go, in any case."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """A stage that takes nothing out."""
        if not self.final_punctuation and self.least_words <= 1 and not self.without:
            yield Problem(path="", text="takes no line out: set final_punctuation, least_words or without")

    def run(self, records: Iterable[Record], context: Context) -> Iterator[Record | Dropped]:
        """The documents with the lines that are left."""
        for record in records:
            before = text_of(record).splitlines(keepends=True)
            kept = [line for line in before if self._stays(line.strip())]
            if len(kept) == len(before):
                yield record
            elif kept:
                yield with_text(record, "".join(kept))
            else:
                yield Dropped(record.id, "no line is left")

    def _stays(self, line: str) -> bool:
        return (
            (not self.final_punctuation or line.endswith(FINAL))
            and len(line.split()) >= self.least_words
            and not any(phrase.lower() in line.lower() for phrase in self.without)
        )


def shipped() -> list[str]:
    """Names of the rules that lmworks ships."""
    return sorted(path.stem for path in (recipes_folder() / "rules").glob("*.toml"))


def rules_file(name: str) -> Path:
    """The file of shipped rules, or the path itself."""
    return Path(name) if name.endswith(".toml") else recipes_folder() / "rules" / f"{name}.toml"


def problems_in(path: Path) -> Iterator[str]:
    """What is wrong in a file of rules, rule by rule."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        yield f"is not TOML: {error}"
        return
    if not table.get("source"):
        yield "says no `source`: where the rules are from"
    for number, entry in enumerate(table.get("rules", []), start=1):
        yield from (f"rule {number}: {text}" for text in _problems_of(entry))


def _problems_of(entry: dict[str, Any]) -> Iterator[str]:
    name = entry.get("measure")
    if name not in MEASURES:
        yield f"no measure is called {name!r}{did_you_mean(str(name), MEASURES)} There are: {', '.join(MEASURES)}"
        return
    needed = set(inspect.signature(MEASURES[name]).parameters) - {"text"}
    for key in sorted(needed - set(entry)):
        yield f"'{name}' needs `{key}`"
    for key in sorted(set(entry) - needed - {"measure", *BOUNDS}):
        yield f"'{name}' has no setting '{key}'"
    if not set(entry) & set(BOUNDS):
        yield f"'{name}' has no bound: {', '.join(BOUNDS)}"


def _entries(path: Path) -> list[dict[str, Any]]:
    try:
        entries: list[dict[str, Any]] = tomllib.loads(path.read_text(encoding="utf-8")).get("rules", [])
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):  # told by problems_in
        return []
    return entries
