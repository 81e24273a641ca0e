"""Where agents run: processes of this machine, and Slurm steps, by stand-ins that keep what they were called with."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmworks.core.errors import UsageError
from lmworks.guard.nodes import Given, Local, Slurm, agent
from lmworks.guard.report import Folder, Report

SAYS = '#!/bin/bash\nprintf "%q " "$(basename "$0")" "$@" >> "$SAID"; echo >> "$SAID"\n'
SQUEUE = SAYS + 'echo "4711.3 guard-n2"; echo "4711.4 guard-n20"; echo "4711.0 batch"\n'
SCONTROL = SAYS + 'if [ "$1" = show ]; then echo n1; echo n2; echo n3; fi\n'


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's programs on PATH, in a job of three nodes; the file has what they were called with."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SAYS), ("scancel", SAYS), ("squeue", SQUEUE), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SAID", str(tmp_path / "said"))
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-3]")
    return tmp_path / "said"


def calls(said: Path, program: str) -> list[list[str]]:
    words = [shlex.split(line) for line in said.read_text().splitlines()]
    return [call[1:] for call in words if call[0] == program]


def test_a_slurm_job_has_its_hosts(said: Path, tmp_path: Path) -> None:
    assert Slurm(tmp_path / "run").names() == ("n1", "n2", "n3")
    assert Slurm(tmp_path / "run", 2).names() == ("n1", "n2")
    assert calls(said, "scontrol")[0] == ["show", "hostnames", "n[1-3]"]


def test_an_agent_is_a_step_on_its_node_in_place_of_an_earlier_one(said: Path, tmp_path: Path) -> None:
    nodes = Slurm(tmp_path / "my run")
    nodes.start("n2")
    assert nodes._started[0].wait(timeout=10) == 0
    assert calls(said, "scancel") == [["--signal=KILL", "4711.3"]], "that step and no other"
    (srun,) = calls(said, "srun")
    assert srun[:6] == ["--jobid=4711", "--nodelist=n2", "--nodes=1", "--ntasks=1", "--overlap", "--kill-on-bad-exit=0"]
    assert srun[6] == "--job-name=guard-n2"
    assert srun[7:] == [sys.executable, "-m", "lmworks.guard.agent", str((tmp_path / "my run").resolve()), "n2"]


def test_an_evicted_node_is_cancelled_and_drained(said: Path, tmp_path: Path) -> None:
    Slurm(tmp_path / "run").evict("n2", "memory: other bits")
    assert calls(said, "scancel") == [["--signal=KILL", "4711.3"]]
    assert calls(said, "scontrol") == [["update", "NodeName=n2", "State=DRAIN", "Reason=lmworks: memory: other bits"]]


def test_without_slurm_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="srun"):
        Slurm(tmp_path / "run")


def test_outside_a_job_it_is_said(said: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID")
    with pytest.raises(UsageError, match="no Slurm job"):
        Slurm(tmp_path / "run")


def test_given_nodes_are_left_alone() -> None:
    nodes = Given(("a", "b"), local=True)
    nodes.start("a")
    nodes.end("a")
    assert nodes.names() == ("a", "b")


def test_a_local_agent_is_killed_and_nobody_else(tmp_path: Path) -> None:
    """The report names a process: it is ended when it is that node's agent, and not when the number is another's."""
    nodes = Local(tmp_path, 2)
    words = agent(tmp_path, "node-1")[3:]
    mine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", *words])
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Folder(tmp_path).nodes.mkdir(parents=True)
    try:
        _reports(tmp_path, other.pid)
        nodes.end("node-1")
        time.sleep(0.1)
        assert other.poll() is None
        _reports(tmp_path, mine.pid)
        nodes.end("node-1")
        assert mine.wait(timeout=10) == -9
    finally:
        for process in (mine, other):
            process.kill()
            process.wait()


def _reports(run: Path, pid: int) -> None:
    Report(node="node-1", pid=pid, host=os.uname().nodename, count=1).write(Folder(run).node("node-1"))
