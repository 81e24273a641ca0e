"""The runs below the folders that were asked for: found, told apart, and how each of them goes.

A run is known by an id, a hash of where it lies. Whoever asks for a run gives its id, which is looked up among those
that were found here; nothing that comes from outside becomes a path.
"""

from __future__ import annotations

import hashlib
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lmworks.board.curves import Curves
from lmworks.board.reading import ends, list_of, number, opened, spread, table, table_of, text, version
from lmworks.board.system import System
from lmworks.core.run import RunFolder

DEPTH = 5
"""Folders below a root in which runs are looked for."""
INSIDE = {"checkpoints", "ranks", "tokenizer", "tensorboard", "export", "logs", "node_modules", "__pycache__"}
"""Folders in which no run lies."""
MOST_RUNS = 2000
LOOK_EVERY, LOOKS_EVERY = 2.0, 10
"""Seconds between two looks for runs; so many times as long as a look takes, where that is more."""
POINTS = 60
"""Of the small curve in the list."""
SILENT, SILENT_ELSEWHERE = 5.0, 60.0
"""Seconds without a new row or event after which a run whose lock nobody holds counts as dead: one of this machine, and
one of another, whose locks are not seen from here."""
STEPS, STEPS_ELSEWHERE = 3, 10
"""Of its own steps that it may be silent for, where they are long."""


class Run:
    """One run folder as the board sees it."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.folder = RunFolder(path)
        self.id = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
        self._row: tuple[Any, dict[str, Any]] | None = None

    @cached_property
    def curves(self) -> Curves:
        """Its rows."""
        return Curves(self.folder.metrics)

    @cached_property
    def system(self) -> System:
        """Its events."""
        return System(self.path)

    def recipe(self) -> dict[str, Any]:
        """The resolved recipe as a table."""
        return table(self.folder.recipe)

    def row(self) -> dict[str, Any]:
        """The run in the list: how it goes, last values, speed, time left, a small curve."""
        watched = (self.folder.metrics, self.folder.summary, self.folder.recipe, self.folder.events, _lock(self.path))
        state = [version(path) for path in watched]
        if self._row is None or self._row[0] != state:
            self._row = state, self._facts()
        facts = self._row[1]
        status, why = self.status(facts["step_seconds"])
        left = None
        if status == "running" and facts["step_seconds"] is not None and facts["steps"] is not None:
            left = max(0.0, facts["steps"] - (facts["step"] or 0)) * facts["step_seconds"]
        return {**facts, "status": status, "why": why, "seconds_left": left}

    def _facts(self) -> dict[str, Any]:
        recipe, record, rows = self.recipe(), table(self.folder.record), ends(self.folder.metrics)
        steps = [row for row in rows if "loss" in row]
        checks = [row for row in rows if "val_loss" in row]
        newest, check = (found[-1] if found else {} for found in (steps, checks))
        seconds = [value for row in steps[-20:] if (value := number(row.get("seconds"))) is not None]
        rates = [value for row in steps[-20:] if (value := number(row.get("tokens_per_second"))) is not None]
        began = next((table_of(one).get("began") for one in list_of(record.get("attempts"))), None)
        return {
            "id": self.id,
            "name": self.name,
            "step": number(newest.get("step")),
            "steps": number(recipe.get("steps")),
            "tokens": number(newest.get("tokens")),
            "loss": number(newest.get("loss")),
            "not_finite": "loss" in newest and number(newest["loss"]) is None,
            "val_loss": number(check.get("val_loss")),
            "mfu": number(newest.get("mfu")),
            "tokens_per_second": statistics.median(rates) if rates else None,
            "step_seconds": statistics.median(seconds) if seconds else None,
            "kwh": number(newest.get("kwh")),
            "parameters": number(record.get("parameters")),
            "began": text(began, 40) or None,
            "attempts": len(list_of(record.get("attempts"))),
            "written": self._written(),
            "curve": self._curve(),
        }

    def _curve(self) -> list[list[float]]:
        points = ((number(r.get("step")), number(r.get("loss"))) for r in spread(self.folder.metrics, POINTS))
        return [[step, loss] for step, loss in points if step is not None and loss is not None]

    def _written(self) -> float | None:
        """When the run last wrote a row or an event, in seconds since the epoch."""
        times = [path.stat().st_mtime for path in (self.folder.metrics, self.folder.events) if path.is_file()]
        return max(times) if times else None

    def status(self, step_seconds: float | None) -> tuple[str, str]:
        """'running', 'done', 'stopped', 'failed' or 'dead', and why.

        A trainer holds a lock beside its folder while it lives, and removes it when it ends, also by an error. So a
        lock that nobody holds was left by a process that was killed.
        """
        lock = _lock(self.path)
        if lock.exists():
            return self._locked(lock, step_seconds)
        if self.folder.is_done():
            stopped = table(self.folder.summary).get("stopped")
            return "done", text(stopped, 300)
        return self._ended()

    def _locked(self, lock: Path, step_seconds: float | None) -> tuple[str, str]:
        pid = _pid(lock)
        held = _held(lock, pid)
        if held or (held is None and _lives(pid)):
            return "running", f"process {pid}"
        here = self._made_here()
        least, steps = (SILENT, STEPS) if here else (SILENT_ELSEWHERE, STEPS_ELSEWHERE)
        written = self._written()
        if written is not None and time.time() - written <= max(least, steps * (step_seconds or 0.0)):
            return "running", "" if here else "on another machine"
        if self.folder.is_done():
            return "done", ""
        return "dead", f"process {pid} is gone and left its lock: it was killed. The same command goes on."

    def _ended(self) -> tuple[str, str]:
        for event in reversed(ends(self.folder.events)):
            name, attrs = event.get("name"), table_of(event.get("attrs"))
            if name == "failed":
                return "failed", text(attrs.get("reason"), 2000)
            if name == "stopped":
                return "stopped", f"{text(attrs.get('reason'), 300)}. The same command goes on."
            if name == "start":
                break
        return "stopped", "it ended before its last step. The same command goes on."

    def _made_here(self) -> bool:
        """Whether the record's last attempt is of a machine like this one."""
        record = table(self.folder.record)
        attempts = list_of(record.get("attempts"))
        hardware = table_of(table_of(attempts[-1]).get("hardware")) if attempts else {}
        here = {"cores": os.cpu_count(), "system": f"{platform.system()} {platform.release()}"}
        return all(hardware.get(name, value) == value for name, value in here.items())


class Runs:
    """All runs below some folders, found anew every few seconds."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = [root.resolve() for root in roots]
        self._found: dict[str, Run] = {}
        self._next = float("-inf")

    def all(self) -> list[Run]:
        """Every run there is now, by name."""
        began = time.monotonic()
        if began >= self._next:
            now = [Run(path, name) for path, name in self._search()]
            self._found = {run.id: self._found.get(run.id, run) for run in now}
            ended = time.monotonic()
            self._next = ended + max(LOOK_EVERY, LOOKS_EVERY * (ended - began))
        return sorted(self._found.values(), key=lambda run: run.name)

    def get(self, run_id: str) -> Run | None:
        """The run of that id; None when there is none."""
        self.all()
        return self._found.get(run_id)

    def _search(self) -> list[tuple[Path, str]]:
        found: dict[Path, str] = {}
        for root in self.roots:
            for path in _below(root, DEPTH):
                inside = str(path.relative_to(root)) if path != root else root.name
                found.setdefault(path, inside if len(self.roots) == 1 or path == root else f"{root.name}/{inside}")
                if len(found) >= MOST_RUNS:
                    return list(found.items())
        return list(found.items())


def _below(folder: Path, depth: int) -> Iterator[Path]:
    """Run folders at or below a folder; links are not followed, so no folder is met twice."""
    if _is_run(folder):
        yield folder
        return
    if depth == 0:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) and entry.name not in INSIDE and not entry.name.startswith("."):
            yield from _below(Path(entry.path), depth - 1)


def _is_run(folder: Path) -> bool:
    """Whether a training run lives here: it has a recipe, and rows or room for checkpoints."""
    run = RunFolder(folder)
    return run.exists() and (run.metrics.is_file() or run.checkpoints.is_dir())


def _lock(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _pid(lock: Path) -> int | None:
    file = opened(lock)
    if file is None:
        return None
    with file:
        found = file.read(20).strip()
    return int(found) if found.isdigit() else None


def _held(lock: Path, pid: int | None) -> bool | None:
    """Whether the kernel of this machine lists the lock, by its file or its process; None where it lists none.

    The lock is not tried: a trainer that starts in that moment would be turned away.
    """
    try:
        listed = Path("/proc/locks").read_text(encoding="ascii")
        inode = str(lock.stat().st_ino)
    except (OSError, ValueError):
        return None
    fields = [line.split() for line in listed.splitlines()]
    flocks = [line for line in fields if len(line) > 5 and line[1] == "FLOCK"]
    return any(line[5].rpartition(":")[2] == inode or line[4] == str(pid) for line in flocks)


def _lives(pid: int | None) -> bool:
    if pid is None:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
