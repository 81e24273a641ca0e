"""Jobs as tasks of a Ray cluster, an existing one or one that is started on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from lmworks.core.need import need
from lmworks.core.recipe import NonNegativeFloat, PositiveFloat
from lmworks.jobs.executor import Executor, Told
from lmworks.jobs.job import JobFolder


@final
@dataclass(frozen=True, kw_only=True)
class Ray(Executor):
    """Ray tasks (extra `ray`). The folder must be on a file system that the cluster's machines share."""

    address: str | None = None
    """Of an existing cluster, 'auto' for the one this machine belongs to; left out: one is started here."""
    cpus: PositiveFloat = 1
    """Cores of one job."""
    gpus: NonNegativeFloat = 0
    """GPUs of one job."""

    def start(self, folder: JobFolder, names: Sequence[str], told: Told) -> None:
        """Submit all jobs and wait for them."""
        ray = need("ray", extra="ray", why="executor = 'ray'")
        started = not ray.is_initialized()
        if started:
            ray.init(address=self.address, log_to_driver=False, include_dashboard=False)
        try:
            task = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus)(run_in_process)
            path = str(folder.path.resolve())
            waiting = {task.remote(path, name, max(1, int(self.cpus))): name for name in names}
            for name in names:
                told(name, "started")
            while waiting:
                (first,), _ = ray.wait(list(waiting), num_returns=1)
                told(waiting.pop(first), "done" if ray.get(first) == 0 else "failed")
        finally:
            if started:
                ray.shutdown()


def run_in_process(folder: str, name: str, threads: int) -> int:
    """What a Ray worker does: the same process as everywhere, its output in the job's log; returns the exit code."""
    log = JobFolder(Path(folder)).log(name)
    with log.open("wb") as output:
        command = [sys.executable, "-m", "lmworks.jobs", folder, name]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        return subprocess.run(command, stdout=output, stderr=output, env=environment, check=False).returncode
