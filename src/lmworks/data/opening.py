"""Opening files of lines, compressed or not, by their ending."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from lmworks.core.errors import DataError


def open_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, unpacked when it ends in .gz, .bz2, .xz or .zst.

    Raises DataError when the file cannot be read or its packing is damaged.
    """
    try:
        with _open(path) as file:
            yield from file
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"the packed file is damaged: {error}", where=str(path)) from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=str(path)) from error


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path))
    if path.suffix == ".bz2":
        return bz2.open(path)
    if path.suffix == ".xz":
        return lzma.open(path)
    if path.suffix == ".zst":
        import pyarrow as pa  # noqa: PLC0415  (0.2 s that other endings must not pay)

        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")
