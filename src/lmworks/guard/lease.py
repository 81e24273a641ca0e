"""One driver at a time: a lease in the run folder, renewed while its holder lives.

A driver that finds another one's lease renewed does not begin. One whose holder is gone, or has not renewed it for a
while by the finder's own clock, is taken over; a holder that wakes up late finds out and ends.
"""

from __future__ import annotations

import os
import platform
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil

from lmworks.core.errors import LmworksError
from lmworks.guard.report import table_at, write

RENEW = 1.0
"""Seconds between two renewals."""
LAPSE = 10.0
"""Seconds without one after which another driver may take it."""


class Lease:
    """The lease of one run, for one driver."""

    def __init__(self, path: Path, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._path, self._sleep = path, sleep
        self._id = uuid.uuid4().hex
        self._count = 0
        self._renewed = float("-inf")

    def take(self) -> bool:
        """Take it; whether another driver held it before and is gone. Raises LmworksError while one lives."""
        before = table_at(self._path)
        if before is not None and _lives(before) is not False:
            start = time.monotonic()
            while time.monotonic() - start < LAPSE:
                self._sleep(RENEW / 2)
                now = table_at(self._path)
                if now is not None and now["count"] != before["count"]:
                    raise LmworksError(
                        f"another driver watches over this run (pid {now['pid']} on {now['host']})",
                        where=str(self._path),
                        next_step="look at it there, or give another folder: --run DIR",
                    )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._count = int(before["count"]) if before is not None else 0
        self._write()
        return before is not None

    def renew(self) -> None:
        """Renew it now and then. Raises LmworksError when another driver has taken it."""
        if time.monotonic() - self._renewed < RENEW:
            return
        now = table_at(self._path)
        if now is not None and now["id"] != self._id:
            raise LmworksError(
                f"another driver has taken over (pid {now['pid']} on {now['host']})", where=str(self._path)
            )
        self._write()

    def give_back(self) -> None:
        """The run is over."""
        self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        self._count += 1
        self._renewed = time.monotonic()
        process = psutil.Process()
        held = {"id": self._id, "pid": os.getpid(), "host": platform.node(), "count": self._count}
        write(self._path, held | {"born": process.create_time()})


def _lives(held: dict[str, object]) -> bool | None:
    """Whether the holder is there; None where that cannot be seen from here."""
    if held["host"] != platform.node():
        return None
    pid = held["pid"]
    assert isinstance(pid, int)
    try:
        return bool(psutil.Process(pid).create_time() == held["born"])
    except psutil.NoSuchProcess:
        return False
