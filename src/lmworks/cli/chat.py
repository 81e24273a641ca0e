"""lmworks chat MODEL: talk with a model that was tuned to answer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from lmworks.cli.console import say


def chat(
    model: Annotated[
        Path, typer.Argument(help="A run folder, a checkpoint, a Hugging Face folder or a fetched model.")
    ],
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of one answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.7,
    top_k: Annotated[int, typer.Option(min=0, help="Draw among the k likeliest tokens; 0 = all.")] = 50,
    top_p: Annotated[float, typer.Option(help="Draw among the fewest tokens that reach this probability.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="The same seed, settings and words give the same answers.")] = 0,
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        typer.Option(help="auto: bf16 on a GPU, fp32 on a CPU."),
    ] = "auto",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU when there is one.")] = "auto",
) -> None:
    """Talk with a model. One line is one message; /new forgets the conversation, an empty line or Ctrl-D ends it.

    Example: echo "What is the capital of France?" | lmworks chat smollm2-135m
    """
    from lmworks.core.seeds import seed_for
    from lmworks.generate.sampling import Sampling
    from lmworks.generate.writer import open_writer

    writer = open_writer(model, precision=precision, device=device)
    first = [{"role": "system", "content": system}] if system else []
    writer.chat_ids(
        [*first, {"role": "user", "content": "."}]
    )  # a model without a template is refused before the first line
    messages = list(first)
    say("One line is one message. /new forgets the conversation; an empty line or Ctrl-D ends it.")
    while (line := _next_line()) is not None:
        if line == "/new":
            messages = list(first)
            continue
        messages.append({"role": "user", "content": line})
        turn = seed_for(seed, "turn", len(messages))
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=turn)
        text = ""
        for _, piece, _ in writer.write([writer.chat_ids(messages)], sampling, max_tokens=max_tokens):
            text += piece
            typer.echo(piece, nl=False)
            sys.stdout.flush()
        typer.echo()
        messages.append({"role": "assistant", "content": text.strip()})


def _next_line() -> str | None:
    """The next message, or None at the end."""
    if sys.stdin.isatty():
        typer.echo("> ", nl=False, err=True)
        sys.stderr.flush()
    line = sys.stdin.readline()
    return line.strip() or None
