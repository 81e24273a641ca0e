"""Jobs as one array of a Slurm cluster whose nodes see the folder."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from lmworks.core import files
from lmworks.core.errors import LmworksError, UsageError
from lmworks.core.recipe import PositiveInt
from lmworks.jobs.executor import Executor, Told
from lmworks.jobs.job import JobFolder


@final
@dataclass(frozen=True, kw_only=True)
class Slurm(Executor):
    """A job array: `sbatch --array`, one task a job. The folder must be on a file system that the nodes share."""

    partition: str | None = None
    """Left out: the cluster's default."""
    time: str = "01:00:00"
    """Limit of one job, as Slurm writes it."""
    cpus: PositiveInt = 4
    """Cores of one job."""
    gpus: PositiveInt | None = None
    """GPUs of one job; left out: none."""
    at_once: PositiveInt | None = None
    """How many tasks run at a time; left out: as many as the cluster gives."""
    options: tuple[str, ...] = ()
    """Further lines for #SBATCH, such as '--account=physics'."""

    def start(self, folder: JobFolder, names: Sequence[str], told: Told) -> None:
        """Submit the array, wait until Slurm says that it has ended."""
        if shutil.which("sbatch") is None:
            raise UsageError(
                "there is no `sbatch` on this machine", next_step="executor = 'local', or run on a login node"
            )
        script = self.script(folder, names)
        path = folder.path / "array.sbatch"
        files.write_text(path, script)
        for name in names:
            told(name, "started")
        said = folder.path / "array.log"
        with said.open("wb") as log:
            waiting = subprocess.Popen(["sbatch", "--wait", str(path)], stdout=log, stderr=log)
        left = list(names)
        while waiting.poll() is None:
            left = _tell(folder, left, told)
            time.sleep(0.2)
        _tell(folder, left, told)
        if waiting.returncode != 0 and not any(folder.log(name).exists() for name in names):
            text = said.read_text(encoding="utf-8", errors="replace").strip()
            raise LmworksError(f"sbatch refused the array: {text}", where=str(path))

    def script(self, folder: JobFolder, names: Sequence[str]) -> str:
        """The batch script. Task i runs the i-th job; output goes to the job's own log."""
        limit = f"%{self.at_once}" if self.at_once else ""
        wanted = [
            "--job-name=lmworks",
            f"--array=0-{len(names) - 1}{limit}",
            f"--time={self.time}",
            f"--cpus-per-task={self.cpus}",
            "--output=/dev/null",
            *([f"--partition={self.partition}"] if self.partition else []),
            *([f"--gpus={self.gpus}"] if self.gpus else []),
            *self.options,
        ]
        home = shlex.quote(str(Path(folder.path).resolve()))
        return "\n".join(
            [
                "#!/bin/bash",
                *(f"#SBATCH {option}" for option in wanted),
                f"names=({' '.join(shlex.quote(name) for name in names)})",
                'name="${names[$SLURM_ARRAY_TASK_ID]}"',
                f"export OMP_NUM_THREADS={self.cpus}",
                f'exec {shlex.quote(sys.executable)} -m lmworks.jobs {home} "$name" > {home}/"$name".log 2>&1',
                "",
            ]
        )


def _tell(folder: JobFolder, names: Sequence[str], told: Told) -> list[str]:
    """Tell of jobs that are done; returns the others."""
    left = []
    for name in names:
        if folder.is_done(name):
            told(name, "done")
        else:
            left.append(name)
    return left
