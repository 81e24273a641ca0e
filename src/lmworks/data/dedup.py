"""The stage `dedup`: of documents that are the same, one is kept. What the same is says the `key`.

Survey: the keys of every document, on disk. Settle: band by band, documents that share a key are joined, looked at
again where the key has a `verify`, and one of each cluster is chosen. The outcome depends on the documents and the
settings alone: not on the order of files, shards or workers.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, final

import numpy as np

from lmworks.core import files
from lmworks.core import recipe as recipes
from lmworks.core.errors import DataError, Problem, did_you_mean
from lmworks.core.recipe import Fraction, PositiveInt, Slot
from lmworks.data.clusters import BYTES_A_DOCUMENT
from lmworks.data.joining import Clusters, Corpus, clusters_of, copies_of
from lmworks.data.keys import Key, MinHash
from lmworks.data.read import Reader
from lmworks.data.record import Dropped, Record
from lmworks.data.stage import Context, Settling, Surveyed, batches, text_of, with_facts
from lmworks.data.units import LineFile, read_rows

TABLE = "clusters.jsonl.zst"
SHOWN = 5
"""Clusters and pairs of sources that the report names."""


@final
@dataclass(frozen=True, kw_only=True)
class Dedup(Settling):
    """Drops all but one of each cluster of documents that are the same. Kept is: of the source that is preferred, then
    the longest, then the one whose source and id come first."""

    adds: ClassVar[dict[str, type]] = {"copies": int}
    seeded: ClassVar[bool] = True

    key: Annotated[Key, Slot("key")] = MinHash()
    """What makes two documents the same."""
    scope: Literal["global", "per-source", "against"] = "global"
    """'global': among all documents; 'per-source': only within a source; 'against': only those that are the same as one
    of the reference documents, and documents here are not compared with each other."""
    against: Annotated[tuple[Reader, ...], Slot("reader")] = ()
    """Reference documents: what is the same as one of them is dropped, and they are never handed on."""
    prefer: tuple[str, ...] = ()
    """Names of readers whose documents are kept before others', in this order."""
    memory_mb: PositiveInt = 1000
    """Megabytes for the keys of a band; where they do not fit, a band is gone through in several passes."""
    largest: Fraction = 0.01
    """Share of all documents from which on a cluster is told as suspicious: boiler-plate, most often."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Names that no reader has; references that are missing or have no effect."""
        names = [reader.label for reader in recipe.readers]
        for name in self.prefer:
            if name not in names:
                yield Problem(path="prefer", text=f"no reader is called '{name}'{did_you_mean(name, names)}")
        if self.scope == "against" and not self.against:
            yield Problem(path="against", text="scope = 'against' needs reference documents, as a list of readers")
        if self.scope == "per-source" and self.against:
            yield Problem(path="against", text="has no effect with scope = 'per-source'")
        if self.scope == "against" and self.prefer:
            yield Problem(path="prefer", text="has no effect with scope = 'against': the reference is always kept")

    def built_on(self) -> Sequence[object]:
        """The key."""
        return (self.key,)

    @property
    def references(self) -> tuple[Reader, ...]:
        """`against`."""
        return self.against

    def survey_settings(self) -> dict[str, Any]:
        """Those of the key that its keys depend on."""
        apart = self.key.survey_apart()
        return {name: value for name, value in recipes.table_of(self.key).items() if name not in apart}

    def memory(self, documents: int) -> int:
        """The forest of all documents, and the keys of one band as far as `memory_mb` allows."""
        return 12 * documents + min(self.memory_mb * 1_000_000, BYTES_A_DOCUMENT * documents)

    def survey(self, records: Iterable[Record], folder: Path, context: Context) -> None:
        """keys.npy (K bands, D documents), lengths.npy in characters, ids.npy and where each ends, source.json."""
        made, lengths, ends, sources = [], [], [0], Counter[str]()
        ids = bytearray()
        for batch in batches(records):
            texts = [text_of(record) for record in batch]
            made.append(self.key.keys(texts, context.seed))
            lengths += [len(text) for text in texts]
            for record in batch:
                ids += record.id.encode("utf-8", "surrogatepass")
                ends.append(len(ids))
            sources.update(record.source for record in batch)
        if len(sources) > 1:
            raise DataError(f"a shard holds documents of several sources: {', '.join(sources)}")
        keys_KD = np.concatenate(made).T if made else np.zeros((self.key.bands, 0), dtype=np.uint64)
        np.save(folder / "keys.npy", np.ascontiguousarray(keys_KD), allow_pickle=False)
        np.save(folder / "lengths.npy", np.array(lengths, dtype=np.int64), allow_pickle=False)
        np.save(folder / "ids.npy", np.frombuffer(bytes(ids), dtype=np.uint8), allow_pickle=False)
        np.save(folder / "ends.npy", np.array(ends, dtype=np.int64), allow_pickle=False)
        files.write_json(folder / "source.json", {"source": next(iter(sources), "")})

    def settle(
        self, surveys: Sequence[Surveyed], references: Sequence[Surveyed], folder: Path, context: Context
    ) -> None:
        """For each shard the rows that have copies; a table of all clusters; what the report tells."""
        corpus = Corpus(surveys, references, self.key, memory=self.memory_mb * 1_000_000)
        with tempfile.TemporaryDirectory(prefix=".details-", dir=folder) as room:
            if self.scope == "against":
                found = copies_of(corpus, folder=Path(room))
            else:
                per_source = self.scope == "per-source"
                found = clusters_of(corpus, prefer=self.prefer, per_source=per_source, folder=Path(room))
            looked_at = corpus.looked_at
            _write(found.table(), folder / TABLE)
        for shard in range(len(surveys)):
            _write(found.rows(shard), folder / _rows_name(shard))
        told = self._told(corpus, found)
        if self.key.least is not None:
            told["pairs of candidates"] = {"looked at": looked_at, "refused": corpus.refused}
        files.write_json(folder / "findings.json", told)

    def _told(self, corpus: Corpus, found: Clusters) -> dict[str, Any]:
        removed = int(found.removed.sum())
        largest = found.largest(SHOWN)
        matrix = {f"{own} like {kept}": count for (own, kept), count in sorted(found.by_source().items())}
        warnings = [
            f"a cluster of {size:,} documents, {100 * size / len(corpus):.1f} % of all, around {name}: "
            "look at it before you trust the outcome"
            for name, size in largest.items()
            if size > max(2, int(self.largest * len(corpus)))
        ]
        return {
            "documents": {"compared": len(corpus), "clusters": len(found), "removed": removed},
            "removed documents, and the source of the one that is kept": matrix,
            "largest clusters": largest,
            **({"warnings": warnings} if warnings else {}),
        }

    def run(self, records: Iterable[Record], context: Context) -> Iterator[Record | Dropped]:
        """The documents that are kept, each with the number of documents that it stands for."""
        assert context.verdict is not None, "a settling stage runs after its verdict"
        found = {row["row"]: row for row in read_rows(context.verdict / _rows_name(context.shard))}
        for number, record in enumerate(records):
            row = found.get(number)
            if row is not None and row["of"] is not None:
                yield Dropped(record.id, "duplicate", row["of"])
            else:
                yield with_facts(record, copies=row["copies"] if row is not None else 1)

    def parts(self, verdict: Path, shard: int) -> Sequence[str]:
        """The rows of this shard."""
        return [_rows_name(shard)]

    def tables(self, verdict: Path) -> Sequence[str]:
        """The clusters."""
        return [TABLE]

    def findings(self, verdict: Path) -> dict[str, Any]:
        """Clusters, pairs of sources, what looks suspicious."""
        found: dict[str, Any] = json.loads((verdict / "findings.json").read_text(encoding="utf-8"))
        return found


def _write(rows: Iterable[dict[str, Any]], path: Path) -> None:
    out = LineFile(path)
    for row in rows:
        out.write(row)
    out.close()


def _rows_name(shard: int) -> str:
    return f"rows-{shard:05d}.jsonl.zst"
