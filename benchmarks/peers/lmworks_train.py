"""Arm `lmworks`: what `lmworks train RECIPE` runs, with the recipe's own defaults, on a recipe that holds the job.

Token rows go through the real path: a JSONL file of token ids, tokenised once, packed, drawn by the loader. A document
has `sequence - 2` ids and gets bos and eos, so that it fills its row exactly. Variants: `packed` (documents of many
lengths share rows, cut where a row ends), `compile` (the recipe's `compile = true`).
"""

from __future__ import annotations

import json
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from tokenizers import Tokenizer, models

from lmworks.cli.console import Reporter
from lmworks.core import recipe as recipes
from lmworks.train.loop import run
from peers.job import Enough, Job, Timeline, read_job, token_rows

MEAN_DOCUMENT = 160
"""Tokens of a document in the variant `packed`, on average; lengths are geometric, as chance would cut text."""


class Marks(Reporter):
    """The reporter of the command line, which marks the timeline after each row that it has shown."""

    def __init__(self, timeline: Timeline, **facts: Any) -> None:
        super().__init__()
        self._timeline, self._facts = timeline, facts
        self._inside: list[float] = []

    def row(self, row: dict[str, Any]) -> None:
        """Show the row, then mark: the time between two marks is a whole turn of the loop."""
        super().row(row)
        if "loss" in row:
            self._inside.append(row["seconds"])
            self._timeline.mark(loss=row["loss"], step_seconds=list(self._inside), **self._facts)


def documents(job: Job) -> list[list[int]]:
    """Token ids without bos and eos: one document per row, or many lengths when packed."""
    rows = token_rows(job)[:, :, : job.sequence - 2].flatten(0, 1)
    if job.variant != "packed":
        return [[int(i) for i in row] for row in rows]
    ids = rows.flatten().tolist()
    lengths = np.random.default_rng(job.seed).geometric(1 / MEAN_DOCUMENT, size=len(ids))
    cuts = [0, *(int(c) for c in np.cumsum(lengths) if c < len(ids)), len(ids)]
    return [ids[a:b] for a, b in pairwise(cuts)]


def write_recipe(job: Job, folder: Path) -> Path:
    """A recipe, its documents and its tokenizer. Everything that is not the job's is left to the defaults."""
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": ids}) + "\n" for ids in documents(job))
    words = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, job.shape.vocab_size)}
    Tokenizer(models.WordLevel(words, unk_token="w1")).save(str(folder / "tokenizer.json"))
    shape = job.shape
    table = {
        "do": "train",
        "steps": job.warmup + job.steps,
        "batch_size": job.batch,
        "precision": job.precision,
        "device": "cpu",
        "threads": job.threads,
        "compile": job.variant == "compile",
        "model": {
            "use": "decoder",
            "n_layers": shape.n_layers,
            "hidden_size": shape.hidden_size,
            "n_heads": shape.n_heads,
            "n_kv_heads": shape.n_kv_heads,
            "ffn_size": shape.ffn_size,
            "tied": shape.tied,
            "norm_eps": shape.norm_eps,
            "rope_theta": shape.rope_theta,
        },
        "data": {
            "readers": [{"use": "jsonl", "paths": [str(folder / "rows.jsonl")]}],
            "tokenizer": {"use": "file", "path": str(folder / "tokenizer.json"), "eos": "<|endoftext|>"},
            "sequence_length": job.sequence,
            "validation": 0.0,
            "cache": str(folder / "cache"),
        },
        "optimizer": {"use": "adamw", "lr": job.lr, "weight_decay": job.weight_decay},
        "gradient": [{"use": "clip", "norm": job.clip}],
    }
    path = folder / "job.toml"
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    return path


def main() -> None:
    """Train until the timeline has enough."""
    job = read_job()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = recipes.load(write_recipe(job, folder), verb="train")
        cost = recipe.model.with_vocab(job.shape.vocab_size).cost(sequence=job.sequence)
        timeline = Timeline(job)
        facts = {"parameters": cost.parameters, "train_flops_per_token": cost.train_flops_per_token}
        with Marks(timeline, **facts) as report:
            try:
                run(recipe, folder / "run", resume="never", report=report)
            except Enough:
                return


if __name__ == "__main__":
    main()
