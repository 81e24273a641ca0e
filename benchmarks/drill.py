"""Drills: faults in four gloo ranks under a driver; what was seen, named, mended, lost, and equal.

python benchmarks/drill.py                 # about ten minutes on two quiet cores
python benchmarks/drill.py --only hang     # one kind

Twenty faults: a kill and a hang in every phase, a rank that is stuck outside of an exchange, NaN, a damaged checkpoint,
a full disk, the death of the driver. Each run is held, step by step and to the last bit, against one that nobody
disturbed. Slow ranks are drilled apart, on two ranks with a core each: on fewer cores than ranks the system gives a
rank that was stopped its time back.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evidence_file

from lmworks.core import recipe as recipes
from lmworks.guard.drill import SLOW_STEPS, Outcome, Scene, drill, undisturbed
from lmworks.guard.faults import PHASES

STEPS, EVERY, FAULT = 24, 5, 13
SLOW_AT = 10
FAULTS = (
    *(("kill", phase) for phase in PHASES),
    *(("hang", phase) for phase in PHASES),
    ("stuck", "forward"),
    ("stuck", "reduce"),
    ("nan", "backward"),
    ("corrupt", "update"),
    ("diskfull", "save"),
    ("driver", "update"),
)
WORDS = [f"word{i}" for i in range(97)]


def main() -> None:
    """Run all drills, print the table, write the record."""
    options = parsed()
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="lmworks-drill-") as home:
        found = faults(Path(home), [one for one in FAULTS if options.only in (None, one[0])])
        slow = slow_ranks(Path(home), options.slow) if options.only in (None, "slow") else []
    load = os.getloadavg()[0]
    passed = sum(one.passed for one in found)
    named = sum(one.passed for one in slow)
    record: dict[str, Any] = {
        **evidence_file.head("drill"),
        "ranks": {"faults": 4, "slow": 2},
        "steps": STEPS,
        "checkpoint_every": EVERY,
        "seconds": time.time() - began,
        "load_average": load,
        "loaded": load > 6,  # the drills themselves keep four ranks busy
        "drills": [table(one) for one in found],
        "slow": [table(one) for one in slow],
        "bars": {
            "recovered": {"bar": f"{len(found)} of {len(found)}", "found": passed, "holds": passed == len(found)},
            "slow rank named within 30 steps": {
                "bar": "9 of 10",
                "found": f"{named} of {len(slow)}",
                "holds": named >= 0.9 * len(slow),
            },
        },
    }
    print(f"{passed} of {len(found)} recovered, equal, and rightly named; slow rank named in {named} of {len(slow)}")
    print(evidence_file.write(record, options.out))


def parsed() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one kind of fault")
    parser.add_argument("--slow", type=int, default=10, help="slow ranks to find")
    parser.add_argument("--out", type=Path, default=evidence_file.FOLDER)
    return parser.parse_args()


def faults(home: Path, which: Sequence[tuple[str, str]]) -> list[Outcome]:
    """All faults, each on a rank of its own turn."""
    if not which:
        return []
    recipe = written(home, "four", ranks=4, width=64, steps=STEPS)
    scene = Scene(recipe=str(recipe), ranks=4, folder=home / "four-runs", threads=1)
    twin = undisturbed(scene)
    return [
        told(drill(scene, twin, kind=kind, at=at, step=FAULT, rank=number % 4))
        for number, (kind, at) in enumerate(which)
    ]


def slow_ranks(home: Path, count: int) -> list[Outcome]:
    """The same fault again and again, on one rank and the other."""
    steps = SLOW_AT + SLOW_STEPS
    scene = Scene(
        recipe=str(written(home, "two", ranks=2, width=512, steps=steps)), ranks=2, folder=home / "two-0", threads=1
    )
    twin = undisturbed(scene)
    return [
        told(
            drill(
                dataclasses.replace(scene, folder=home / f"two-{number}"),
                twin,
                kind="slow",
                at="forward",
                step=SLOW_AT,
                rank=number % 2,
            )
        )
        for number in range(count)
    ]


def written(home: Path, name: str, *, ranks: int, width: int, steps: int) -> Path:
    """A recipe of data parallel ranks on made-up text."""
    text = home / "text"
    text.mkdir(exist_ok=True)
    for i in range(60):
        words = [WORDS[(i * 31 + j * j) % len(WORDS)] for j in range(400)]
        (text / f"{i:03d}.txt").write_text(" ".join(words), encoding="utf-8")
    made = {
        "do": "train",
        "steps": steps,
        "batch_size": 2 * ranks,
        "precision": "fp32",
        "device": "cpu",
        "threads": 1,
        "model": {"use": "decoder", "n_layers": 4, "hidden_size": width, "n_heads": 4, "ffn_size": 2 * width},
        "data": {
            "readers": [{"use": "text", "paths": [str(text / "*.txt")]}],
            "tokenizer": "bytes",
            "sequence_length": 128,
            "validation": 0.1,
            "cache": str(home / "cache"),
        },
        "optimizer": {"use": "adamw", "lr": 1e-3},
        "layout": {"dp_replicate": ranks},
        "checkpoints": {"every": EVERY, "keep": 3},
        "sinks": [],
    }
    path = home / f"{name}.toml"
    path.write_text(recipes.dump(recipes.decode(made)), encoding="utf-8")
    return path


def told(found: Outcome) -> Outcome:
    """Print a line of the table."""
    seconds = [f"{value:6.1f}" if value is not None else "     -" for value in (found.detected, found.recovered)]
    what = f"{found.fault:8} {found.at:8} rank {found.rank}  {found.kind or 'nothing':8}"
    end = "passed" if found.passed else f"FAILED: exit code {found.code}, differs {found.differs}, {found.said}"
    print(f"{what} seen {seconds[0]} s, next step {seconds[1]} s, {found.lost_steps} steps twice  {end}", flush=True)
    return found


def table(found: Outcome) -> dict[str, Any]:
    """An outcome for the record."""
    facts = dataclasses.asdict(found) | {"passed": found.passed}
    return {name: value for name, value in facts.items() if name != "log"}


if __name__ == "__main__":
    main()
