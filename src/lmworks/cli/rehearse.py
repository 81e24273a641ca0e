"""lmworks rehearse RECIPE: run a recipe's layout with small widths on this machine, and hold it against one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def rehearse(
    recipe: Annotated[str, typer.Argument(help="A training recipe, or the name of a shipped one.")],
    ranks: Annotated[
        int | None, typer.Option(help="Ranks of the real run. Default: as many as the layout's axes say.", min=1)
    ] = None,
    most: Annotated[int, typer.Option(help="Processes to start at most; degrees become 2 until they fit.", min=1)] = 8,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a setting; may be given many times.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the real pipeline's timeline into this PNG.")] = None,
    documents: Annotated[
        bool, typer.Option("--documents", help="Read the recipe's documents: how long do ranks wait for the longest?")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run the layout of a recipe at toy size: same axes, stages, schedule and parts; is it what one process computes?

    Exit code 0: losses, gradients and bytes are as they should be; 4: they are not.

    Example: lmworks rehearse quickstart --ranks 8 --set layout.pp=2 --set layout.cp=2 --set micro_batch_size=1
    """
    import dataclasses

    from lmworks.cli.console import say
    from lmworks.core import recipe as recipes
    from lmworks.core.errors import RecipeError, UsageError
    from lmworks.parallel.layout import problems_of
    from lmworks.train import rehearse as rehearsal
    from lmworks.train.small import small

    decoded = recipes.load(recipe, verb="train", sets=set_ or [])
    ranks = ranks or decoded.layout.asked
    if ranks is None:
        raise UsageError("this layout takes as many ranks as there are: say how many", next_step="--ranks 512")
    notes = decoded.layout.notes(ranks, decoded)
    layout = decoded.layout.settle(ranks, decoded)
    decoded = dataclasses.replace(decoded, layout=layout)
    if problems := problems_of(decoded):
        raise RecipeError(problems)
    waits = _documents(decoded, as_json=as_json) if documents else []
    scene, said = small(decoded, layout, most=most)
    if not as_json:
        for text in notes:
            say(text)
        say(f"asked for: {layout.ranks} ranks ({rehearsal.described(layout)})")
    _pipeline(decoded, picture, as_json=as_json)
    if not as_json:
        say(f"rehearsed: {scene.layout.ranks} ranks ({rehearsal.described(scene.layout)})")
        for line in said:
            say(f"  smaller: {line}")
    verdict = rehearsal.rehearse(scene)
    if as_json:
        facts = dataclasses.asdict(verdict) | {"equal": verdict.equal, "billed": verdict.billed}
        facts |= {"ranks": scene.layout.ranks, "layout": dataclasses.asdict(scene.layout), "smaller": said}
        facts |= {"documents": waits} if documents else {}
        typer.echo(json.dumps(facts))
    else:
        _print(verdict)
    if not (verdict.equal and verdict.billed):
        raise typer.Exit(4)


def _pipeline(recipe: Any, picture: Path | None, *, as_json: bool) -> None:
    """How long the real pipeline waits, with its stages as uneven as they are; and its picture."""
    from lmworks.cli.console import say
    from lmworks.core.errors import UsageError
    from lmworks.parallel.timeline import draw
    from lmworks.train.rehearse import pipeline_of

    if recipe.layout.pp == 1:
        if picture is not None:
            raise UsageError("there is no pipeline to draw: layout.pp is 1", where="--picture")
        return
    timeline = pipeline_of(recipe, recipe.layout)
    if not as_json:
        say(f"  its pipeline waits {100 * timeline.bubble_share:.0f} % of the time that it computes, sends apart")
    if picture is not None:
        draw(timeline, picture, unit="micro-batches forward through a rank")
        say(f"  drawn in {picture}")


def _documents(recipe: Any, *, as_json: bool) -> list[dict[str, Any]]:
    """How long ranks of data parallel wait for the one with the longest documents, by their number."""
    from lmworks.train.waiting import facts, told, waiting

    asked = recipe.layout.size("batch")
    found = waiting(recipe, recipe.layout, sorted({2, 4, 8, 16} | ({asked} - {1})))
    if not as_json:
        for line in told(found, asked):
            typer.echo(line)
    return facts(found)


def _print(verdict: object) -> None:
    """The comparison, the bytes, and one sentence."""
    from lmworks.train.rehearse import EQUAL, STEPS, Verdict

    assert isinstance(verdict, Verdict)
    typer.echo(f"losses of {STEPS} steps     differ by {verdict.loss:.1e} of their size (equal below {EQUAL:.0e})")
    typer.echo(f"gradients of step 1  differ by {verdict.gradient:.1e}")
    for name in verdict.missing:
        typer.echo(f"  no rank holds all of {name}")
    typer.echo("bytes sent in a step, all ranks:")
    for axis in sorted(set(verdict.sent) | set(verdict.expected)):
        counted, formula = verdict.sent.get(axis, 0.0), verdict.expected.get(axis, 0.0)
        typer.echo(f"  {axis:12}  counted {counted:12,.0f}  by formula {formula:12,.0f}")
    for level, size in verdict.levels.items() if len(verdict.levels) > 1 else ():
        typer.echo(f"  of states, {level:10} {size:12,.0f}")
    right = "The layout computes what one process computes" if verdict.equal else "The layout does NOT compute it"
    bill = "and sends what the formulas say" if verdict.billed else "and does NOT send what the formulas say"
    typer.echo(f"{right}, {bill}.")
