"""The cache folder: made whole or not at all, by any number of processes at once."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lmworks.core import files
from lmworks.core.errors import DataError
from lmworks.core.home import home

MANIFEST = "manifest.json"
"""Written last. A folder without it is not complete."""


def cache_folder(setting: str | None) -> Path:
    """The folder of a recipe's `cache` setting; none: lmworks' own."""
    return Path(setting).expanduser() if setting else home()


ELSEWHERE = "set data.cache or LMWORKS_HOME to a folder with room"
"""What a person does who cannot make room where the cache lies."""


@contextmanager
def speaking(folder: Path, elsewhere: str = ELSEWHERE) -> Iterator[None]:
    """Turn an operating system's refusal to write below `folder` into a DataError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in files.FULL:
            raise DataError(
                "the disk is full", where=str(folder), next_step=f"free some space, or {elsewhere}"
            ) from error
        what = f"cannot be written: {error.strerror or error}"
        raise DataError(what, where=str(folder), next_step=f"make it writable, or {elsewhere}") from error


def make_once(
    folder: Path,
    build: Callable[[Path], None],
    *,
    waiting: Callable[[], None] | None = None,
    elsewhere: str = ELSEWHERE,
) -> None:
    """Let `build` fill a temporary folder, make it durable, rename it to `folder`; nothing when it is complete.

    One process builds, others wait for it: the lock is the kernel's, so it goes with a process that is killed. Where
    locks do not hold (some network disks) both build, and one rename wins. `waiting` is called when there is a wait.
    """
    if (folder / MANIFEST).is_file():
        return
    with speaking(folder, elsewhere):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder, waiting, elsewhere):
        if (folder / MANIFEST).is_file():
            return
        for left_over in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a process that was killed: we hold the lock
            shutil.rmtree(left_over, ignore_errors=True)
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        try:
            with speaking(folder, elsewhere):
                temporary.mkdir()
                build(temporary)
                files.sync(temporary)
                _rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _rename(temporary: Path, folder: Path) -> None:
    if folder.exists() and not (folder / MANIFEST).is_file():
        shutil.rmtree(folder)
    try:
        temporary.rename(folder)
    except OSError:
        if not (folder / MANIFEST).is_file():  # another process was first: its bytes are the same
            raise
    files.sync(folder.parent)


@contextmanager
def locked(folder: Path, waiting: Callable[[], None] | None = None, elsewhere: str = ELSEWHERE) -> Iterator[None]:
    """Alone at a folder, which need not be there; who comes second waits, and `waiting` is called."""
    with speaking(folder, elsewhere):
        handle = os.open(folder.with_name(f".{folder.name}.lock"), os.O_CREAT | os.O_RDWR, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
