"""lmworks launch RECIPE: start a training run on several ranks, here or on a Slurm cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def launch(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one (quickstart).")],
    local: Annotated[int | None, typer.Option("--local", min=1, help="Start so many ranks on this machine.")] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Make a batch script for a Slurm cluster.")] = False,
    run: Annotated[
        Path | None, typer.Option("--run", "--out", help="The run folder. Default: runs/<name of the recipe>.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a setting; may be given many times.")
    ] = None,
    resume: Annotated[str, typer.Option(help="auto, never, or a checkpoint folder; as in lmworks train.")] = "auto",
    max_restarts: Annotated[int, typer.Option(min=0, help="Start all ranks again so often after a failure.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of a rank. Default: the cores shared out.")
    ] = None,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that ranks have to save after a signal.")] = 120.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Slurm: print the script, write nothing.")] = False,
    submit: Annotated[bool, typer.Option("--submit", help="Slurm: hand the script to sbatch.")] = False,
    nodes: Annotated[int, typer.Option(min=1, help="Slurm: nodes.")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="Slurm: GPUs of a node.")] = None,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="Slurm: ranks of a node. Default: one a GPU.")
    ] = None,
    cpus_per_task: Annotated[int | None, typer.Option(min=1, help="Slurm: cores of a node.")] = None,
    time: Annotated[str, typer.Option(help="Slurm: limit of the job.")] = "01:00:00",
    partition: Annotated[str | None, typer.Option(help="Slurm: partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm: account.")] = None,
    qos: Annotated[str | None, typer.Option(help="Slurm: quality of service.")] = None,
    mem: Annotated[str | None, typer.Option(help="Slurm: memory of a node.")] = None,
    signal_lead: Annotated[int, typer.Option(min=10, help="Slurm: save so many seconds before the limit.")] = 180,
    max_requeues: Annotated[int, typer.Option(min=0, help="Slurm: go back into the queue so often.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Slurm: answer as JSON.")] = False,
) -> None:
    """Start a training run on several ranks. The first error is told last, with its rank and step.

    Example: lmworks launch quickstart --local 2 --max-restarts 1

    Exit 0 done, 1 failed, 2 usage or recipe, 3 stopped and resumable: that of the rank that ended first.
    """
    from lmworks.core import recipe as recipes
    from lmworks.core.errors import UsageError
    from lmworks.core.run import fresh

    if (local is None) == (not slurm):
        raise UsageError("say where the ranks start", legal="--local N, or --slurm")
    recipes.load(recipe, verb="train", sets=set_ or [])  # what is wrong with it is told before anything starts
    path = run or Path("runs") / recipes.find(recipe, "train").stem
    if resume == "never":
        path, resume = fresh(path), "auto"
    sets = [word for value in set_ or [] for word in ("--set", value)]
    words = ["-m", "lmworks", "train", recipe, "--run", str(path), *sets]
    if local is not None:
        _local(path, words, resume, local, max_restarts=max_restarts, threads=threads, grace=grace)
        return
    from lmworks.parallel.slurm import Job

    job = Job(
        run=path,
        nodes=nodes,
        ranks_per_node=ranks_per_node or gpus_per_node or 1,
        gpus_per_node=gpus_per_node,
        cpus_per_task=cpus_per_task,
        time=time,
        partition=partition,
        account=account,
        qos=qos,
        mem=mem,
        signal_lead=signal_lead,
        max_restarts=max_restarts,
        max_requeues=max_requeues,
    )
    if dry_run == submit:
        raise UsageError("say what becomes of the script", legal="--dry-run prints it, --submit hands it to sbatch")
    if resume != "auto":
        raise UsageError(f"--resume {resume} would be taken again after every requeue", legal="auto or never")
    _slurm(job, words, submit=submit, as_json=as_json)


def _local(
    path: Path, words: list[str], resume: str, ranks: int, *, max_restarts: int, threads: int | None, grace: float
) -> None:
    import sys

    from lmworks.cli.console import say
    from lmworks.parallel.launch import Launch, launch

    before = set(path.glob("checkpoints/step-*"))

    def command(restart: int) -> list[str]:
        """A checkpoint that was named holds until the run has saved one of its own."""
        own = restart > 0 and set(path.glob("checkpoints/step-*")) - before
        return [sys.executable, *words, "--resume", "auto" if own else resume]

    how = Launch(ranks=ranks, logs=path / "logs", max_restarts=max_restarts, threads=threads, grace=grace)
    launch(command, how, say)


def _slurm(job: object, words: list[str], *, submit: bool, as_json: bool) -> None:
    from lmworks.cli.console import answer
    from lmworks.parallel import slurm

    assert isinstance(job, slurm.Job)
    script = slurm.render(job, words)
    if not submit:
        answer({"script": script}, as_json=as_json, text=script.rstrip("\n"))
        return
    number = slurm.submit(script, job)
    answer({"job": number, "script": str(job.logs / "job.sbatch")}, as_json=as_json, text=number)
