"""Writing files so that a kill at any moment leaves the old bytes or the new ones, never a mixture."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What the system says when there is no more room: on the disk, in a quota, in a file."""


def why_not_written(error: Exception) -> str:
    """What a failed write comes down to, for a person; safetensors hides the number of the system's error in a text."""
    if getattr(error, "errno", None) in FULL or "No space" in str(error):
        return "disk full"
    return getattr(error, "strerror", None) or str(error)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make a file's bytes durable, or the names in a folder: a rename is only on disk once its folder is."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a file by `text` in one step: temporary file beside it, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    folder = os.open(path.parent, os.O_RDONLY)  # before the file is seen: somebody may rename the folder at once
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """Replace a file by `value` as indented JSON in one step."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
