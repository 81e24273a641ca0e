"""lmworks export MODEL FOLDER: write a Hugging Face folder, and prove that it is the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lmworks.cli.console import answer, count


def export(
    model: Annotated[
        Path, typer.Argument(help="A run folder, a checkpoint, a Hugging Face folder or a fetched model.")
    ],
    folder: Annotated[Path, typer.Argument(help="Where to write; must not hold anything yet.")],
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="What the weights are written as.")] = "fp32",
    shard_size: Annotated[float, typer.Option(help="Largest file of weights, in GB.", min=0.001)] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
) -> None:
    """Write a Hugging Face folder; a fresh process reads it and must give the same logits, or nothing is left there.

    Example: lmworks export runs/quickstart models/first --dtype bf16
    """
    from lmworks.serve.export import export_model

    report = export_model(model, folder, dtype=dtype, shard_bytes=int(shard_size * 1e9))
    readers = ", ".join(f"{check['reader']} {check['max_difference']:.2g}" for check in report["checks"])
    lines = [
        f"{count(report['parameters'])} parameters in {dtype}, {report['tokens_compared']} tokens compared",
        f"largest difference of a logit: {readers}",
        report["path"],
    ]
    answer(report, as_json=as_json, text="\n".join(lines))
