"""lmworks plan RECIPE: what fits, how long a step takes and what the run costs, on a cluster that need not be here."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lmworks.plan.cluster import Cluster
    from lmworks.plan.search import Answer


class Objective(enum.StrEnum):
    """What is made small."""

    time = "time"
    energy = "energy"
    money = "money"
    co2 = "co2"


def plan(
    recipe: Annotated[str, typer.Argument(help="A training recipe, or the name of a shipped one.")],
    cluster: Annotated[str, typer.Option(help="A shipped cluster, or a .toml file of your own.")] = "hgx-h100",
    gpus: Annotated[int | None, typer.Option(help="Devices. Default: those of one node.", min=1)] = None,
    objective: Annotated[Objective, typer.Option(help="What the best plan has least of.")] = Objective.time,
    region: Annotated[str | None, typer.Option(help="Where it stands, for price and CO2.")] = None,
    own: Annotated[bool, typer.Option("--own", help="Cost the recipe's own layout; search none.")] = False,
    show: Annotated[int, typer.Option(help="Plans to show.", min=1)] = 5,
    write: Annotated[Path | None, typer.Option(help="Write the best plan as a recipe into this file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the best plan into this PNG.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a setting; may be given many times.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Find the best layouts of a recipe on a cluster: memory, time, energy and money, before anything runs.

    Exit code 0: something fits; 4: nothing does, and the answer says what would make it.

    Example: lmworks plan quickstart --cluster workstation-a100 --set batch_size=64
    """
    from lmworks.cli.console import answer as tell
    from lmworks.core import recipe as recipes
    from lmworks.plan import cluster as clusters
    from lmworks.plan import report, search
    from lmworks.plan.picture import draw

    decoded = recipes.load(recipe, verb="train", sets=set_ or [])
    machines = clusters.load(cluster)
    found = search.search(
        decoded,
        machines,
        devices=gpus or machines.devices_per_node,
        objective=objective.value,
        region=region,
        show=show,
        own=own,
    )
    search.refuse_nothing(found)
    tell(report.as_json(found, machines), as_json=as_json, text=_text(found, machines, decoded))
    if not found.plans:
        raise typer.Exit(4)
    if write is not None:
        write.write_text(report.recipe_text(found, found.plans[0], machines), encoding="utf-8")
        _said(f"recipe: {write}; try it with  lmworks rehearse {write}", as_json)
    if picture is not None:
        draw(found, found.plans[0], machines, picture)
        _said(f"drawn in {picture}", as_json)


def _said(text: str, as_json: bool) -> None:
    from lmworks.cli.console import say

    if not as_json:
        say(text)


def _text(found: Answer, machines: Cluster, recipe: Any) -> str:
    """The answer for people."""
    from lmworks.cli.console import table
    from lmworks.plan import report, search

    lines = [f"{found.devices} x {machines.device} ({machines.name})", ""]
    if found.plans:
        lines += [table(report.rows(found.plans), header=report.HEADER), ""]
        lines += report.breakdown(found.plans[0], machines.memory_bytes.value)
    else:
        lines.append("Nothing fits:")
        lines += [f"  {line}" for line in search.relaxed(found, machines, recipe)]
    lines += ["", *report.refusals(found, machines), *report.doubts(found, machines)]
    return "\n".join(lines)
