"""A training run as one of several ranks."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from lmworks.core import recipe as recipes
from lmworks.core.errors import LmworksError
from lmworks.parallel import failure
from lmworks.train import save
from lmworks.train.checkpoints import Checkpoints
from lmworks.train.loop import run
from lmworks.train.objective import CrossEntropy
from tests.train import toy

MODEL = {
    "use": "decoder",
    "n_layers": 4,
    "hidden_size": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "ffn_size": 48,
    "tied": True,
}


def table(text: Path, cache: Path, **over: Any) -> dict[str, Any]:
    """12 steps of 8 rows, a checkpoint every 5; bytes, so a vocabulary of 257."""
    plain = {"batch_size": 8, "precision": "fp32", "model": MODEL, "checkpoints": {"every": 5, "keep": 9}}
    return toy.table(text, cache, **plain | over)


def train(rank: int, spec: dict[str, Any], path: str, resume: str = "auto") -> list[str]:
    """What this rank's reporter was told."""
    report = toy.Silent()
    run(recipes.decode(spec), Path(path), resume=resume, report=report)
    return report.notes


def refused(rank: int, spec: dict[str, Any], path: str) -> str:
    """The error of a run that must not be."""
    try:
        train(rank, spec, path)
    except LmworksError as error:
        return str(error)
    return ""


def poisoned(rank: int, spec: dict[str, Any], path: str, on: int, step: int) -> tuple[str, int]:
    """A run in which one rank's loss is not a number in one step: the error of this rank, and its last row's step."""
    plain = CrossEntropy.loss
    calls = 0

    def loss(self: CrossEntropy, *args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        found = plain(self, *args, **more)
        if rank == on and calls == step:
            found["cross_entropy"].total.data.fill_(float("nan"))
        return found

    CrossEntropy.loss = loss  # type: ignore[method-assign]
    return refused(rank, spec, path), calls


def broken(rank: int, spec: dict[str, Any], path: str, on: int, step: int) -> str:
    """A run in which one rank meets an error of torch in one step: what this rank would tell its launcher."""
    plain = CrossEntropy.loss
    calls = 0

    def loss(self: CrossEntropy, *args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if rank == on and calls == step:
            raise RuntimeError("Timed out waiting 600000ms for recv operation to complete")
        return plain(self, *args, **more)

    CrossEntropy.loss = loss  # type: ignore[method-assign]
    folder = Path(path).with_name("failures")
    os.environ[failure.FOLDER] = str(folder)
    try:
        train(rank, spec, path)
    except RuntimeError:
        return next(found.message for found in failure.everything(folder) if found.rank == rank)
    return ""


def slow_store(rank: int, spec: dict[str, Any], path: str, on: int) -> list[str]:
    """A run in which one rank's store takes no file before the run's last checkpoint is due."""
    ready, begin = threading.Event(), Checkpoints.save

    def waiting(*words: Any, **named: Any) -> None:
        assert rank != on or ready.wait(60)
        save_file(*words, **named)

    def saving(self: Checkpoints, *words: Any, last: bool) -> float:
        if last:
            ready.set()
        return begin(self, *words, last=last)

    save.save_file = waiting
    Checkpoints.save = saving  # type: ignore[method-assign]
    return train(rank, spec, path)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def losses(path: Path, name: str = "loss") -> list[float]:
    return [row[name] for row in rows(path) if name in row]
