"""A drill: a recipe is run twice under a driver, once in peace and once with a fault, and the two are compared.

Nothing of it is simulated: rank processes, agents and drivers are those of a real run.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmworks.core.errors import LmworksError
from lmworks.core.files import write_json
from lmworks.core.journal import rows
from lmworks.core.run import RunFolder
from lmworks.guard import faults
from lmworks.guard.diagnose import Rules
from lmworks.guard.faults import Fault
from lmworks.guard.nodes import Local, Nodes
from lmworks.guard.report import Folder, Plan, table_at

RULES = Rules(missed=5.0, still=5.0, begins=120.0, grace=30.0)
"""Sooner than in a real run: a drill is short, and its steps are."""
POLL = 0.05
COMPARED = ("loss", "grad_norm", "val_loss")
"""Of each step, to the last bit."""
SLOW_STEPS = 30
"""In which a slow rank is to be named."""

KINDS = {"attach": "driver", "checkpoint failed": "unsaved"}
"""What an event that is no incident tells of."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is drilled."""

    recipe: str
    """The recipe's name or path, as `lmworks train` takes it."""
    sets: tuple[str, ...] = ()
    ranks: int
    nodes: int = 1
    folder: Path
    """Gets a folder for each run."""
    threads: int | None = None
    rules: Rules = RULES
    minutes: float = 30.0
    """Longest time of a run."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a fault. Times in seconds, by the clock of this machine."""

    fault: str
    at: str
    step: int
    """In which it happened."""
    rank: int
    kind: str | None
    """What the driver took it for; None where it saw nothing."""
    said: str
    """Its words."""
    named: bool | None
    """Whether it named the rank that the fault was in; None where a fault is nobody's."""
    detected: float | None
    """Until the driver saw it, or the next driver was there."""
    detected_steps: int
    """Steps that were done from the fault until then."""
    recovered: float | None
    """From then until a new step was done."""
    caught_up: float | None
    """From then until the step of the fault was done."""
    lost_steps: int
    """Done twice."""
    attempts: int
    code: int
    """The exit code of the driver."""
    differs: int | None
    """The first step that is not to the last bit that of the undisturbed run."""
    log: str

    @property
    def passed(self) -> bool:
        """Whether the fault was seen (a slow rank soon), the run came to its end, and it is the undisturbed one."""
        seen = self.detected is not None and (self.fault != "slow" or self.detected_steps <= SLOW_STEPS)
        return seen and self.code == 0 and self.differs is None and self.named is not False


def undisturbed(scene: Scene) -> Path:
    """The run without a fault. Raises LmworksError when it fails by itself."""
    run = scene.folder / "undisturbed"
    code, _ = _driven(scene, run, ("-m", "lmworks"), lambda: None)
    if code != 0:
        raise LmworksError(
            "the run fails without any fault", where=str(_log(run)), next_step="mend it first: lmworks train"
        )
    return run


def drill(scene: Scene, twin: Path, *, kind: str, at: str, step: int, rank: int) -> Outcome:
    """Run with a fault, beside the run `twin` that had none."""
    run = scene.folder / f"{kind}-{at}"
    path = scene.folder / f"{kind}-{at}.faults.json"
    mark = scene.folder / f"{kind}-{at}.happened.json"
    scene.folder.mkdir(parents=True, exist_ok=True)
    fault = Fault(kind=kind, at=at, step=step, rank=rank, mark=str(mark), run=str(run))
    faults.write(path, faults.planned(fault))
    times: list[float] = []
    code, _ = _driven(
        scene, run, ("-m", "lmworks.guard.faulty", str(path.resolve())), lambda: times.append(time.time())
    )
    happened = table_at(mark)
    if happened is None:
        raise LmworksError(
            f"the fault did not happen: no {at} of step {step} on rank {rank}",
            where=str(_log(run)),
            next_step="another --step, --rank or --at; or the layout has no such phase",
        )
    return _outcome(fault, happened, code, run, twin)


def _driven(scene: Scene, run: Path, start: tuple[str, ...], again: Callable[[], None]) -> tuple[int, int]:
    """A run under a driver, which is started again when it is killed, as a person would: exit code, and how often."""
    sets = [word for value in scene.sets for word in ("--set", value)]
    program = (*start, "train", scene.recipe, "--run", str(run), *sets)
    each = scene.ranks // scene.nodes
    plan = Plan(program=program, ranks_per_node=each, local=True, threads=scene.threads, grace=scene.rules.grace)
    table = {"run": str(run), "nodes": scene.nodes, "plan": dataclasses.asdict(plan)}
    path = scene.folder / f"{run.name}.driving.json"
    scene.folder.mkdir(parents=True, exist_ok=True)
    write_json(path, table | {"rules": dataclasses.asdict(scene.rules)})
    until = time.monotonic() + 60 * scene.minutes
    count = 0
    while True:
        with _log(run).open("ab") as log:
            words = [sys.executable, "-m", "lmworks.guard.driven", str(path)]
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
            _wait(process, until, run, Local(run, scene.nodes))
        if process.returncode != -signal.SIGKILL:
            return process.returncode, count
        count += 1
        again()


def _wait(process: subprocess.Popen[bytes], until: float, run: Path, nodes: Nodes) -> None:
    """Until the driver has ended. Whatever happens here, it stops the run, and leaves nobody."""
    try:
        while process.poll() is None:
            if time.monotonic() > until:
                raise LmworksError("the run does not come to its end", where=str(_log(run)))
            time.sleep(POLL)
    finally:
        killed = process.returncode == -signal.SIGKILL
        for _ in range(2):  # the second one ends all at once
            if process.poll() is None:
                os.kill(process.pid, signal.SIGTERM)
                time.sleep(0.5)
        process.wait()
        if not killed:  # otherwise another driver goes on with them
            for name in nodes.names():
                nodes.end(name)


def _log(run: Path) -> Path:
    """What the driver said."""
    return run.with_name(f"{run.name}.log")


def _outcome(fault: Fault, happened: dict[str, Any], code: int, run: Path, twin: Path) -> Outcome:
    when, at_step = float(happened["time"]), int(happened["step"])
    said = [row for row in rows(Folder(run).events) if row["start"] >= when]
    seen = next((row for row in said if row["name"] in ("incident", "attach")), None)
    borne = seen is None and fault.kind == "diskfull"
    if borne:  # the run itself tells of it, and goes on
        own = (row for row in rows(RunFolder(run).events) if row["name"] == "checkpoint failed")
        seen = next((row for row in own if row["start"] >= when), None)
    attempts = sum(row["name"] == "attempt" for row in rows(Folder(run).events))
    steps = [row for row in rows(RunFolder(run).events) if row["name"] == "step"]
    seen_at = None if seen is None else float(seen["start"])
    after = [row for row in steps if seen_at is not None and row["end"] > seen_at]
    before = max((row["step"] for row in steps if seen_at is not None and row["end"] <= seen_at), default=0)
    restarts = fault.kind not in ("slow", "driver") and not borne
    lost = max(before, at_step - 1) - after[0]["step"] + 1 if after and restarts else 0
    reached = next((row for row in after if row["step"] >= max(at_step, before)), None)
    facts = {} if seen is None else seen["attrs"]
    nobodys = fault.kind in ("nan", "diskfull", "driver")
    return Outcome(
        fault=fault.kind,
        at=fault.at,
        step=at_step,
        rank=fault.rank,
        kind=None if seen is None else KINDS.get(seen["name"]) or str(facts.get("kind")),
        said=next(iter(str(facts.get("text") or facts.get("reason") or "").splitlines()), ""),
        named=None if nobodys else facts.get("rank") == fault.rank,
        detected=None if seen_at is None else seen_at - when,
        detected_steps=max(0, before - at_step + 1),
        recovered=after[0]["end"] - seen_at if after and seen_at is not None else None,
        caught_up=reached["end"] - seen_at if reached is not None and seen_at is not None else None,
        lost_steps=max(0, lost),
        attempts=attempts,
        code=code,
        differs=differs(RunFolder(run), RunFolder(twin)),
        log=str(_log(run)),
    )


def differs(run: RunFolder, twin: RunFolder) -> int | None:
    """The first step at which two runs are not the same to the last bit; None where there is none."""
    ours, theirs = (dict(_learned(folder)) for folder in (run, twin))
    return min((step for step in ours.keys() | theirs.keys() if ours.get(step) != theirs.get(step)), default=None)


def _learned(folder: RunFolder) -> Iterator[tuple[int, dict[str, Any]]]:
    found: dict[int, dict[str, Any]] = {}
    for row in rows(folder.metrics):
        found.setdefault(row["step"], {}).update({name: row[name] for name in COMPARED if name in row})
    yield from found.items()
