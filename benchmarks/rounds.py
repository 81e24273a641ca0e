"""Runs arms in rounds, A B C A B C, each in a process of its own, when nobody else works on the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from cases import ARMS, CASES, LOAD_LIMIT, PRODUCT, Arm
from peers.job import Job, OtherLoad
from verdicts import Run, step_seconds

from lmworks.cli.app import SPIN

HERE = Path(__file__).resolve().parent
TRIES = 3
"""How often a run is made when others disturb it; the last one is kept and marked."""
QUIET_WAIT_SECONDS = 60.0
"""How long a run waits for the machine to become quiet."""
RUN_LIMIT_SECONDS = 3600.0

Say = Callable[[str], None]


@dataclass(kw_only=True)
class Plan:
    """What to run."""

    cases: Sequence[str]
    precisions: Sequence[str]
    arms: Sequence[str]
    rounds: int
    warmup: int
    steps: int
    threads: int
    allow_load: bool
    pythons: dict[str, str]
    """own and litgpt -> interpreter."""
    environment: dict[str, str] = field(default_factory=dict)
    """Set for every arm alike."""

    def cells(self) -> list[tuple[str, str]]:
        """(case, precision) in order."""
        return [(case, precision) for case in self.cases for precision in self.precisions]

    def arms_of(self, precision: str) -> list[str]:
        """The arms that run in this precision, the matrix product first."""
        return ["product", *(name for name in self.arms if precision in ARMS[name].variants)]


class Clock:
    """How long the rest takes, from how long each kind of run took so far."""

    def __init__(self, keys: Sequence[tuple[str, ...]]) -> None:
        self._waiting = list(keys)
        self._took: dict[tuple[str, ...], list[float]] = {}

    def done(self, key: tuple[str, ...], seconds: float) -> None:
        """A run has ended."""
        self._waiting.remove(key)
        self._took.setdefault(key, []).append(seconds)

    def left(self) -> str:
        """'12:30 left'."""
        overall = mean(s for each in self._took.values() for s in each) if self._took else 0.0
        seconds = round(sum(mean(self._took.get(key, [overall])) for key in self._waiting))
        return f"{seconds // 60}:{seconds % 60:02d} left"


def run_all(plan: Plan, say: Say) -> dict[tuple[str, str], list[Run]]:
    """Every run of the plan, by (case, precision). A run that failed is kept with 'failed' and its last words."""
    todo = [(c, p, a) for c, p in plan.cells() for _ in range(plan.rounds) for a in plan.arms_of(p)]
    clock = Clock(todo)
    found: dict[tuple[str, str], list[Run]] = {cell: [] for cell in plan.cells()}
    for case, precision in plan.cells():
        for turn in range(1, plan.rounds + 1):
            for arm in plan.arms_of(precision):
                begun = time.monotonic()
                run = run_quietly(plan, case, precision, arm, say)
                clock.done((case, precision, arm), time.monotonic() - begun)
                found[case, precision].append({"arm": arm, "round": turn, **run})
                say(f"{case} {precision} round {turn}/{plan.rounds}  {arm:<18} {_words(run, case)}  {clock.left()}")
    return found


def _words(run: Run, case: str) -> str:
    if "failed" in run:
        return f"failed: {run['failed'].splitlines()[-1][:100]}"
    seconds = step_seconds(run)
    load = f"other load {run['other_load']:.0%}"
    if "flops" in run:
        return f"{run['flops'] / seconds / 1e9:8.0f} GFLOP/s  {load}"
    tokens = CASES[case].batch * CASES[case].sequence
    memory = run["peak_memory_bytes"] / 2**30
    return f"{seconds * 1e3:8.1f} ms  {tokens / seconds:8.0f} tok/s  {memory:5.2f} GiB  {load}"


def run_quietly(plan: Plan, case: str, precision: str, arm: str, say: Say) -> dict[str, Any]:
    """One run, repeated while others disturb it; 'disturbed' holds the loads of the runs that were thrown away."""
    thrown: list[float] = []
    while True:
        if not plan.allow_load:
            wait_until_quiet(say)
        run = run_once(plan, case, precision, arm)
        if "failed" in run or plan.allow_load or run["other_load"] <= LOAD_LIMIT or len(thrown) + 1 >= TRIES:
            return {**run, "disturbed": thrown}
        thrown.append(run["other_load"])
        say(f"{case} {precision} {arm}: others used {run['other_load']:.0%} of the machine; once more")


def wait_until_quiet(say: Say) -> None:
    """Wait until others use little of the machine, at most QUIET_WAIT_SECONDS."""
    until = time.monotonic() + QUIET_WAIT_SECONDS
    told = False
    while True:
        load = OtherLoad()
        time.sleep(1.0)
        share = load.read()
        if share <= LOAD_LIMIT or time.monotonic() >= until:
            return
        if not told:
            say(f"others use {share:.0%} of the machine; waiting at most {QUIET_WAIT_SECONDS:.0f} s")
            told = True


def run_once(plan: Plan, case: str, precision: str, arm: str) -> dict[str, Any]:
    """Start the arm's process with its job on standard input and read what it wrote."""
    part = PRODUCT if arm == "product" else ARMS[arm]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        job = Job(
            shape=CASES[case].shape,
            batch=CASES[case].batch,
            sequence=CASES[case].sequence,
            precision=precision,
            warmup=3 if arm == "product" else plan.warmup,
            steps=15 if arm == "product" else plan.steps,
            threads=plan.threads,
            result=str(result),
            variant=part.variants[precision],
        )
        command = [plan.pythons[part.python], "-m", f"peers.{part.module}"]
        try:
            done = subprocess.run(
                command,
                input=job.text(),
                cwd=HERE,
                env=environment_of(part, plan),
                capture_output=True,
                text=True,
                timeout=RUN_LIMIT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"ran longer than {RUN_LIMIT_SECONDS:.0f} s"}
        if not result.is_file():
            return {"failed": (done.stderr or done.stdout).strip()[-2000:] or f"exit {done.returncode}, no result"}
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def environment_of(part: Arm, plan: Plan) -> dict[str, str]:
    """The plan's variables for all; for lmworks also the one that its command sets before torch is loaded."""
    found = {**os.environ, **plan.environment}
    if part.module == "lmworks_train" and "OMP_WAIT_POLICY" not in found:
        found.setdefault("GOMP_SPINCOUNT", SPIN)
    return found


def interpreters(litgpt: Path | None) -> dict[str, str]:
    """This interpreter, and LitGPT's where there is one."""
    found = {"own": sys.executable}
    if litgpt is not None and litgpt.is_file():
        found["litgpt"] = str(litgpt)
    return found
