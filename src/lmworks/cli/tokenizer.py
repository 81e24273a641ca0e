"""lmworks tokenizer: train one on text, look at one, see what it does with a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lmworks.cli.console import Reporter, answer, count

app = typer.Typer(
    help="Train a tokenizer on text, or look at one.\n\nExample: lmworks tokenizer train --vocab-size 4096 --out tok",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Answer as JSON.")]


@app.command("train")
def train(
    out: Annotated[Path, typer.Option(help="Folder for tokenizer.json and its config.")],
    files: Annotated[
        list[str] | None, typer.Argument(help="Text files; none: the Python standard library's own text.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Tokens, with 256 bytes and one special token among them.")] = 8192,
    split_digits: Annotated[bool, typer.Option("--split-digits", help="Every digit a token of its own.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a byte-level BPE tokenizer and save it as tokenizer.json.

    Example: lmworks tokenizer train --vocab-size 4096 --out tok
    """
    from lmworks.core.errors import UsageError
    from lmworks.core.recipe import decode_part

    if out.exists() and any(out.iterdir()):
        raise UsageError("is not empty", where=str(out), next_step="--out takes a new folder")
    reader: dict[str, Any] = {"use": "text", "paths": list(files)} if files else {"use": "python-stdlib"}
    settings = {"use": "bpe", "vocab_size": vocab_size, "split_digits": split_digits}
    data = decode_part(
        "source", {"readers": [reader], "tokenizer": settings, "sequence_length": 1}, source="tokenizer train"
    )
    made = data.make_tokenizer(progress=Reporter().preparing)
    made.save(out)
    found = {"folder": str(out), "vocab_size": made.vocab_size, "id": made.id}
    answer(found, as_json=as_json, text=f"{made.vocab_size} tokens, id {made.id[:12]}\n{out}")


@app.command("show")
def show(
    folder: Annotated[Path, typer.Argument(help="A tokenizer.json, or a folder that holds one (a run's tokenizer/).")],
    text: Annotated[str | None, typer.Option(help="A text to cut into tokens.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a tokenizer: its size, its special tokens, and how it cuts a text.

    Example: lmworks tokenizer show runs/quickstart/tokenizer --text "def main():"
    """
    from lmworks.data.tokenizer import load_tokenizer

    made = load_tokenizer(folder)
    found: dict[str, Any] = {"vocab_size": made.vocab_size, "bos": made.bos, "eos": made.eos, "id": made.id}
    lines = [f"{count(made.vocab_size)} tokens, bos {made.bos}, eos {made.eos}, id {made.id[:12]}"]
    if text is not None:
        ids = [int(i) for i in made.encode(text)]
        pieces = [made.decode([i]) for i in ids]
        size = len(text.encode())
        found |= {"ids": ids, "pieces": pieces, "bytes_per_token": size / max(1, len(ids))}
        lines.append(f"{len(ids)} tokens, {size / max(1, len(ids)):.2f} bytes per token")
        lines.append(" ".join(f"{piece!r}" for piece in pieces))
    answer(found, as_json=as_json, text="\n".join(lines))
