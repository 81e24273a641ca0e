"""The stage `decontaminate`: documents that hold items of test sets are dropped, and what matched is told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, final

import numpy as np
from numpy.typing import NDArray

from lmworks.core import files
from lmworks.core.errors import DataError, Problem
from lmworks.core.recipe import PositiveInt, Slot
from lmworks.data.read import Reader
from lmworks.data.record import Dropped, Record, Text
from lmworks.data.shingles import U64, plain, shingles
from lmworks.data.stage import Context, Settling, Surveyed, batches, text_of, with_facts
from lmworks.data.units import LineFile, read_rows

WHOLE, PART, TEMPLATE = "holds a test item", "shares words with a test item", "holds a test item with other numbers"
PLANTED = 200
"""Items of the self-test at most."""
CARRIER = "a carrier of the self test begins here {} and it ends there with other words"


@final
@dataclass(frozen=True, kw_only=True)
class Decontaminate(Settling):
    """Looks for n-grams of words of the test items in every document, after case, punctuation and white space are made
    plain. Every match is compared word by word. Before anything is judged, items are planted into a text and must all
    be found."""

    surveys: ClassVar[bool] = False
    adds: ClassVar[Mapping[str, type]] = {"contaminated": bool}

    sets: Annotated[tuple[Reader, ...], Slot("reader")]
    """Readers of the test sets; a reader's document is an item. Questions and answers in other fields are other
    readers."""
    n: PositiveInt = 13
    """Words in a row that are taken for a match; 13 is GPT-3's."""
    short: PositiveInt = 8
    """An item with fewer words than `n` is looked for as a whole, if it has this many; shorter ones are told."""
    numbers: Literal["as they are", "any"] = "as they are"
    """'any': an item with other numbers in it is a match too."""
    found: Literal["drop", "mark"] = "drop"
    """What becomes of a document with a match; 'mark' keeps it, with the fact `contaminated`."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """No test set, or lengths that exclude each other."""
        if not self.sets:
            yield Problem(path="sets", text="needs a reader of a test set, as in [{ use = 'jsonl', paths = [...] }]")
        if self.short > self.n:
            yield Problem(path="short", text=f"{self.short} is more than n = {self.n}")

    def built_on(self) -> Sequence[object]:
        """The readers."""
        return self.sets

    def inputs(self) -> Sequence[Path]:
        """The files of the test sets."""
        return [file.path for reader in self.sets for file in reader.files()]

    def settle(
        self, surveys: Sequence[Surveyed], references: Sequence[Surveyed], folder: Path, context: Context
    ) -> None:
        """An index of all n-grams, and the self-test. Raises DataError when a planted item is not found."""
        items: list[tuple[str, str, list[str]]] = []
        counts: dict[str, dict[str, int]] = {}
        for reader in self.sets:
            tally = counts.setdefault(reader.label, {"items": 0, "too short to be looked for": 0})
            for record in (r for r in reader.read() if isinstance(r, Record)):
                words = plain(text_of(record)).split()
                tally["items"] += 1
                tally["too short to be looked for"] += len(words) < self.short
                if len(words) >= self.short:
                    items.append((reader.label, record.id, words))
        _must_hold(items, self.short)
        _write_index(items, self.n, folder, self._masked)
        planted, lost = self._self_test(items, folder, context)
        if lost:
            raise DataError(
                f"the self-test failed: of {planted} planted test items {len(lost)} were not found, '{lost[0]}' first",
                next_step="this is a fault of lmworks: do not trust the outcome",
            )
        files.write_json(folder / "findings.json", {"test sets": counts, "self-test": f"{planted} planted, all found"})

    def findings(self, verdict: Path) -> dict[str, Any]:
        """Items of each set, and the self-test."""
        found: dict[str, Any] = json.loads((verdict / "findings.json").read_text(encoding="utf-8"))
        return {"test sets": {name: _told(counts) for name, counts in found["test sets"].items()}, **_rest(found)}

    def parts(self, verdict: Path, shard: int) -> Sequence[str]:
        """The index."""
        return [path.name for path in sorted(verdict.iterdir()) if path.suffix in {".npy", ".zst"}]

    def run(self, records: Iterable[Record], context: Context) -> Iterator[Record | Dropped]:
        """The documents, or the test item that one holds and the words that matched."""
        assert context.verdict is not None, "a settling stage runs after its verdict"
        index = _Index(context.verdict, self._masked)
        for batch in batches(records):
            flat = [plain(text_of(record)) for record in batch]
            for record, match in zip(batch, index.matches(flat), strict=True):
                if match is None:
                    yield with_facts(record, contaminated=False)
                elif self.found == "mark":
                    yield with_facts(record, contaminated=True)
                else:
                    yield Dropped(record.id, match.reason, match.told)

    def _masked(self, text: str) -> str:
        """A plain text in which numbers that do not matter are all the same; it has as many words."""
        return re.sub(r"\d+", "0", text) if self.numbers == "any" else text

    def _self_test(
        self, items: Sequence[tuple[str, str, list[str]]], folder: Path, context: Context
    ) -> tuple[int, list[str]]:
        """How many items were planted, and the names of those that were not found."""
        step = max(1, len(items) // PLANTED)
        chosen = items[::step]
        texts = [CARRIER.format(" ".join(words)) for _, _, words in chosen]
        records = [
            Record(id=f"{name}: {item}", content=(Text(text),), source="self-test")
            for (name, item, _), text in zip(chosen, texts, strict=True)
        ]
        there = Context(seed=context.seed, verdict=folder)
        answers = self.run(records, there)
        lost = [a.id for a in answers if isinstance(a, Record) and not a.facts["contaminated"]]
        return len(chosen), lost


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Match:
    words: list[str]
    """The document's own."""
    item: list[str]
    """The item's, in the same place."""
    name: str
    whole: bool
    """Whether all words of the item are there, in a row."""

    @property
    def reason(self) -> str:
        if not self.whole:
            return PART
        return WHOLE if self.words == self.item else TEMPLATE

    @property
    def told(self) -> str:
        shown = self.words if len(self.words) <= 40 else [*self.words[:40], "..."]
        return f"{self.name}: {' '.join(shown)}"


@final
class _Index:
    """The n-grams of all items, by hash, for each length that is looked for."""

    def __init__(self, folder: Path, masked: Callable[[str], str]) -> None:
        self._folder, self._masked = folder, masked
        self._tables: dict[int, tuple[U64, NDArray[np.int64]]] = {}
        for path in sorted(folder.glob("hashes-*.npy")):
            length = int(path.stem.partition("-")[2])
            places = np.load(folder / f"places-{length}.npy", allow_pickle=False)
            self._tables[length] = (np.load(path, allow_pickle=False), places)

    @cached_property
    def _items(self) -> list[tuple[str, list[str]]]:
        """Only once something matches."""
        return [(row["name"], row["words"].split(" ")) for row in read_rows(self._folder / "items.jsonl.zst")]

    def matches(self, texts: Sequence[str]) -> list[_Match | None]:
        """The longest match that begins at the first n-gram of each text that is one of an item."""
        found: list[_Match | None] = [None] * len(texts)
        for length, (hashes, places) in sorted(self._tables.items(), reverse=True):
            own = shingles([self._masked(text) for text in texts], length, "word")
            at = np.minimum(np.searchsorted(hashes, own.hashes), len(hashes) - 1)
            hits = np.flatnonzero(hashes[at] == own.hashes)
            for hit in hits.tolist():
                text = int(np.searchsorted(own.starts, hit, side="right")) - 1
                if found[text] is None:
                    item, place = places[at[hit]].tolist()
                    here = hit - int(own.starts[text])
                    found[text] = self._compared(texts[text].split(" "), here, length, item, place)
        return found

    def _compared(self, words: list[str], here: int, length: int, item: int, there: int) -> _Match | None:
        """The match in full, or None where hashes are equal and words are not."""
        name, wanted = self._items[item]
        same = [self._masked(word) for word in words], [self._masked(word) for word in wanted]
        if same[0][here : here + length] != same[1][there : there + length]:
            return None
        start, end = 0, length
        while min(here, there) > start and same[0][here - start - 1] == same[1][there - start - 1]:
            start += 1
        while here + end < len(words) and there + end < len(wanted) and same[0][here + end] == same[1][there + end]:
            end += 1
        return _Match(
            words=words[here - start : here + end],
            item=wanted[there - start : there + end],
            name=name,
            whole=start + end == len(wanted),
        )


def _write_index(
    items: Sequence[tuple[str, str, list[str]]], n: int, folder: Path, masked: Callable[[str], str]
) -> None:
    lines = LineFile(folder / "items.jsonl.zst")
    by_length: dict[int, list[int]] = {}
    for number, (name, item, words) in enumerate(items):
        lines.write({"name": f"{name}: {item}", "words": " ".join(words)})
        by_length.setdefault(min(n, len(words)), []).append(number)
    lines.close()
    for length, numbers in by_length.items():
        own = shingles([masked(" ".join(items[i][2])) for i in numbers], length, "word")
        counts = np.diff(own.starts)
        owner = np.repeat(np.array(numbers, dtype=np.int64), counts)
        place = np.arange(len(own.hashes), dtype=np.int64) - np.repeat(own.starts[:-1], counts)
        hashes, firsts = np.unique(own.hashes, return_index=True)
        np.save(folder / f"hashes-{length}.npy", hashes, allow_pickle=False)
        np.save(folder / f"places-{length}.npy", np.stack([owner, place], axis=1)[firsts], allow_pickle=False)


def _must_hold(items: Sequence[object], short: int) -> None:
    if not items:
        raise DataError(
            f"the test sets hold no item of {short} words or more",
            next_step="check the readers in `sets` and their fields, or set `short` to less",
        )


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _rest(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name != "test sets"}
