"""lmworks guard RECIPE: train on several ranks and nodes, under a driver that sees failures and mends them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lmworks.guard.nodes import Nodes


def guard(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one (quickstart).")],
    ranks_per_node: Annotated[int, typer.Option(min=1, help="Ranks of a node: one a GPU.")] = 1,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Nodes. Here: so many groups of processes; Slurm: those of the job.")
    ] = None,
    spares: Annotated[int, typer.Option(min=0, help="Nodes, of these, that wait to take another one's place.")] = 0,
    slurm: Annotated[bool, typer.Option("--slurm", help="Inside a Slurm job: its nodes.")] = False,
    run: Annotated[
        Path | None, typer.Option("--run", help="The run folder. Default: runs/<name of the recipe>.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a setting; may be given many times.")
    ] = None,
    resume: Annotated[str, typer.Option(help="auto, or never; as in lmworks train.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of a rank. Default: the cores shared out.")
    ] = None,
    missed: Annotated[float, typer.Option(min=2.0, help="Seconds without a heart-beat that are borne.")] = 15.0,
    still: Annotated[
        float, typer.Option(min=2.0, help="Seconds without progress of any rank that are borne; 10 steps at least.")
    ] = 60.0,
    tries: Annotated[int, typer.Option(min=1, help="Give up after so many failures without a new checkpoint.")] = 3,
    grace: Annotated[
        float, typer.Option(min=0.0, help="Seconds that ranks have to save once a stop is asked for.")
    ] = 120.0,
    evict_slow: Annotated[bool, typer.Option("--evict-slow", help="Evict a node that slows the others down.")] = False,
) -> None:
    """Train under a driver: it sees dead, silent, hanging and slow ranks, stops all, checks the nodes, replaces or
    leaves out the bad ones, and goes on from the newest complete checkpoint.

    When the driver itself dies the ranks go on, and the same command takes over. Under torchrun, one process a node,
    each process is the agent of its node.

    Example: lmworks guard quickstart --ranks-per-node 2 --set steps=20

    Exit 0 done, 1 failed or given up, 2 usage or recipe, 3 stopped and resumable.
    """
    from lmworks.cli.console import say
    from lmworks.core import recipe as recipes
    from lmworks.core.errors import UsageError
    from lmworks.core.run import fresh
    from lmworks.guard.diagnose import Rules
    from lmworks.guard.driver import Driving, drive
    from lmworks.guard.report import Plan
    from lmworks.parallel.world import seat

    if resume not in ("auto", "never"):
        raise UsageError(f"--resume {resume} would be taken again after every failure", legal="auto or never")
    if resume == "never" and seat().world > 1:
        raise UsageError("each node would take a folder of its own", where="--resume never", next_step="--run NEW")
    decoded = recipes.load(recipe, verb="train", sets=set_ or [])
    path = run or Path("runs") / recipes.find(recipe, "train").stem
    path = fresh(path) if resume == "never" else path
    found = _nodes(path, nodes, slurm=slurm)
    if found is None:
        return
    count = len(found.names()) - spares
    if count < 1:
        raise UsageError(f"{spares} spares of {len(found.names())} nodes", where="--spares", legal="fewer than nodes")
    fits = frozenset(n for n in range(1, count + 1) if not _refused(decoded, n * ranks_per_node))
    if count not in fits:
        raise _refused(decoded, count * ranks_per_node)[0]
    sets = [word for value in set_ or [] for word in ("--set", value)]
    program = ("-m", "lmworks", "train", recipe, "--run", str(path), *sets)
    drive(
        Driving(
            run=path,
            plan=Plan(program=program, ranks_per_node=ranks_per_node, threads=threads, grace=grace, local=found.local),
            nodes=found,
            spares=spares,
            rules=Rules(missed=missed, still=still, tries=tries, grace=grace, evict_slow=evict_slow),
            fits=fits,
            note=say,
            show=lambda text: typer.echo(text, err=True, nl=False),
        )
    )
    typer.echo(str(path))


def _nodes(path: Path, count: int | None, *, slurm: bool) -> Nodes | None:
    """The nodes of the run. None where this process was the agent of one of torchrun's, whose driver is rank 0's."""
    import subprocess
    import sys

    from lmworks.core.errors import UsageError
    from lmworks.guard import agent
    from lmworks.guard.nodes import Given, Local, Slurm
    from lmworks.parallel.world import seat

    place = seat()
    if place.world > 1:
        if count is not None or slurm:
            raise UsageError("torchrun says which nodes there are", where="--slurm" if slurm else "--nodes")
        mine = [str(path), f"node-{place.rank}", "--given"]
        if not place.first:
            agent.main(mine)
            return None
        subprocess.Popen([sys.executable, "-m", "lmworks.guard.agent", *mine], start_new_session=True)
        return Given(tuple(f"node-{i}" for i in range(place.world)), local=place.local_world == place.world)
    if slurm:
        return Slurm(path, count)
    return Local(path, count or 1)


def _refused(recipe: Any, ranks: int) -> list[Exception]:
    """Why the recipe's layout does not work with so many ranks, if it does not."""
    import dataclasses

    from lmworks.core.errors import LmworksError, RecipeError
    from lmworks.parallel.layout import problems_of

    try:
        settled = dataclasses.replace(recipe, layout=recipe.layout.settle(ranks, recipe))
        problems = problems_of(settled)
    except LmworksError as error:
        return [error]
    return [RecipeError(problems)] if problems else []
