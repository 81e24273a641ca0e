"""A job: a function by name with JSON arguments, and the folder in which its result is kept.

    FOLDER/NAME.job.json       what is to be called
    FOLDER/NAME.result.json    what it answered, written in one step; a job with a result is not run again
    FOLDER/NAME.log            what it printed

Nothing is pickled: a job runs wherever the folder can be read and lmworks is installed.
"""

from __future__ import annotations

import hashlib
import json
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmworks.core import catalogue, files
from lmworks.core.errors import LmworksError, UsageError


@dataclass(frozen=True, kw_only=True)
class Job:
    """A call that answers with a JSON value."""

    name: str
    """Unique in its folder; a file name."""
    call: str
    """'module:function' below lmworks."""
    arguments: dict[str, Any]
    """Keyword arguments, JSON values."""

    @property
    def key(self) -> str:
        """A hash of call and arguments: a result counts for this very call only."""
        text = json.dumps([self.call, self.arguments], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class JobFolder:
    """Jobs and their results."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, jobs: Sequence[Job]) -> None:
        """Write what is to be called. Raises UsageError for a name that is taken twice or is no file name."""
        names = [job.name for job in jobs]
        for name in names:
            if names.count(name) > 1 or not name or "/" in name or name.startswith("."):
                raise UsageError(f"'{name}' cannot be the name of a job", legal="unique file names")
        self.path.mkdir(parents=True, exist_ok=True)
        for job in jobs:
            files.write_json(self.path / f"{job.name}.job.json", asdict(job))

    def job(self, name: str) -> Job:
        """The job of that name."""
        path = self.path / f"{name}.job.json"
        if not path.is_file():
            raise UsageError(f"no job is called '{name}'", where=str(self.path))
        return Job(**json.loads(path.read_text(encoding="utf-8")))

    def log(self, name: str) -> Path:
        """Where the job's output goes."""
        return self.path / f"{name}.log"

    def result(self, name: str) -> Any:
        """What the job answered. Raises KeyError when it has not, or when the answer is to another call."""
        path = self.path / f"{name}.result.json"
        if not path.is_file():
            raise KeyError(name)
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["key"] != self.job(name).key:
            raise KeyError(name)
        return found["value"]

    def is_done(self, name: str) -> bool:
        """Whether there is an answer to this call."""
        try:
            self.result(name)
        except KeyError:
            return False
        return True

    def run(self, name: str) -> Any:
        """Make the call in this process and keep its answer."""
        job = self.job(name)
        value = catalogue.resolve(job.call)(**job.arguments)
        files.write_json(self.path / f"{name}.result.json", {"key": job.key, "value": value})
        return value

    def why_failed(self, name: str) -> str:
        """The last lines of a job's log."""
        path = self.log(name)
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        return "\n".join(lines[-12:]) or "it left no output"


def execute(folder: JobFolder, name: str) -> int:
    """Run one job for a process whose output is its log; returns the exit code."""
    try:
        folder.run(name)
    except LmworksError as error:
        print(f"lmworks: {error}", flush=True)  # noqa: T201  (the log of the job)
        return error.exit_code
    except Exception:  # noqa: BLE001  (whatever it is, it belongs in the job's log)
        print(traceback.format_exc(), flush=True)  # noqa: T201
        return 1
    return 0
