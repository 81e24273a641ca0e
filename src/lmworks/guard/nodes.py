"""The nodes of a run, and what a driver does to them: start an agent, end it, say that one is bad.

Local ones are processes of this machine, several of which can stand for several nodes. On a Slurm cluster an agent is a
step of the job. Where something else has started the agents (torchrun, or hands), they can only be told to end.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import final

import psutil

from lmworks.core.errors import UsageError
from lmworks.guard.report import Folder, report_at


class Nodes(ABC):
    """Who starts and ends agents."""

    local = False
    """Whether all are on this machine."""

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """All nodes, spares last."""

    @abstractmethod
    def start(self, name: str) -> None:
        """Start an agent, in place of one that may be left there."""

    @abstractmethod
    def end(self, name: str) -> None:
        """End the agent of a node, with all that it started."""

    def evict(self, name: str, why: str) -> None:
        """The node is bad: end its agent, and keep others from it where that can be asked for."""
        self.end(name)


def agent(run: Path, name: str) -> list[str]:
    """The words that start an agent."""
    return [sys.executable, "-m", "lmworks.guard.agent", str(run.resolve()), name]


@final
class Local(Nodes):
    """So many nodes on this machine."""

    local = True

    def __init__(self, run: Path, count: int) -> None:
        self._folder, self._count = Folder(run), count
        self._started: list[subprocess.Popen[bytes]] = []

    def names(self) -> tuple[str, ...]:
        """node-0, node-1, ..."""
        return tuple(f"node-{i}" for i in range(self._count))

    def start(self, name: str) -> None:
        """A process that outlives the driver."""
        self.end(name)
        self._started = [process for process in self._started if process.poll() is None]
        self._folder.logs.mkdir(parents=True, exist_ok=True)
        with (self._folder.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                agent(self._folder.run, name),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._started.append(process)

    def end(self, name: str) -> None:
        """Kill it; its ranks end with it."""
        report = report_at(self._folder.node(name))
        if report is not None and report.host == platform.node() and _is_agent(report.pid, self._folder.run, name):
            with suppress(ProcessLookupError):
                os.kill(report.pid, signal.SIGKILL)


def _is_agent(pid: int, run: Path, name: str) -> bool:
    """Whether the process is this node's agent: its number may be another's by now."""
    try:
        return psutil.Process(pid).cmdline()[-2:] == [str(run.resolve()), name]
    except psutil.Error:
        return False


@final
class Slurm(Nodes):
    """The nodes of this Slurm job: an agent is a step of the job on one of them."""

    def __init__(self, run: Path, count: int | None = None) -> None:
        for program in ("srun", "scancel", "squeue", "scontrol"):
            if shutil.which(program) is None:
                raise UsageError(f"there is no `{program}` on this machine", where="--slurm", next_step="--nodes N")
        if "SLURM_JOB_ID" not in os.environ:
            raise UsageError(
                "this is no Slurm job", where="--slurm", next_step="start it in one: sbatch --nodes 4 --wrap '...'"
            )
        self._count = count
        self._run, self._job = run, os.environ["SLURM_JOB_ID"]
        self._started: list[subprocess.Popen[bytes]] = []

    def names(self) -> tuple[str, ...]:
        """The hosts of the job, or the first `count` of them."""
        said = _answer("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"])
        return tuple(said.split())[: self._count]

    def start(self, name: str) -> None:
        """A step of its own, beside those that run."""
        self.end(name)
        folder = Folder(self._run)
        folder.logs.mkdir(parents=True, exist_ok=True)
        words = ["srun", f"--jobid={self._job}", f"--nodelist={name}", "--nodes=1", "--ntasks=1", "--overlap"]
        words += ["--kill-on-bad-exit=0", f"--job-name=guard-{name}", *agent(self._run, name)]
        with (folder.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        self._started = [*(one for one in self._started if one.poll() is None), process]

    def evict(self, name: str, why: str) -> None:
        """Cancel its step, and ask that nothing is placed there any more, which an operator may forbid."""
        self.end(name)
        drained = ["scontrol", "update", f"NodeName={name}", "State=DRAIN", f"Reason=lmworks: {why}"]
        subprocess.run(drained, check=False, capture_output=True)

    def end(self, name: str) -> None:
        """Cancel its step."""
        for line in _answer("squeue", "--steps", f"--jobs={self._job}", "--noheader", "--format=%i %j").splitlines():
            step, _, title = line.strip().partition(" ")
            if title == f"guard-{name}":
                subprocess.run(["scancel", "--signal=KILL", step], check=False, capture_output=True)


def _answer(*words: str) -> str:
    return subprocess.run(words, check=False, capture_output=True, text=True).stdout


@final
class Given(Nodes):
    """Agents that something else has started, one a process: torchrun, or hands."""

    def __init__(self, names: tuple[str, ...], *, local: bool) -> None:
        self._names, self.local = names, local

    def names(self) -> tuple[str, ...]:
        """As they were given."""
        return self._names

    def start(self, name: str) -> None:
        """Nothing: whoever started the agents starts them."""

    def end(self, name: str) -> None:
        """Nothing: an agent reads in the orders that it is to end."""
