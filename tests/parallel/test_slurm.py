"""The batch script: its text, and what it does when stand-ins for Slurm's programs run it on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmworks.core.errors import LmworksError, UsageError
from lmworks.parallel.slurm import Job, render, submit

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do [[ $1 == --nodes=* ]] && nodes=${1#--nodes=}; shift; done
pids=()
trap 'kill -USR1 "${pids[@]}"' USR1
trap 'kill -TERM "${pids[@]}"' TERM
for ((i = 0; i < nodes; i++)); do "$@" & pids+=($!); done
code=0
for pid in "${pids[@]}"; do
  wait "$pid"; c=$?
  while kill -0 "$pid" 2> /dev/null; do wait "$pid"; c=$?; done
  ((c > code)) && code=$c
done
exit $code
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then for ((i = 0; i < NODES; i++)); do echo localhost; done; else echo "$@" >> "$SAID"; fi
"""
SBATCH = """#!/bin/bash
bash -n "${@: -1}" && echo "4711;cluster"
"""
HEAD = """
import os, sys, time
from pathlib import Path
from lmworks.core.errors import LmworksError, Stopped
from lmworks.parallel import failure
from lmworks.train.stop import StopRequest
here, rank, world = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
"""
SAVES = """
with StopRequest() as stop:
    (here / f"ready_{rank}").touch()
    while stop.reason() is None:
        time.sleep(0.01)
    (here / f"saved_{rank}").touch()
    failure.write(Stopped(f"stopped: {stop.reason()}"), step=4)
    sys.exit(3)
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for Slurm's programs on PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sbatch", SBATCH)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SAID", str(tmp_path / "said"))
    return tmp_path


def begin(folder: Path, job: Job, body: str) -> subprocess.Popen[str]:
    """The batch script of a job, as Slurm would start it."""
    (folder / "program.py").write_text(HEAD + body)
    (folder / "job.sh").write_text(render(job, [str(folder / "program.py"), str(folder)]))
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "n[1-2]", "NODES": str(job.nodes)}
    return subprocess.Popen(
        ["bash", str(folder / "job.sh")],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | slurm,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "ranks"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_told_that_its_time_ends_a_job_saves_and_goes_back_into_the_queue(
    cluster: Path, nodes: int, ranks: int, number: signal.Signals
) -> None:
    process = begin(cluster, Job(run=cluster / "run", nodes=nodes, ranks_per_node=ranks, signal_lead=20), SAVES)
    while not all((cluster / f"ready_{rank}").exists() for rank in (0, 1)):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 3, said
    assert all((cluster / f"saved_{rank}").exists() for rank in (0, 1))
    assert "stopped at step 4" in said
    asked_back = (cluster / "said").exists() and (cluster / "said").read_text().startswith("requeue ")
    assert asked_back == (number == signal.SIGUSR1)  # whoever ends a job does not want it back


@pytest.mark.slow
def test_a_job_restarts_its_ranks_and_tells_the_first_error(cluster: Path) -> None:
    body = "if rank == 1:\n    failure.write(LmworksError('disk full'), step=9)\n    sys.exit(1)\ntime.sleep(600)\n"
    process = begin(cluster, Job(run=cluster / "run", ranks_per_node=2, max_restarts=1), body)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "all ranks start again (1 of 1 restarts)" in said
    assert said.endswith("lmworks: rank 1 of 2 failed at step 9: disk full\n")
    assert not (cluster / "said").exists()


def test_the_script_asks_for_what_was_given(tmp_path: Path) -> None:
    job = Job(
        run=tmp_path / "my run", nodes=2, ranks_per_node=8, gpus_per_node=8, partition="a100", mem="0", time="2-0"
    )
    script = render(job, ["-m", "lmworks", "train", "x; rm -rf $HOME", "--set", "a='b'"])
    lines = script.splitlines()
    assert lines[:11] == [
        "#!/bin/bash",
        "#SBATCH --job-name=lmworks-my-run",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --time=2-0",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --partition=a100",
        "#SBATCH --mem=0",
        "#SBATCH --signal=B:USR1@180",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
    ]
    assert lines[11] == f'#SBATCH --output="{tmp_path}/my run/logs/slurm-%j.log"'
    assert f"python={sys.executable}" in lines
    assert """program=(-m lmworks train 'x; rm -rf $HOME' --set 'a='"'"'b'"'"'')""" in lines
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


@pytest.mark.parametrize("value", ["a b", "x\n#SBATCH --uid=0", "$(id)", "", "-x"])
def test_what_a_shell_would_read_otherwise_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(UsageError, match="--partition"):
        Job(run=tmp_path, partition=value)


def test_submit_says_the_number_of_the_job(cluster: Path) -> None:
    job = Job(run=cluster / "run")
    assert submit(render(job, ["x.py"]), job) == "4711"
    assert (cluster / "run" / "logs" / "job.sbatch").read_text().startswith("#!/bin/bash")


def test_what_sbatch_refuses_is_told(cluster: Path) -> None:
    (cluster / "bin" / "sbatch").write_text("#!/bin/bash\necho 'invalid partition' >&2; exit 1\n")
    with pytest.raises(LmworksError, match="invalid partition"):
        submit("", Job(run=cluster / "run"))


def test_without_sbatch_the_next_step_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="--dry-run"):
        submit("", Job(run=tmp_path))
