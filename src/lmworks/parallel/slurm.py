"""A run on the nodes of a Slurm cluster: the batch script, as text, and handing it in.

The script starts one torchrun a node through srun. Before the job's time ends Slurm tells the script (SIGUSR1), which
tells the ranks; they save and stop with exit code 3, and the script puts the job back into the queue. What a rank says
when it fails lies in the run folder, which all nodes see, and the script prints the first of it last.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lmworks.core import files
from lmworks.core.errors import LmworksError, UsageError

WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,:@%+/=&-]*")
"""What the name of a partition, an account or an amount may be: nothing that a shell or sbatch would read otherwise."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked of the cluster."""

    run: Path
    """The run folder, on a file system that all nodes share."""
    nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    """Cores of a node, shared by its ranks."""
    time: str = "01:00:00"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    mem: str | None = None
    signal_lead: int = 180
    """Seconds before the end of the job's time at which the ranks save and stop."""
    max_restarts: int = 0
    """How often the ranks of a job are started again after a failure."""
    max_requeues: int = 100

    def __post_init__(self) -> None:
        for name in ("time", "partition", "account", "qos", "mem"):
            value = getattr(self, name)
            if value is not None and not WORD.fullmatch(value):
                raise UsageError(
                    f"{value!r} is no value for it", where=f"--{name}", legal="letters, digits and _.,:@%+/=&-"
                )
        if any(character in str(self.run) for character in "\n\r"):
            raise UsageError("a line break in the name of the run folder", where="--run")
        for name, least in (("nodes", 1), ("ranks_per_node", 1), ("signal_lead", 10), ("max_requeues", 0)):
            if getattr(self, name) < least:
                raise UsageError(
                    f"{getattr(self, name)} is too small", where=f"--{name.replace('_', '-')}", legal=f"{least} or more"
                )

    @property
    def logs(self) -> Path:
        """Where all output goes."""
        return self.run.resolve() / "logs"


def render(job: Job, program: Sequence[str]) -> str:
    """The batch script. `program` is what torchrun starts as each rank, such as -m lmworks train RECIPE --run DIR."""
    values = {
        "python": sys.executable,
        "run": str(job.run.resolve()),
        "logs": str(job.logs),
        "here": str(Path.cwd()),
        "nodes": str(job.nodes),
        "ranks": str(job.ranks_per_node),
        "lead": str(job.signal_lead),
        "max_restarts": str(job.max_restarts),
        "max_requeues": str(job.max_requeues),
    }
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in _options(job)), ""]
    lines += [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    lines += [f"program=({' '.join(shlex.quote(word) for word in program)})", BODY]
    return "\n".join(lines)


def _options(job: Job) -> list[str]:
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", job.run.resolve().name)
    log = str(job.logs / "slurm").replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    given = {
        "gpus-per-node": job.gpus_per_node,
        "cpus-per-task": job.cpus_per_task,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "mem": job.mem,
    }
    return [
        f"--job-name=lmworks-{name}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        f"--time={job.time}",
        *(f"--{option}={value}" for option, value in given.items() if value is not None),
        f"--signal=B:USR1@{job.signal_lead}",
        "--requeue",
        "--open-mode=append",
        f'--output="{log}-%j.log"',
    ]


def submit(script: str, job: Job) -> str:
    """Write the script into the run folder, hand it to sbatch, and return the job's id."""
    if shutil.which("sbatch") is None:
        raise UsageError(
            "there is no `sbatch` on this machine",
            next_step="--dry-run prints the script; hand it in on a login node of the cluster",
        )
    path = job.logs / "job.sbatch"
    try:
        job.logs.mkdir(parents=True, exist_ok=True)
        files.write_text(path, script)
    except OSError as error:
        raise LmworksError(f"cannot write the run folder: {error.strerror}", where=str(job.run)) from error
    done = subprocess.run(["sbatch", "--parsable", str(path)], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise LmworksError(f"sbatch refused the job: {done.stderr.strip()}", where=str(path))
    return done.stdout.strip().partition(";")[0]


BODY = r"""
cd "$here" || exit 1
mkdir -p "$logs"
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\n'*}
port=$((15000 + SLURM_JOB_ID % 15000)) # below the ports that a system gives to anybody
requeues=${SLURM_RESTART_COUNT:-0}
threads=$((${SLURM_CPUS_PER_TASK:-$ranks} / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$lead # seconds in which ranks save after a signal

asked=
step=
# USR1: the time is nearly over, save and go on later. TERM: somebody ends the job, save and do not come back.
trap 'asked=USR1; [ -n "$step" ] && kill -USR1 "$step"' USR1
trap 'asked=TERM; [ -n "$step" ] && kill -TERM "$step"' TERM

restarts=0
while :; do
  export LMWORKS_FAILURES=$logs/job_${SLURM_JOB_ID}_${requeues}_${restarts}
  # Restarts are counted here and not by torchrun, which restarts after a recipe error and after a stop as well.
  srun --nodes="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait="$lead" \
    "$python" -m torch.distributed.run --nnodes="$nodes" --nproc-per-node="$ranks" --max-restarts=0 \
    --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID.$requeues.$restarts" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --log-dir="$LMWORKS_FAILURES" --redirects=3 --tee=0:3 "${program[@]}" &
  step=$!
  wait "$step"
  code=$?
  while kill -0 "$step" 2> /dev/null; do # a signal ends `wait`, not the ranks
    wait "$step"
    code=$?
  done
  step=
  if [ "$code" -ne 0 ]; then
    "$python" -m lmworks.parallel.failure "$LMWORKS_FAILURES" ${asked:+--asked}
    code=$?
  fi
  if [ "$code" -ne 1 ] || [ -n "$asked" ] || [ "$restarts" -ge "$max_restarts" ]; then break; fi
  restarts=$((restarts + 1))
  echo "all ranks start again ($restarts of $max_restarts restarts)" >&2
done

if [ "$code" -eq 3 ] && [ "$asked" != TERM ] && [ ! -e "$run/summary.json" ]; then
  if [ "$requeues" -lt "$max_requeues" ]; then
    echo "back into the queue ($((requeues + 1)) of $max_requeues)" >&2
    scontrol requeue "$SLURM_JOB_ID"
  else
    echo "not done after $max_requeues requeues; the same command goes on" >&2
  fi
fi
exit "$code"
"""
