"""lmworks eval MODEL --text FILE: the loss of a model on text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lmworks.cli.console import answer, table


def eval(  # noqa: A001  (the verb's name)
    model: Annotated[
        Path, typer.Argument(help="A run folder, a checkpoint, a Hugging Face folder or a fetched model.")
    ],
    text: Annotated[list[Path], typer.Option("--text", help="A UTF-8 file; may be given many times.")],
    context: Annotated[int | None, typer.Option(help="Tokens of a window. Default: the model's, at most 2048.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens a window moves on. Default: half of the context.")] = None,
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], typer.Option(help="auto: fp32 on a CPU.")] = "auto",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU when there is one.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
) -> None:
    """Loss per token, bits per byte and perplexity of a model on text files; every token counts once.

    Example: lmworks eval runs/quickstart --text README.md --json
    """
    from lmworks.evaluate.text import Score, read_text, score_text, window_sizes
    from lmworks.generate.writer import open_writer

    texts = {path: read_text(path) for path in text}
    writer = open_writer(model, precision=precision, device=device)
    begun = time.monotonic()
    width, step = window_sizes(writer.model, context, stride)
    scores = {
        path: score_text(writer.model, writer.tokenizer, body, context=width, stride=step)
        for path, body in texts.items()
    }
    whole = Score(
        loss=sum(score.loss for score in scores.values()),
        tokens=sum(score.tokens for score in scores.values()),
        bytes=sum(score.bytes for score in scores.values()),
    )
    value: dict[str, Any] = {
        "model": str(writer.where.weights),
        **whole.table(),
        "context": width,
        "stride": step,
        "seconds": round(time.monotonic() - begun, 3),
        "files": [{"path": str(path), **score.table()} for path, score in scores.items()],
    }
    rows = [_row(str(path), score) for path, score in scores.items()]
    rows += [_row("all", whole)] if len(scores) > 1 else []
    header = ["text", "loss/token", "bits/byte", "perplexity", "tokens", "bytes"]
    answer(value, as_json=as_json, text=table(rows, header=header))


def _row(name: str, score: Any) -> list[str]:
    figures = [f"{score.loss_per_token:.4f}", f"{score.bits_per_byte:.4f}", f"{score.perplexity:.2f}"]
    return [name, *figures, str(score.tokens), str(score.bytes)]
