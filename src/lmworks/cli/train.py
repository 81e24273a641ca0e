"""lmworks train RECIPE: run a training recipe, or go on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one (quickstart).")],
    run: Annotated[
        Path | None, typer.Option("--run", help="The run folder. Default: runs/<name of the recipe>.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a setting; may be given many times.")
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            help="auto: go on with the run in the folder; never: start a new one beside it; or a checkpoint folder."
        ),
    ] = "auto",
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Decode the recipe, print it with every default and what it takes in memory, run nothing."
        ),
    ] = False,
) -> None:
    """Train a model from a recipe; the same command goes on after a kill.

    Example: lmworks train quickstart --set optimizer.lr=2e-3 --run runs/higher-rate
    """
    from lmworks.core import recipe as recipes

    decoded = recipes.load(recipe, verb="train", sets=set_ or [])
    if check:
        from lmworks.parallel.footprint import described
        from lmworks.parallel.world import seat

        typer.echo(recipes.dump(decoded))
        typer.echo("\n".join(f"# {line}" for line in described(decoded, seat().world)))
        return
    from lmworks.cli.console import Reporter
    from lmworks.parallel.world import seat
    from lmworks.train.loop import run as run_loop

    path = run or Path("runs") / recipes.find(recipe, "train").stem
    with Reporter() as report:
        folder = run_loop(decoded, path, resume=resume, report=report)
    if seat().first:
        typer.echo(str(folder.path))
