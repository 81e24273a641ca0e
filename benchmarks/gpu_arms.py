"""What the GPU benchmarks compare. An arm is what it changes of one recipe, so that it measures what users run.

The recipe goes the whole way of `lmworks train`: decoded, settled, documents tokenised and packed, model, optimizer and
step from `train.build`. Only the loop around the step is the benchmark's. Documents are rows of random token ids.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import SIZES as SIZES_FOLDER
from tokenizers import Tokenizer, models

from lmworks.core import recipe as recipes
from lmworks.core.errors import UsageError
from lmworks.train.build import Built, build, settle

ADAMW = {"use": "adamw", "lr": 3e-4}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train."""

    line: str
    over: dict[str, Any] = field(default_factory=dict)
    """What it changes of the recipe."""


ARMS = {
    "eager": Arm(line="bf16, nothing else"),
    "compile": Arm(line="compiled blocks", over={"compile": True}),
    "float8": Arm(line="compiled blocks, products in float8", over={"compile": True, "precision": "float8"}),
    "float8-rowwise": Arm(
        line="the same with a scale for each row", over={"compile": True, "precision": "float8-rowwise"}
    ),
    "recompute": Arm(line="blocks keep their input only", over={"saved": {"use": "recompute"}}),
    "recompute-selective": Arm(
        line="blocks keep their products only", over={"saved": {"use": "recompute", "keep": "products"}}
    ),
    "ssdtrain-host": Arm(line="saved tensors go to pinned memory", over={"saved": {"use": "ssdtrain", "to": "host"}}),
    "ssdtrain-disk": Arm(line="saved tensors go to files", over={"saved": {"use": "ssdtrain", "to": "disk"}}),
    "coat-optimizer": Arm(line="optimizer state in eight bits", over={"optimizer": {"use": "coat", "around": ADAMW}}),
    "coat-both": Arm(
        line="optimizer state and saved tensors in eight bits",
        over={"optimizer": {"use": "coat", "around": ADAMW}, "saved": {"use": "coat"}},
    ),
}
IN_BF16 = ("eager", "compile", "recompute", "recompute-selective", "ssdtrain-host", "ssdtrain-disk")
"""Arms whose products are all in bf16."""


def _shipped(name: str) -> dict[str, Any]:
    return tomllib.loads((SIZES_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))


def _wide(hidden: int, layers: int) -> dict[str, Any]:
    """Few, wide blocks, as SSDTrain was measured with."""
    heads = {"n_heads": hidden // 128, "n_kv_heads": hidden // 128, "ffn_size": hidden * 11 // 4}
    return {"use": "decoder", "vocab_size": 32000, "n_layers": layers, "hidden_size": hidden, **heads, "tied": True}


TOY = {"n_layers": 3, "hidden_size": 64, "n_heads": 4, "n_kv_heads": 2, "ffn_size": 128, "tied": True}
SHAPES: dict[str, dict[str, Any]] = {
    "1b": _shipped("llama-3.2-1b"),
    "h4096-l3": _wide(4096, 3),
    "h4096-l6": _wide(4096, 6),
    "h8192-l3": _wide(8192, 3),
    "toy": {"use": "decoder", "vocab_size": 512, **TOY},
}
"""Model tables by name. The wide ones are SSDTrain's sizes: hidden 4096 to 8192, 3 to 6 blocks."""


def table(arm: str, options: argparse.Namespace, folder: Path, *, rows: int, text: bool = False) -> dict[str, Any]:
    """The recipe of an arm, with `rows` rows a step. `text`: train on text of this machine, read as bytes."""
    model = {name: value for name, value in SHAPES[options.size].items() if not (text and name == "vocab_size")}
    data: dict[str, Any] = {"sequence_length": options.sequence, "validation": 0.0, "cache": str(folder / "cache")}
    if text:
        data |= {"readers": [{"use": "python-stdlib"}], "tokenizer": "bytes"}
    else:
        data["readers"] = [{"use": "jsonl", "paths": [str(folder / "rows.jsonl")]}]
        data["tokenizer"] = {"use": "file", "path": str(folder / "tokenizer.json"), "eos": "<|endoftext|>"}
    recipe = {"do": "train", "steps": 1000, "batch_size": rows, "precision": "bf16", "device": options.device}
    return {**recipe, "model": model, "data": data, "optimizer": ADAMW, "sinks": [], **ARMS[arm].over}


def write_rows(folder: Path, options: argparse.Namespace, rows: int = 64) -> None:
    """Random ids, one document a row, and a tokenizer of as many words as the model's vocabulary has."""
    vocabulary = int(SHAPES[options.size]["vocab_size"])
    ids = np.random.default_rng(0).integers(1, vocabulary, (rows, options.sequence - 2))
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": row.tolist()}) + "\n" for row in ids)
    words = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, vocabulary)}
    Tokenizer(models.WordLevel(words, unk_token="w1")).save(str(folder / "tokenizer.json"))


def opened(arm: str, options: argparse.Namespace, folder: Path, *, rows: int, text: bool = False) -> Built:
    """Everything that `lmworks train` makes before its loop."""
    return build(settle(recipes.decode(table(arm, options, folder, rows=rows, text=text))))


def why_not(arm: str, options: argparse.Namespace, folder: Path) -> str | None:
    """Why an arm cannot run here, in the words of lmworks: a part that is not there, a package, a GPU too old."""
    try:
        settle(recipes.decode(table(arm, options, folder, rows=options.batch)))
    except UsageError as error:
        return str(error)
    return None


def those_that_run(options: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Leave arms that cannot run out of `options.arms`, and say so; what was left out, and why."""
    left = {arm: reason for arm in options.arms if (reason := why_not(arm, options, folder)) is not None}
    for arm, reason in left.items():
        print(f"LEFT OUT: {arm}. {reason}", file=sys.stderr, flush=True)
    options.arms = [arm for arm in options.arms if arm not in left]
    return left


class Budget:
    """The minutes that a whole program may take."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes
        self._longest = 0.0

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def has_room(self) -> bool:
        """Whether a run as long as the longest so far would still end in time."""
        return self.left > max(self._longest, 1.0)

    def run(self, command: Sequence[str]) -> dict[str, Any]:
        """A run in a process of its own: the JSON of its last line, or {'failed': its last words}."""
        begun = time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=max(self.left, 1.0))
        except subprocess.TimeoutExpired:
            return {"failed": "the budget of minutes ended"}
        self._longest = max(self._longest, time.monotonic() - begun)
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            return {"failed": done.stderr.strip()[-2000:] or f"exit code {done.returncode}"}
        found: dict[str, Any] = json.loads(lines[-1])
        return found


def wait_for(device: torch.device) -> None:
    """Until everything that was asked of a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def held(built: Built) -> dict[str, int]:
    """Bytes that stay between steps: weights, and the optimizer's tensors as they lie in memory."""
    weights = sum(p.numel() * p.element_size() for p in built.placement.model.parameters())
    gradients = sum(p.numel() * p.element_size() for p in built.placement.model.parameters() if p.requires_grad)
    built.step.update.zero_grad()
    if built.device.type == "cuda":
        state = torch.cuda.memory_allocated(built.device) - weights
    else:
        state = sum(value.nbytes for value in built.step.update.state().values())
    return {"weights": weights, "optimizer": state, "gradients": gradients}
