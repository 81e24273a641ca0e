"""lmworks drill RECIPE: put a fault into a run of your own recipe, and see what becomes of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lmworks.guard.drill import Outcome


def drill(
    recipe: Annotated[str, typer.Argument(help="A training recipe, or the name of a shipped one.")],
    fault: Annotated[str, typer.Option(help="kill, hang, stuck, slow, nan, corrupt, diskfull or driver.")] = "kill",
    at: Annotated[
        str | None, typer.Option(help="start, load, forward, backward, reduce, update or save. Default: forward.")
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Ranks. Default: as many as the layout's axes say.")] = None,
    step: Annotated[int | None, typer.Option(min=1, help="The step it falls into. Default: the middle one.")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="The rank it falls on. Default: the last.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a setting; may be given many times.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the two runs. Default: runs/drill-<name of the recipe>.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run a recipe under a driver, undisturbed and with a fault: was it seen, mended, and is the result the same?

    Exit code 0: seen, the right rank named, and every loss to the last bit that of the undisturbed run; 4: not so.

    Example: lmworks drill quickstart --fault kill --at backward --ranks 2 --set steps=20 --set checkpoints.every=5
    """
    import dataclasses

    from lmworks.cli.console import answer, say
    from lmworks.core import recipe as recipes
    from lmworks.core.errors import UsageError
    from lmworks.core.run import fresh
    from lmworks.guard import drill as drilling
    from lmworks.guard.faults import KINDS, PHASES, phase_of

    phase = phase_of(fault, at)
    decoded = recipes.load(recipe, verb="train", sets=set_ or [])
    count = ranks or decoded.layout.asked or 1
    victim = count - 1 if rank is None else rank
    when = max(1, decoded.steps // 2) if step is None else step
    if victim >= count:
        raise UsageError(f"there is no rank {victim} of {count}", where="--rank", legal=f"0 to {count - 1}")
    _must_be_there(decoded, phase, fault, count, when)
    name = recipes.find(recipe, "train").stem
    folder = out or fresh(Path("runs") / f"drill-{name}")
    if (folder / "undisturbed").exists():
        raise UsageError("a drill was here already", where=str(folder), next_step="--out for another folder")
    scene = drilling.Scene(recipe=recipe, sets=tuple(set_ or ()), ranks=count, folder=folder)
    say(f"an undisturbed run of {count} rank{'s' if count > 1 else ''}: {folder / 'undisturbed'}")
    twin = drilling.undisturbed(scene)
    say(f"{fault}: {KINDS[fault]}, {PHASES[phase]}; step {when}, rank {victim}")
    found = drilling.drill(scene, twin, kind=fault, at=phase, step=when, rank=victim)
    answer(dataclasses.asdict(found) | {"passed": found.passed}, as_json=as_json, text=_described(found))
    if not found.passed:
        raise typer.Exit(4)


def _must_be_there(recipe: object, phase: str, fault: str, ranks: int, step: int) -> None:
    """Refuse a fault that could not happen in this run."""
    from lmworks.core.errors import UsageError
    from lmworks.train.recipe import Train

    assert isinstance(recipe, Train)
    every = recipe.checkpoints.every
    if step > recipe.steps:
        raise UsageError(f"the run has {recipe.steps} steps", where="--step", legal=f"1 to {recipe.steps}")
    if phase == "reduce" and ranks == 1:
        raise UsageError("one rank exchanges nothing", where="--at reduce", next_step="--ranks 2")
    if every is None and (phase in ("save", "load") or fault == "corrupt"):
        raise UsageError("this run saves only at its end", next_step="--set checkpoints.every=5")
    if fault == "corrupt" and every is not None and step <= every:
        raise UsageError(
            f"no checkpoint is there before step {step}", where="--step", legal=f"{every + 1} to {recipe.steps}"
        )


def _described(found: Outcome) -> str:
    """The outcome as a small table and a sentence."""
    from lmworks.cli.console import table

    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f} s"

    named = {None: "-", True: f"rank {found.rank}, rightly", False: "another, or none"}[found.named]
    lines = [
        ["taken for", found.kind or "nothing was seen"],
        ["detected after", seconds(found.detected)],
        ["culprit named", named],
        ["next step after", seconds(found.recovered)],
        ["caught up after", seconds(found.caught_up)],
        ["steps done twice", str(found.lost_steps)],
        ["attempts", str(found.attempts)],
        ["exit code", str(found.code)],
        ["losses", "equal to the last bit" if found.differs is None else f"differ from step {found.differs} on"],
    ]
    verdict = "recovered: the run is the undisturbed one" if found.passed else f"NOT recovered; see {found.log}"
    said = [f'the driver said: "{found.said}"'] if found.said else []
    return "\n".join([table(lines, header=[f"{found.fault} at {found.at}", f"step {found.step}"]), *said, verdict])
