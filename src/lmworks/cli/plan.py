"""lmworks plan RECIPE: what fits, how long a step takes and what the run costs, on a cluster that need not be here.

lmworks plan --score RUN: the same of a run that was made, beside what it measured.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lmworks.plan.cluster import Cluster
    from lmworks.plan.residuals import Correction
    from lmworks.plan.score import Score
    from lmworks.plan.search import Answer


SHOWN = 5
"""Plans, where nobody says how many."""


class Objective(enum.StrEnum):
    """What is made small."""

    time = "time"
    energy = "energy"
    money = "money"
    co2 = "co2"


def plan(
    recipe: Annotated[
        str | None, typer.Argument(help="A training recipe, or the name of a shipped one.", show_default=False)
    ] = None,
    cluster: Annotated[str, typer.Option(help="A shipped cluster, or a .toml file of your own.")] = "hgx-h100",
    gpus: Annotated[int | None, typer.Option(help="Devices. Default: those of one node.", min=1)] = None,
    objective: Annotated[Objective, typer.Option(help="What the best plan has least of.")] = Objective.time,
    region: Annotated[str | None, typer.Option(help="Where it stands, for price and CO2; Poland, US-CA too.")] = None,
    own: Annotated[bool, typer.Option("--own", help="Cost the recipe's own layout; search none.")] = False,
    show: Annotated[int, typer.Option(help="Plans to show.", min=1)] = SHOWN,
    write: Annotated[Path | None, typer.Option(help="Write the best plan as a recipe into this file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the best plan into this PNG.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a setting; may be given many times.")
    ] = None,
    score: Annotated[
        Path | None,
        typer.Option(help="In place of a recipe: the folder of a run to hold a plan against."),
    ] = None,
    uncorrected: Annotated[bool, typer.Option("--uncorrected", help="Leave out what scored runs taught.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Find the best layouts of a recipe on a cluster: memory, time, energy and money, before anything runs.

    With --score, hold a run that was made against what is told of it, and let later plans know.

    Exit code 0: something fits; 4: nothing does, and the answer says what would make it.

    Example: lmworks plan quickstart --cluster workstation-a100 --set batch_size=64
    """
    from lmworks.cli.console import answer as tell
    from lmworks.core import recipe as recipes
    from lmworks.plan import cluster as clusters
    from lmworks.plan import report, residuals, search
    from lmworks.plan.shape import precision_on

    if score is not None:
        given = {"RECIPE": recipe, "--gpus": gpus, "--region": region, "--write": write, "--picture": picture}
        changed = {"--objective": objective is not Objective.time, "--own": own, "--show": show != SHOWN}
        _must_be_alone(given | changed | {"--set": set_, "--uncorrected": uncorrected})
        _score(score, clusters.load(cluster), as_json=as_json)
        return
    decoded, machines = recipes.load(_named(recipe), verb="train", sets=set_ or []), clusters.load(cluster)
    learnt = residuals.Correction() if uncorrected else residuals.correction(machines, precision_on(decoded, machines))
    machines = machines.slowed(learnt.factor)
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
    told = report.as_json(found, machines) | {"correction": learnt.as_json()}
    tell(told, as_json=as_json, text=_text(found, machines, decoded, learnt, region))
    if not found.plans:
        raise typer.Exit(4)
    _delivered(found, machines, write, picture, as_json)


def _delivered(found: Answer, machines: Cluster, write: Path | None, picture: Path | None, as_json: bool) -> None:
    """The best plan as a recipe and as a picture, where asked for."""
    from lmworks.plan import report
    from lmworks.plan.picture import draw

    if write is not None:
        write.write_text(report.recipe_text(found, found.plans[0], machines), encoding="utf-8")
        _said(f"recipe: {write}; try it with  lmworks rehearse {write}", as_json)
    if picture is not None:
        draw(found, found.plans[0], machines, picture)
        _said(f"drawn in {picture}", as_json)


def _named(recipe: str | None) -> str:
    from lmworks.core.errors import UsageError

    if recipe is None:
        raise UsageError("there is no recipe to plan", legal="lmworks plan RECIPE, or lmworks plan --score RUN")
    return recipe


def _must_be_alone(others: dict[str, Any]) -> None:
    """Raise UsageError for what has no effect on a run that was made."""
    from lmworks.core.errors import UsageError

    if given := [name for name, value in others.items() if value]:
        text = f"{', '.join(given)} has no effect with --score, which takes recipe and layout from the run"
        raise UsageError(text, where="lmworks plan", legal="--score RUN, --cluster, --json")


def _score(folder: Path, machines: Cluster, *, as_json: bool) -> None:
    """The answer to --score; what the run taught is kept."""
    from lmworks.cli.console import answer as tell
    from lmworks.plan import residuals
    from lmworks.plan import score as scores

    found = scores.score(folder, machines)
    kept = None if found.residual is None else residuals.keep(machines, found.residual)
    tell(scores.as_json(found, machines, kept), as_json=as_json, text=_score_text(found, machines, kept))


def _score_text(found: Score, machines: Cluster, kept: Path | None) -> str:
    """The same for people."""
    from lmworks.cli.console import table
    from lmworks.plan import score as scores
    from lmworks.plan.report import duration
    from lmworks.plan.search import described

    run = found.run
    lines = [f"{run.folder}: {run.choice.layout.ranks} x {machines.device} ({machines.name}), on {run.on}"]
    steady = f"{len(run.seconds)} steady step" + ("s" if len(run.seconds) != 1 else "")
    lines += [f"{described(run.choice)}; {steady}", ""]
    lines += [table(scores.table_rows(found), header=scores.HEADER), ""]
    lines += found.earlier.in_words()
    if found.earlier.runs:
        lines.append(f"a step by those: {duration(found.corrected_seconds)}")
    lines += [f"not kept for later plans: {doubt}" for doubt in found.doubts]
    if kept is not None:
        lines.append(f"x{found.factor:.3g} on what devices do by themselves; kept for later plans in {kept}")
    return "\n".join(lines)


def _said(text: str, as_json: bool) -> None:
    from lmworks.cli.console import say

    if not as_json:
        say(text)


def _text(found: Answer, machines: Cluster, recipe: Any, learnt: Correction, region: str | None) -> str:
    """The answer for people."""
    from lmworks.cli.console import table
    from lmworks.plan import report, search

    lines = [f"{found.devices} x {machines.device} ({machines.name})", ""]
    if found.plans:
        lines += [table(report.rows(found.plans), header=report.HEADER), ""]
        lines += report.breakdown(found.plans[0], machines.memory_bytes.value)
        lines += report.climate(found, found.plans[0], machines, region)
    else:
        lines.append("Nothing fits:")
        lines += [f"  {line}" for line in search.relaxed(found, machines, recipe)]
    lines += ["", *report.refusals(found, machines), *report.doubts(found, machines)]
    lines += learnt.in_words()
    return "\n".join(lines)
