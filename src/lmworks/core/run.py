"""A run: one folder with everything that was decided, seen and made.

recipe.toml     the resolved recipe; it runs again as it is
record.json     the run's id; what made these bytes: hashes of recipe, code, data, tokenizer, parent; its attempts
model.toml      the model's shape with every size written out
events.jsonl    the one event schema
metrics.jsonl   one object a step, and one a validation
summary.json    final values, wall time, peak memory
tokenizer/      tokenizer.json and its config
checkpoints/    step-00000100/ ...
tensorboard/    curves.png    samples.jsonl
ranks/00001/    rows and events of another rank, where there are several
flight/         where each rank stood when they waited in vain, by attempt
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
import tomllib
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from lmworks.core import files, recipe
from lmworks.core.errors import LmworksError, UsageError


class RunFolder:
    """The paths of one run, and the few files that belong to no other module."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.toml"
        self.record = path / "record.json"
        self.events = path / "events.jsonl"
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples.jsonl"
        self.summary = path / "summary.json"
        self.curves = path / "curves.png"
        self.tokenizer = path / "tokenizer"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.flight = path / "flight"

    @property
    def name(self) -> str:
        """The folder's own name, which is the run's name."""
        return self.path.resolve().name

    def of_rank(self, rank: int) -> RunFolder:
        """Where another rank than the first keeps its own rows and events."""
        folder = RunFolder(self.path / "ranks" / f"{rank:05d}")
        folder.path.mkdir(parents=True, exist_ok=True)
        return folder

    def exists(self) -> bool:
        """Whether a run lives here."""
        return self.recipe.is_file()

    def is_done(self) -> bool:
        """Whether the run reached its end."""
        return self.summary.is_file()

    def create(self, resolved: Any) -> None:
        """Make the folder and write the resolved recipe. Raises LmworksError when the place cannot be written."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            files.write_text(self.recipe, recipe.dump(resolved))
        except OSError as error:
            raise self._unwritable(error) from error

    @contextmanager
    def alone(self, doing: str = "trains") -> Iterator[None]:
        """Keep other processes out of the folder until the block ends. Raises LmworksError when one is in it.

        The lock is the kernel's, on a file beside the folder, so it goes with a process that is killed. Where locks do
        not hold (some network disks), nobody is kept out.
        """
        path = self.path.resolve()
        lock = path.with_name(f".{path.name}.lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = _take(lock)
        except OSError as error:
            raise self._unwritable(error) from error
        if handle is None:
            pid = lock.read_text(encoding="utf-8").strip() if lock.is_file() else ""
            raise LmworksError(
                f"another process {doing} here{f' (pid {pid})' if pid else ''}",
                where=str(self.path),
                next_step="wait until it ends, or give another folder (--run DIR or --out DIR)",
            )
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            os.close(handle)

    def _unwritable(self, error: OSError) -> LmworksError:
        return LmworksError(
            f"cannot write the run folder: {error.strerror}",
            where=str(self.path),
            next_step="give another folder with --run DIR",
        )

    def id(self) -> str:
        """The run's own id, the same after every resume: names repeat, this does not."""
        return str(self._kept().get("id") or uuid.uuid4().hex)

    def write_record(self, record: dict[str, Any], attempt: dict[str, Any]) -> None:
        """Write record.json: the facts of this attempt, the run's id, and a line for each attempt so far."""
        attempts = [*self._kept().get("attempts", []), attempt]
        files.write_json(self.record, {"id": self.id(), **record, "attempts": attempts})

    def add_to_record(self, **facts: Any) -> None:
        """Put facts that are known only later into record.json, in place of those of an earlier attempt."""
        files.write_json(self.record, {**self._kept(), **facts})

    def _kept(self) -> dict[str, Any]:
        if not self.record.is_file():
            return {}
        kept: dict[str, Any] = json.loads(self.record.read_text(encoding="utf-8"))
        return kept

    def must_match(self, resolved: Any, *, may_differ: Iterable[str] = ()) -> None:
        """Raise UsageError when the run that lives here was made by another recipe."""
        theirs = tomllib.loads(self.recipe.read_text(encoding="utf-8"))
        ours = tomllib.loads(recipe.dump(resolved))
        free = tuple(may_differ)
        found = {
            path: pair
            for path, pair in recipe.differences(ours, theirs).items()
            if not any(path == name or path.startswith(f"{name}.") for name in free)
        }
        if found:
            lines = [f"{path}: now {a!r}, there {b!r}" for path, (a, b) in found.items()]
            shown = "; ".join(lines[:5]) + ("; ..." if len(lines) > 5 else "")
            raise UsageError(
                f"this folder holds a run of another recipe ({shown})",
                where=str(self.path),
                next_step="--run DIR for another folder, or --resume never to start anew beside it",
            )


def _take(lock: Path) -> int | None:
    """Open and lock a file, and write who holds it; None when another process does."""
    while True:
        handle = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError:  # no locks on this file system
            return handle
        if lock.exists() and lock.stat().st_ino == os.fstat(handle).st_ino:
            os.truncate(handle, 0)
            os.write(handle, str(os.getpid()).encode())
            return handle
        os.close(handle)  # its holder deleted it in this moment: the name is free again


def fresh(path: Path) -> Path:
    """The path itself when nothing is there, otherwise the first free 'path-2', 'path-3', ..."""
    if not path.exists():
        return path
    return next(p for p in (path.with_name(f"{path.name}-{i}") for i in range(2, 10_000)) if not p.exists())


def record_of(resolved: Any) -> dict[str, Any]:
    """What made a run: recipe hash, code, versions, hardware, command. The trainer adds data, parent and tokenizer."""
    text = recipe.dump(resolved)
    return {
        "recipe_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "code": code_version(),
        "versions": versions(),
        "hardware": hardware(),
        "command": sys.argv,
    }


def code_version() -> dict[str, Any]:
    """lmworks' version, a hash over its own source files, and the git commit when it runs from a checkout."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode())
        digest.update(path.read_bytes())
    return {"version": metadata.version("lmworks"), "sha256": digest.hexdigest(), **_git(package)}


def _git(package: Path) -> dict[str, Any]:
    root = package.parents[1]
    if not (root / ".git").exists():
        return {}
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        status = subprocess.run(
            [*git, "status", "--porcelain", "src"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for name in ("torch", "numpy", "tokenizers", "safetensors"):
        found[name] = metadata.version(name)
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores, memory, threads. The trainer adds its device."""
    import psutil  # noqa: PLC0415  (only when a record is written)

    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
