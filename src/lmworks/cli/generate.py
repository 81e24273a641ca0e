"""lmworks generate MODEL --prompt TEXT: go on with a text."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lmworks.cli.console import answer, say


def generate(
    model: Annotated[
        Path, typer.Argument(help="A run folder, a checkpoint, a Hugging Face folder or a fetched model.")
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(help="The text to go on with; may be given many times. Default: standard input.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to write.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Draw among the k likeliest tokens; 0 = all.")] = 50,
    top_p: Annotated[float, typer.Option(help="Draw among the fewest tokens that reach this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed and settings give the same text.")] = 0,
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        typer.Option(help="auto: bf16 on a GPU, fp32 on a CPU."),
    ] = "auto",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU when there is one.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON when everything is written.")] = False,
) -> None:
    """Go on with a text, shown as it is written.

    Example: lmworks generate runs/quickstart --prompt "def read_" --max-tokens 64 --seed 1
    """
    from lmworks.core.errors import UsageError
    from lmworks.generate.sampling import Sampling
    from lmworks.generate.writer import open_writer

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    prompts = list(prompt) if prompt else [sys.stdin.read() if not sys.stdin.isatty() else ""]
    if not prompt and sys.stdin.isatty():
        raise UsageError("there is no prompt", next_step="--prompt TEXT, or a text on standard input")
    writer = open_writer(model, precision=precision, device=device)
    shown = len(prompts) == 1 and not as_json
    if shown:
        typer.echo(prompts[0], nl=False)
    texts, counts, begun = [""] * len(prompts), [0] * len(prompts), time.monotonic()
    for row, piece, token in writer.write([writer.ids(text) for text in prompts], sampling, max_tokens=max_tokens):
        texts[row] += piece
        counts[row] += token >= 0
        if shown:
            typer.echo(piece, nl=False)
            sys.stdout.flush()
    seconds = time.monotonic() - begun
    say(f"\n{sum(counts)} tokens, {sum(counts) / seconds:.1f} a second" if shown else "")
    value: dict[str, Any] = {
        "model": str(writer.where.weights),
        "answers": [
            {"prompt": before, "text": text, "tokens": made}
            for before, text, made in zip(prompts, texts, counts, strict=True)
        ],
        "tokens_per_second": round(sum(counts) / seconds, 2),
        "settings": vars(sampling),
    }
    if not shown:
        whole = [before + text for before, text in zip(prompts, texts, strict=True)]
        answer(value, as_json=as_json, text="\n\n".join(whole))
