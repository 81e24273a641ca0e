"""A tiny training recipe on a few lines of text, and a batch to step on."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lmworks.core import recipe as recipes
from lmworks.core.errors import Stopped
from lmworks.core.journal import rows
from lmworks.core.run import RunFolder
from lmworks.data.load import Batch
from lmworks.model.backbone import Backbone
from lmworks.model.decoder import DecoderConfig
from lmworks.model.init import initialise
from lmworks.train.loop import run
from lmworks.train.recipe import Train


class Silent:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.rows: list[dict[str, Any]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def preparing(self, **facts: Any) -> None:
        pass

    def begin(self, step: int, steps: int) -> None:
        pass

    def row(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def end(self) -> None:
        pass


def corpus(folder: Path, documents: int = 40) -> Path:
    """Text files of different lengths, the same on every call."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(documents):
        lines = [f"line {j} of document {i}: {(i * 7919 + j * 104729) % 9973}" for j in range(2 + i % 7)]
        (folder / f"{i:03d}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def table(text: Path, cache: Path, **over: Any) -> dict[str, Any]:
    """A recipe table: bytes, 2 blocks, 32 wide, 12 steps of 4 rows of 32 tokens."""
    return {
        "do": "train",
        "steps": 12,
        "batch_size": 4,
        "precision": "fp32",
        "device": "cpu",
        "model": {"use": "decoder", "n_layers": 2, "hidden_size": 32, "n_heads": 2, "n_kv_heads": 1, "ffn_size": 48},
        "data": {
            "readers": [{"use": "text", "paths": [str(text / "*.txt")]}],
            "tokenizer": "bytes",
            "sequence_length": 32,
            "validation": 0.2,
            "cache": str(cache),
        },
        "optimizer": {"use": "adamw", "lr": 1e-2},
        "checkpoints": {"every": 4},
        "sinks": [],
        **over,
    }


def recipe(text: Path, cache: Path, **over: Any) -> Train:
    """The decoded recipe."""
    decoded: Train = recipes.decode(table(text, cache, **over))
    return decoded


def train(made: Train, path: Path, resume: str = "auto") -> tuple[RunFolder, Silent]:
    """Run it in this process."""
    report = Silent()
    return run(made, path, resume=resume, report=report), report


def learned(folder: RunFolder) -> list[tuple[Any, ...]]:
    """Everything in metrics.jsonl that must repeat to the last bit."""
    names = ("step", "tokens", "loss", "grad_norm", "lr", "clip_factor", "val_loss", "val_bits_per_byte")
    return [tuple(row.get(name) for name in names) for row in rows(folder.metrics)]


class StopAt(Silent):
    """Sends itself a signal when a step has been written."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        super().__init__()
        self.step, self.number = step, number

    def row(self, row: dict[str, Any]) -> None:
        if row["step"] == self.step and "loss" in row:
            os.kill(os.getpid(), self.number)


def stopped(made: Any, path: Path, step: int, number: signal.Signals = signal.SIGTERM) -> Stopped:
    """Run until the signal stops it at a step."""
    with pytest.raises(Stopped) as caught:
        run(made, path, resume="auto", report=StopAt(step, number))
    return caught.value


def model(vocab: int = 61, *, seed: int = 0, dtype: torch.dtype = torch.float64, **over: Any) -> Backbone:
    """A small decoder, in float64 throughout."""
    config = DecoderConfig(
        vocab_size=vocab, n_layers=2, hidden_size=16, n_heads=4, n_kv_heads=2, ffn_size=24, tied=True
    )
    made = dataclasses.replace(config, **over).build(dtype=dtype, param_dtype=dtype)
    initialise(made, seed)
    return made


def batch(rows: int, length: int, vocab: int, *, seed: int = 0, packed: bool = True) -> Batch:
    """Random tokens; packed: several documents a row and some ignored targets."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (rows, length + 1), generator=generator)
    starts = torch.rand(rows, length, generator=generator) < (0.15 if packed else 0.0)
    starts[:, 0] = True
    place = torch.arange(length)
    begun = torch.where(starts, place, 0).cummax(1).values
    targets = tokens[:, 1:].clone()
    targets[:, :-1][starts[:, 1:]] = -100
    return Batch(
        tokens_BT=tokens[:, :-1].contiguous(),
        targets_BT=targets,
        positions_BT=place - begun,
        documents_BT=starts.cumsum(1) - 1,
        sources_BT=torch.zeros_like(tokens[:, :-1]),
    )


def day_file(folder: Path, values: list[float]) -> str:
    """A file of a grid's carbon in g/kWh, hour by hour."""
    path = folder / "grid.csv"
    rows = "".join(f"{hour},{value}\n" for hour, value in enumerate(values))
    path.write_text(f"# source: a test\n# year: 2024\nhour (UTC),carbon (g/kWh)\n{rows}")
    return str(path)
