"""Documents as Parquet: one row a document, one column a fact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from lmworks.core import files

ROWS = 1000
"""Rows of a group: small, because readers hold a group of texts in memory."""
PLAIN = ("id", "text", "source", "licence")


@final
class ParquetFile:
    """Appends documents to a Parquet file, a thousand at a time."""

    def __init__(self, path: Path, facts: Mapping[str, type]) -> None:
        import pyarrow as pa  # noqa: PLC0415  (only where Parquet is written)
        import pyarrow.parquet as pq  # noqa: PLC0415

        kinds = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
        self._columns = [(name, pa.string()) for name in PLAIN] + [(name, kinds[kind]) for name, kind in facts.items()]
        self._path = path
        self._file = pq.ParquetWriter(path, pa.schema(self._columns), compression="zstd")
        self._table = pa.Table
        self._schema = pa.schema(self._columns)
        self._waiting: list[dict[str, Any]] = []

    def write(self, row: dict[str, Any]) -> None:
        """Append one document, as `units.row_of` gives it."""
        self._waiting.append({**{name: row.get(name) for name in PLAIN}, **row.get("facts", {})})
        if len(self._waiting) == ROWS:
            self._hand_on()

    def close(self) -> None:
        """Write what waits, and make the file durable."""
        self._hand_on()
        self._file.close()
        files.sync(self._path)

    def _hand_on(self) -> None:
        if self._waiting:
            self._file.write_table(self._table.from_pylist(self._waiting, schema=self._schema))
            self._waiting = []
