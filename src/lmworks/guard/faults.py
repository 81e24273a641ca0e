"""Faults that a drill puts into a run: what happens, in which phase of which step, on which rank. Plain data."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from lmworks.core.errors import UsageError, did_you_mean
from lmworks.core.files import write_json

PHASES = {
    "start": "before the model is built",
    "forward": "at the first module of a step's forward pass",
    "backward": "in the first backward pass of a step",
    "reduce": "at the first exchange after a backward pass has begun",
    "update": "between the check for finite numbers and the update",
    "save": "after the first file of a checkpoint is written",
    "load": "while a checkpoint is read, after an earlier kill",
}
IN_A_STEP = ("forward", "backward", "reduce", "update")
KINDS = {
    "kill": "the rank is killed (SIGKILL)",
    "hang": "the rank is stopped (SIGSTOP), and with it its heart-beat",
    "stuck": "the rank waits for ever, and its heart beats on",
    "slow": "the rank is stopped for a third of the time: it takes 1.5 times as long",
    "nan": "the gradient is not a number, once",
    "corrupt": "a byte of the newest checkpoint is changed, and the rank is killed",
    "diskfull": "one file of a checkpoint cannot be written: no space left",
    "driver": "the driver is killed (SIGKILL); the same command is given again",
}
LEGAL = {
    "kill": tuple(PHASES),
    "hang": tuple(PHASES),
    "stuck": tuple(PHASES),
    "driver": tuple(PHASES),
    "corrupt": (*IN_A_STEP, "save"),
    "slow": ("forward",),
    "nan": ("backward",),
    "diskfull": ("save",),
}
"""The phases in which each fault can be; the first is taken where none is said, or 'forward' where that is legal."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault, on one rank."""

    kind: str
    at: str
    step: int
    """It falls into this step, or the first save from this step on."""
    rank: int
    mark: str
    """The file that says that it has happened: it happens once."""
    run: str
    """The run folder."""


def phase_of(kind: str, at: str | None) -> str:
    """The phase of a fault, as asked for or by default. Raises UsageError for one that cannot be."""
    if kind not in KINDS:
        raise UsageError(f"no fault is called '{kind}'{did_you_mean(kind, KINDS)}", legal=", ".join(KINDS))
    legal = LEGAL[kind]
    if at is None:
        return "forward" if "forward" in legal else legal[0]
    if at not in legal:
        raise UsageError(f"'{kind}' cannot be at '{at}'", where="--at", legal=", ".join(legal))
    return at


def planned(fault: Fault) -> list[Fault]:
    """The fault with what must come before it: nothing is read at a start unless something has failed already."""
    if fault.at != "load":
        return [fault]
    return [dataclasses.replace(fault, kind="kill", at="update", mark=f"{fault.mark}.before"), fault]


def write(path: Path, faults: list[Fault]) -> None:
    """Keep them for the rank that they fall on."""
    write_json(path, [dataclasses.asdict(fault) for fault in faults])


def read(path: Path) -> list[Fault]:
    """As they were kept."""
    return [Fault(**table) for table in json.loads(path.read_text(encoding="utf-8"))]
