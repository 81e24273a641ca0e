"""Token shards: documents are tokenised once, and read from memory maps ever after.

    <cache>/tokens/<key>/   tokens-00000.bin ...   uint16 or uint32, little-endian: [bos] ids [eos] of each document
                            lengths.npy            tokens of each document, bos and eos included
                            bytes.npy              UTF-8 bytes of each document
                            hashes.npy             64-bit hash of each document's content
                            manifest.json          what went in, what was left out and why, hashes of all of the above

The key is a hash of the reader's settings, its files' contents and the tokenizer, so other inputs never meet old
tokens. Whether a document is for training or for validation is not stored: it follows from its hash and the fraction.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from lmworks.core import files
from lmworks.core.errors import DataError
from lmworks.data.cache import MANIFEST, make_once
from lmworks.data.fingerprint import Fingerprint, digest
from lmworks.data.pack import Documents, Tokens
from lmworks.data.read import Progress, Reader
from lmworks.data.tokenise import Tally, tokenise
from lmworks.data.tokenizer import Tokenizer

FORMAT = 1
SHARD_TOKENS = 2**28
"""A shard is closed once it holds this many tokens; a document is never cut."""


def shards_key(reader: Reader, source: Fingerprint, tokenizer: Tokenizer) -> str:
    """The name of the shards that these inputs give."""
    return digest([FORMAT, reader.settings(), source.id, tokenizer.id])[:32]


def make_shards(
    reader: Reader,
    source: Fingerprint,
    tokenizer: Tokenizer,
    cache: Path,
    *,
    progress: Progress | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Shards:
    """The shards of a reader's documents, tokenised now unless the cache holds them.

    Raises DataError when no document is left, the cache cannot be written or is full, or a file changed meanwhile.
    """
    folder = cache / "tokens" / shards_key(reader, source, tokenizer)

    def build(temporary: Path) -> None:
        with closing(_Writer(temporary, _dtype(tokenizer.vocab_size), shard_tokens)) as writer:
            tally = tokenise(reader, source, tokenizer, writer.add, progress)
            tally.must_hold_documents(reader.label)
            source.must_be_unchanged()
            writer.finish(_manifest(reader, source, tokenizer, tally))

    def waiting() -> None:
        if progress is not None:
            progress(
                stage=f"waiting for another process that tokenises {reader.label}", done=0, total=None, unit="tokens"
            )

    make_once(folder, build, waiting=waiting)
    return Shards.open(folder)


@final
@dataclass(frozen=True, eq=False)
class Shards:
    """Shards on disk, opened. Whole in size; `verify` looks at every byte."""

    folder: Path
    manifest: dict[str, Any]

    @staticmethod
    def open(folder: Path) -> Shards:
        """Open complete shards. Raises DataError for a missing, truncated or foreign file, by name."""
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DataError("no complete token shards here", where=str(folder), next_step=_AGAIN) from error
        except ValueError as error:
            raise _damaged(folder / MANIFEST, "is not JSON") from error
        if manifest.get("format") != FORMAT:
            raise _damaged(folder / MANIFEST, f"has format {manifest.get('format')}, this lmworks reads {FORMAT}")
        for entry in manifest["shards"]:
            path = folder / entry["file"]
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                raise _damaged(path, "is missing")
            if size != entry["size"]:
                raise _damaged(path, f"holds {size:,} bytes, not {entry['size']:,}: it was cut or written to")
        return Shards(folder, manifest)

    def verify(self) -> None:
        """Hash every file. Raises DataError that names a file whose bytes are not those that were written."""
        for entry in self.manifest["shards"]:
            if files.sha256_of(self.folder / entry["file"]) != entry["sha256"]:
                raise _damaged(
                    self.folder / entry["file"], "does not hold the bytes that were written (SHA-256 differs)"
                )

    @property
    def key(self) -> str:
        """The folder's name: a hash of everything that went in."""
        return self.folder.name

    @property
    def contents(self) -> str:
        """SHA-256 over the hashes of all files."""
        return str(self.manifest["contents"])

    @property
    def source(self) -> Fingerprint:
        """The files that were read."""
        return Fingerprint.from_json(self.manifest["files"])

    @cached_property
    def hashes(self) -> NDArray[np.uint64]:
        """64-bit content hash of each document."""
        return self._array("hashes.npy").astype(np.uint64)

    def training(self, validation: float) -> Documents:
        """The documents that are not held out."""
        return self._documents(~self._held_out(validation))

    def validation(self, validation: float) -> Documents:
        """The documents whose hash lies in the lowest `validation` of all hashes, whatever else there is."""
        return self._documents(self._held_out(validation))

    def _held_out(self, fraction: float) -> NDArray[np.bool_]:
        return self.hashes < np.uint64(int(fraction * 2**64))

    def _documents(self, chosen: NDArray[np.bool_]) -> Documents:
        lengths = self._array("lengths.npy").astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        n_bytes = self._array("bytes.npy").astype(np.int64)
        return Documents(self._tokens, starts[chosen], lengths[chosen], n_bytes[chosen], self.hashes[chosen])

    @cached_property
    def _tokens(self) -> Tokens:
        dtype = np.dtype(self.manifest["dtype"])
        paths = [
            self.folder / entry["file"] for entry in self.manifest["shards"] if entry["file"].startswith("tokens-")
        ]
        return Tokens([np.memmap(path, dtype=dtype, mode="r") for path in paths])

    def _array(self, name: str) -> NDArray[Any]:
        path = self.folder / name
        try:
            return np.asarray(np.load(path, allow_pickle=False))
        except (OSError, ValueError) as error:
            raise _damaged(path, f"cannot be read: {error}") from error


@final
class _Writer:
    """Writes documents into the files of one folder, and hashes the bytes on their way."""

    def __init__(self, folder: Path, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self._folder = folder
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._written: list[dict[str, Any]] = []
        self._waiting: list[NDArray[Any]] = []
        self._tokens = 0
        self._lengths: list[int] = []
        self._bytes: list[int] = []
        self._hashes: list[int] = []
        self._shard = _HashedFile(folder / "tokens-00000.bin")

    def add(self, ids: NDArray[np.int64], n_bytes: int, content: int) -> None:
        """Append one document, bos and eos included."""
        if self._tokens >= self._shard_tokens:
            self._close_shard()
            self._shard = _HashedFile(self._folder / f"tokens-{len(self._written):05d}.bin")
            self._tokens = 0
        self._shard.write(ids.astype(self._dtype).tobytes())
        self._tokens += len(ids)
        self._lengths.append(len(ids))
        self._bytes.append(n_bytes)
        self._hashes.append(content)

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write the index and, last, the manifest."""
        self._close_shard()
        columns = {"lengths": (self._lengths, "<i8"), "bytes": (self._bytes, "<i8"), "hashes": (self._hashes, "<u8")}
        for name, (values, dtype) in columns.items():
            path = self._folder / f"{name}.npy"
            np.save(path, np.array(values, dtype=dtype), allow_pickle=False)
            files.sync(path)
            self._written.append({"file": path.name, "size": path.stat().st_size, "sha256": files.sha256_of(path)})
        contents = digest([[entry["file"], entry["sha256"]] for entry in self._written])
        counts = {"tokens": sum(self._lengths), "bytes": sum(self._bytes), "dtype": self._dtype.str}
        files.write_json(self._folder / MANIFEST, {**manifest, **counts, "shards": self._written, "contents": contents})

    def close(self) -> None:
        """Let go of the open file, whether all went well or not."""
        self._shard.file.close()

    def _close_shard(self) -> None:
        self._written.append(self._shard.close())


@final
class _HashedFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.file = path.open("wb", buffering=1 << 20)
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self._digest.update(data)
        self._size += len(data)

    def close(self) -> dict[str, Any]:
        self.file.close()
        files.sync(self._path)
        return {"file": self._path.name, "size": self._size, "sha256": self._digest.hexdigest()}


_AGAIN = "remove the folder and run again: the documents are tokenised anew"


def _manifest(reader: Reader, source: Fingerprint, tokenizer: Tokenizer, tally: Tally) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "reader": reader.settings(),
        "source_id": source.id,
        "tokenizer_id": tokenizer.id,
        "vocab_size": tokenizer.vocab_size,
        "documents": tally.balance(),
        "licences": tally.licences,
        "files": source.to_json(),
    }


def _dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"token shard {what}", where=str(path), next_step=f"{_AGAIN}: rm -r {path.parent}")
