"""What a rank says when it ends with an error, so that the first error of a run can be told last.

Each rank writes one small JSON file into the folder that LMWORKS_FAILURES names; the launcher, or the batch script,
reads them all and takes the earliest. A rank that torchrun started fills torchrun's own error file as well, so a person
who starts torchrun alone sees the same text as the root cause.

    python -m lmworks.parallel.failure FOLDER [--asked]

prints the first error and ends with that rank's exit code. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from lmworks.core import files
from lmworks.core.errors import LmworksError, NonFinite

FOLDER = "LMWORKS_FAILURES"
"""The environment variable that names the folder of the files."""
TORCHRUN = "TORCHELASTIC_ERROR_FILE"
"""The environment variable by which torchrun gives each rank a file for its error."""
STOPPED = 3
"""Exit code of a run that saved itself and can be resumed."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """How one rank ended."""

    rank: int
    world: int
    time: float
    """When, in seconds since 1970."""
    exit_code: int
    message: str
    """What a person reads: what, where, next step."""
    step: int | None = None
    kind: str = ""
    """The error's class."""
    trace: str = ""

    def error(self, log: Path | None = None) -> LmworksError:
        """The error that tells of it, with the rank's exit code. A loss that explodes stays one."""
        at = f" at step {self.step}" if self.step is not None else ""
        how = "stopped" if self.exit_code == STOPPED else "failed"
        text = f"rank {self.rank} of {self.world} {how}{at}: {self.message}"
        if log is not None and "next:" not in self.message:
            text += f"\n  next:  its output is in {log}"
        error = NonFinite(text) if self.kind == NonFinite.__name__ else LmworksError(text)
        error.exit_code = self.exit_code
        return error


def write(error: BaseException, *, step: int | None = None) -> bool:
    """Keep how this rank ends, where a launcher asked for it; whether one did, and will tell it.

    Called inside the `except` of the outermost frame that knows the step; a later call in the same process changes
    nothing, so the command line can call it again for errors from outside the loop. Never raises for a disk that is
    full: the error itself is the one to tell.
    """
    folder, torchrun = os.environ.get(FOLDER), os.environ.get(TORCHRUN)
    failure = _failure_of(error, step)
    told = False
    try:
        if folder is not None:
            path = file_of(Path(folder), failure.rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                files.write_json(path, dataclasses.asdict(failure))
            told = True
        if torchrun is not None and not Path(torchrun).exists():
            files.write_json(Path(torchrun), _for_torchrun(failure))
    except OSError:
        return told
    return told


def _failure_of(error: BaseException, step: int | None) -> Failure:
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    ours = isinstance(error, LmworksError)
    code = error.exit_code if isinstance(error, LmworksError) else 130 if isinstance(error, KeyboardInterrupt) else 1
    message = "\n  ".join(
        [str(error) if ours else f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]
    )
    trace = "".join(traceback.format_exception(error))
    return Failure(
        rank=rank,
        world=world,
        time=time.time(),
        exit_code=code,
        message=message,
        step=step,
        kind=type(error).__name__,
        trace=trace,
    )


def _for_torchrun(failure: Failure) -> dict[str, object]:
    """The form that torchelastic reads."""
    text = str(failure.error())
    where = {"py_callstack": f"{text}\n{failure.trace}", "timestamp": str(int(failure.time))}
    return {"message": {"message": text, "extraInfo": where}}


def file_of(folder: Path, rank: int) -> Path:
    """Where a rank's error lies."""
    return folder / f"rank_{rank}.error.json"


def everything(folder: Path) -> list[Failure]:
    """All errors in a folder, earliest first."""
    found = [
        Failure(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("rank_*.error.json"))
    ]
    return sorted(found, key=lambda failure: (failure.time, failure.rank))


def first(folder: Path) -> Failure | None:
    """The error of the rank that failed first in time, None where no rank wrote one.

    A stop counts only when nothing failed: a rank that saved and stopped is no cause of another's error.
    """
    found = everything(folder)
    failed = [failure for failure in found if failure.exit_code != STOPPED]
    return next(iter(failed or found), None)


def main(words: list[str]) -> int:
    """Print the first error in a folder; its exit code. Without one: 3 when the ranks were asked to stop, else 1."""
    folder, asked = Path(words[0]), "--asked" in words[1:]
    found = first(folder)
    if found is None:
        text = "the ranks were asked to stop before they could save" if asked else "no rank left an error; see the logs"
        sys.stderr.write(f"lmworks: {text}\n")
        return STOPPED if asked else 1
    sys.stderr.write(f"lmworks: {found.error()}\n")
    return found.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
