"""What every arm is given, and how every arm is timed. Needs torch and nothing else: LitGPT's environment runs it too.

An arm is a module with `main()`: it reads a job from standard input, trains, and calls `Timeline.mark` at the end of
every iteration of its own loop. The time between two marks is what the benchmark compares: everything that a person who
runs this trainer waits for, not only the products. When the last timed step is done, `mark` writes the result file and
raises `Enough`, which ends the trainer before it saves a checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama-shaped model, in lmworks' names."""

    vocab_size: int
    n_layers: int
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    ffn_size: int
    tied: bool
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of one arm."""

    shape: Shape
    batch: int
    sequence: int
    precision: str
    """fp32 or bf16."""
    warmup: int
    steps: int
    threads: int
    result: str
    """Where the result is written, as JSON."""
    variant: str = ""
    """Which form of the arm: see the arm's own module."""
    seed: int = 0
    lr: float = 3e-4
    weight_decay: float = 0.1
    clip: float = 1.0

    def text(self) -> str:
        """The job as JSON."""
        return json.dumps(dataclasses.asdict(self))


class Enough(Exception):
    """All steps are timed and the result is written."""


def read_job() -> Job:
    """The job on standard input. Sets the number of threads and the seed."""
    table = json.loads(sys.stdin.read())
    job = Job(**{**table, "shape": Shape(**table["shape"])})
    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    return job


def token_rows(job: Job) -> Tensor:
    """(steps, batch, sequence + 1) token ids, the same for every arm: one document per row.

    Ids follow Zipf's law, as words do: frequent ids meet in one row of the embedding's gradient.
    """
    generator = torch.Generator().manual_seed(job.seed)
    shape = (job.warmup + job.steps + 1, job.batch, job.sequence + 1)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    ids = torch.exp(uniform * torch.log(torch.tensor(job.shape.vocab_size, dtype=torch.float64))).long() - 1
    return ids.clamp_(0, job.shape.vocab_size - 1)


class OtherLoad:
    """The share of the machine that others used between `__init__` and `read`: /proc/stat minus this process."""

    def __init__(self) -> None:
        self._busy, self._own, self._wall = _busy_seconds(), own_seconds(), time.monotonic()

    def read(self) -> float:
        """0.0 = nobody else ran, 1.0 = others had all cores."""
        wall = (time.monotonic() - self._wall) * (os.cpu_count() or 1)
        others = (_busy_seconds() - self._busy) - (own_seconds() - self._own)
        return max(0.0, others / wall) if wall > 0 else 0.0


def own_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def _busy_seconds() -> float:
    """CPU seconds that all cores have spent on anything but idling, steal included; 0 where there is no /proc."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, idle, iowait, irq, softirq, steal = (
        int(x) for x in stat.read_text().split("\n")[0].split()[1:9]
    )
    del idle, iowait
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def memory_bytes(which: str) -> int:
    """This process's resident memory: 'VmRSS' now, 'VmHWM' at its peak; 0 where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return next(int(line.split()[1]) * 1024 for line in status.read_text().split("\n") if line.startswith(which + ":"))


class Timeline:
    """The ends of an arm's iterations. The first `warmup` of them are dropped."""

    def __init__(self, job: Job, **facts: Any) -> None:
        self._job = job
        self._facts = facts
        self._ends: list[float] = []
        self._load: OtherLoad | None = None
        self._own = 0.0
        self._loaded_bytes = memory_bytes("VmRSS")

    def mark(self, **facts: Any) -> None:
        """An iteration has ended. Raises Enough after the last timed one; `facts` of that call go into the result."""
        self._ends.append(time.perf_counter())
        done = len(self._ends) - self._job.warmup
        if done == 0:
            self._load, self._own = OtherLoad(), own_seconds()
        if done >= self._job.steps:
            self._write(facts)
            raise Enough

    def _write(self, facts: dict[str, Any]) -> None:
        assert self._load is not None, "a job has warm-up steps"
        ends = self._ends[self._job.warmup - 1 :]
        result = {
            "seconds": [after - before for before, after in pairwise(ends)],
            "cpu_seconds_per_step": (own_seconds() - self._own) / self._job.steps,
            "peak_memory_bytes": memory_bytes("VmHWM"),
            "memory_before_training_bytes": self._loaded_bytes,
            "other_load": self._load.read(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("OMP_", "GOMP_"))},
            **self._facts,
            **facts,
        }
        Path(self._job.result).write_text(json.dumps(result))
