"""Small corpora and runs for the tests of `lmworks data`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmworks.core import recipe as recipes
from lmworks.data.record import Dropped, Record, Text
from lmworks.data.stage import Context, Stage, guarded
from lmworks.make import account, rounds

WORDS = ("the", "of", "and", "to", "in", "is", "water", "boils", "planet", "people", "house", "river", "stone", "time")


class Quiet:
    """Keeps what was told of rounds."""

    def __init__(self) -> None:
        self.rounds: list[tuple[str, int]] = []

    def stage(self, name: str, jobs: int) -> None:
        self.rounds.append((name, jobs))

    def job(self, name: str, event: str) -> None:
        pass

    @property
    def made(self) -> dict[str, int]:
        """Rounds that had something to do."""
        return {name: jobs for name, jobs in self.rounds if jobs}


def texts(count: int, *, seed: int = 0, words: int = 40) -> list[str]:
    """Texts of random words, some of them copies and near copies of earlier ones."""
    rng = np.random.default_rng(seed)
    made: list[str] = []
    for i in range(count):
        if i % 7 == 3:
            made.append(made[int(rng.integers(len(made)))])
        elif i % 7 == 5:
            made.append(made[int(rng.integers(len(made)))] + " indeed.")
        else:
            made.append(" ".join(rng.choice(WORDS, size=words)) + f" {int(rng.integers(10**9))}.")
    return made


def write_jsonl(path: Path, found: Iterable[str], **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, **more}) + "\n" for text in found))
    return path


def records(found: Iterable[str], *, source: str = "toy") -> list[Record]:
    return [Record(id=f"{i}", content=(Text(text),), source=source) for i, text in enumerate(found)]


def answers(stage: Stage, found: Sequence[str], **context: Any) -> list[Record | Dropped]:
    """What a stage answers to texts."""
    return [answer for _, answer in guarded(stage, records(found), Context(seed=0, **context))]


def reasons(stage: Stage, found: Sequence[str], **context: Any) -> list[str | None]:
    """The reason for each text that is dropped, None for those that are kept."""
    return [a.reason if isinstance(a, Dropped) else None for a in answers(stage, found, **context)]


def recipe(paths: Sequence[Path], stages: Sequence[dict[str, Any]], **more: Any) -> Any:
    lines = {"use": "jsonl", "licence_field": "licence"}
    readers = [{**lines, "name": path.stem, "paths": [str(path)]} for path in paths]
    return recipes.decode({"do": "data", "readers": readers, "stages": list(stages), **more})


def run(decoded: Any, folder: Path) -> tuple[dict[str, Any], Quiet]:
    """Run a recipe and put its documents in place; the account and what was told."""
    told = Quiet()
    trail = rounds.clean(decoded, folder, told)
    content = account.account(decoded, trail)
    rounds.publish_dropped(decoded, folder, trail)
    rounds.publish_tables(decoded, folder, trail)
    rounds.publish(decoded, folder, trail)
    return content, told


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that was handed on or left out."""
    found = [
        path
        for name in ("documents", "dropped", "tables")
        for path in sorted((folder / name).rglob("*"))
        if path.is_file()
    ]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}
