"""lmworks compare A B: two or more training recipes, seed by seed, at an equal budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    recipes: Annotated[list[str], typer.Argument(help="Two or more training recipes; the first is the baseline.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="A setting written over every recipe.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds; one gives no verdict.")] = 3,
    axis: Annotated[str, typer.Option(help="What is equal: steps, tokens, flops, seconds or joules.")] = "tokens",
    metric: Annotated[str, typer.Option(help="The column of metrics.jsonl that is compared.")] = "val_loss",
    slot: Annotated[
        list[str] | None, typer.Option(help="A setting in which they may differ. Default: any one slot.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder. Default: runs/compare-A-B.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time. Default: one a core.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
) -> None:
    """Compare training recipes: the same seeds and data order, an equal budget, paired differences with intervals.

    Example: lmworks compare a.toml b.toml --seeds 3 --axis tokens

    What is done is not done again: the same command goes on after a kill.
    """
    from lmworks.cli.prove import run_proof
    from lmworks.core import recipe as core_recipe
    from lmworks.core.errors import UsageError
    from lmworks.core.recipe import Table

    if len(recipes) < 2:
        raise UsageError("a comparison needs two recipes", next_step="lmworks compare A.toml B.toml")
    names = _names(recipes)
    changes = core_recipe.set_values(set_ or [])
    arms: list[Table] = [
        {"name": name, "recipe": recipe, "set": changes} for name, recipe in zip(names, recipes, strict=True)
    ]
    table: Table = {
        "do": "prove",
        "arms": arms,
        "baseline": names[0],
        "seeds": list(range(1, seeds + 1)),
        "axis": axis,
        "metric": metric,
        "may_differ": list(slot or []),
        "executor": {"use": "local", **({"processes": jobs} if jobs else {})},
    }
    proof = core_recipe.decode(table, verb="prove", source="lmworks compare")
    run_proof(proof, out or Path("runs") / f"compare-{'-'.join(names)}", as_json=as_json)


def _names(recipes: list[str]) -> list[str]:
    """File names without folders and endings, made unique by a number."""
    stems = [Path(recipe).stem for recipe in recipes]
    return [stem if stems.count(stem) == 1 else f"{stem}-{i + 1}" for i, stem in enumerate(stems)]
