"""Jobs as processes of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from lmworks.core.recipe import PositiveInt
from lmworks.jobs.executor import Executor, Told
from lmworks.jobs.job import JobFolder


@final
@dataclass(frozen=True, kw_only=True)
class Local(Executor):
    """Processes of this machine, a share of its cores each. They end when the process that started them does."""

    processes: PositiveInt | None = None
    """How many at a time; left out: one for every core."""

    def start(self, folder: JobFolder, names: Sequence[str], told: Told) -> None:
        """Run the jobs, `processes` at a time; no new one begins after one has failed."""
        width = self.processes or cores()
        waiting, running = list(names), dict[str, subprocess.Popen[bytes]]()
        failed = False
        try:
            while running or (waiting and not failed):
                while waiting and len(running) < width and not failed:
                    name = waiting.pop(0)
                    running[name] = _process(folder, name, threads=max(1, cores() // width))
                    told(name, "started")
                for name, process in list(running.items()):
                    if process.poll() is not None:
                        _close(running.pop(name))
                        failed = failed or process.returncode != 0
                        told(name, "done" if process.returncode == 0 else "failed")
                time.sleep(0.05)
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                _close(process)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _close(process: subprocess.Popen[bytes]) -> None:
    process.wait()
    assert process.stdin is not None, "every child hears by its standard input that we are still there"
    process.stdin.close()


def _process(folder: JobFolder, name: str, *, threads: int) -> subprocess.Popen[bytes]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(threads)), "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", "lmworks.jobs", str(folder.path), name, "--child"]
    with folder.log(name).open("wb") as log:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment)
