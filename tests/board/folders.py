"""Run folders as the trainer leaves them, in every state that the board tells apart."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from lmworks.core.events import Events
from lmworks.core.journal import Journal

BEGAN = 1_795_900_000.0
"""When the runs of tests began, in seconds since the epoch."""


def recipe(**changes: Any) -> dict[str, Any]:
    """A resolved training recipe, as far as the board reads it."""
    optimizer = {"use": "adamw", "lr": 1e-3}
    return {"do": "train", "steps": 200, "batch_size": 8, "seed": 1, "optimizer": optimizer, **changes}


def rows(steps: int, *, height: float = 3.0) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl: a loss that falls, a validation every fifty steps, energy."""
    found: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        found.append(
            {
                "step": step,
                "tokens": 1000 * step,
                "loss": height * (1 + math.exp(-step / 40) + 0.03 * math.sin(7 * step)),
                "grad_norm": 1 + 1 / step,
                "lr": 1e-3 * min(1, step / 20),
                "seconds": 0.1,
                "flops": 1e9 * step,
                "tokens_per_second": 10_000 + 300 * math.sin(step),
                "mfu": 0.31,
                "memory_bytes": 3 << 28,
                "joules_modelled": 2.0,
                "kwh": 2.0 * step / 3.6e6,
            }
        )
        if step % 50 == 0:
            found.append({"step": step, "tokens": 1000 * step, "val_loss": height * (1.05 + math.exp(-step / 40))})
    return found


def events(path: Path, steps: Sequence[int], *, rank: int = 0, began: float = BEGAN, slow: float = 1.0) -> Events:
    """Events of one attempt: a start, its steps of a tenth of a second, a save at its end."""
    found = Events(path, run="toy", rank=rank)
    found.step = steps[0] - 1
    found.write("start", start=began, end=began, resumed_from=f"step-{steps[0] - 1}" if steps[0] > 1 else None)
    at = began + 1.0
    for step in steps:
        found.step = step
        found.write("step", start=at, end=at + 0.1 * slow)
        at += 0.1 * slow
    sizes = {"weights": 40_000_000, "gradients": 40_000_000, "optimizer": 80_000_000, "saved": 120_000_000}
    found.write("memory", start=at, end=at, predicted=sizes, measured={k: round(1.07 * v) for k, v in sizes.items()})
    found.write("save", start=at, end=at + 0.5)
    found.flush()
    return found


def make(folder: Path, *, steps: int = 200, done: bool = True, height: float = 3.0, **changes: Any) -> Path:
    """A run folder with a recipe, a record, rows, events and texts."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe(**changes)))
    hardware = {
        "processor": "a test's",
        "cores": os.cpu_count(),
        "memory_bytes": 1 << 34,
        "system": f"{platform.system()} {platform.release()}",
    }
    attempt = {"began": "2026-11-28T20:21:55+0000", "step": 0, "hardware": hardware}
    record = {
        "id": "a" * 32,
        "code": {"version": "0.1.0", "commit": "0123456789abcdef", "dirty": False},
        "versions": {"python": "3.12.1", "torch": "2.13.0"},
        "hardware": hardware,
        "parameters": 10_000_000,
        "command": ["lmworks", "train", "toy"],
        "data": {"sources": {"notes": {"weight": 1.0, "documents": {"kept": 10, "dropped": {"empty": 2}}}}},
        "attempts": [attempt],
    }
    (folder / "record.json").write_text(json.dumps(record))
    append(folder / "metrics.jsonl", rows(steps, height=height))
    append(folder / "samples.jsonl", [{"step": steps, "prompt": "def read_", "text": "file(path):\n    return path"}])
    events(folder / "events.jsonl", range(1, steps + 1))
    if done:
        facts = {"steps": steps, "wall_seconds": 25.0, "peak_memory_bytes": 1 << 30, "stopped": None}
        (folder / "summary.json").write_text(json.dumps(facts))
    return folder


def append(path: Path, given: Sequence[dict[str, Any]]) -> None:
    """Write rows as the trainer does."""
    journal = Journal(path)
    for row in given:
        journal.append(row)
    journal.flush()


def lock(folder: Path, pid: int) -> Path:
    """The lock that a trainer holds beside its folder, as a killed one leaves it."""
    path = folder.with_name(f".{folder.name}.lock")
    path.write_text(str(pid))
    return path


def silent(folder: Path, seconds: float) -> None:
    """Let the last row and event be of `seconds` ago."""
    then = time.time() - seconds
    for name in ("metrics.jsonl", "events.jsonl"):
        os.utime(folder / name, (then, then))
