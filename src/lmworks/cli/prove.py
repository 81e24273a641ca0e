"""lmworks prove NAME: hold a method's claims against runs on this machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmworks.cli.console import answer, clock, say, table

if TYPE_CHECKING:
    from lmworks.prove.recipe import Proof


def prove(
    name: Annotated[str, typer.Argument(help="A method's name, or a proof file.")],
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds. Default: those of the proof.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a setting of the proof.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder. Default: runs/prove-<name>.")] = None,
    save: Annotated[bool, typer.Option("--save", help="Keep the result as evidence.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Decode the proof and its arms, run nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
) -> None:
    """Run a method's proof: its arms with the same seeds and data, equal budgets, and a verdict on every claim.

    Example: lmworks prove sophia --seeds 3 --save

    Exit 0 when every test holds, 4 when one does not. A proof that was killed goes on where it was.
    """
    import dataclasses

    from lmworks.core import recipe as recipes
    from lmworks.core.errors import UsageError
    from lmworks.core.papers import METHODS
    from lmworks.prove.compare import seeds_of

    if name in METHODS and METHODS[name].planned:
        raise UsageError(
            f"{name} is planned: there is nothing to prove yet", next_step="lmworks methods shows which are"
        )
    proof = recipes.load(name, verb="prove", sets=set_ or [])
    proof = dataclasses.replace(proof, seeds=tuple(seeds_of(proof, seeds)))
    if save and proof.method not in METHODS:
        raise UsageError("evidence belongs to a method", legal="a proof with `method`", where=name)
    if check:
        _check(proof)
        return
    content = run_proof(proof, out or Path("runs") / f"prove-{Path(name).stem}", as_json=as_json)
    if save:
        from lmworks.prove.evidence import save as keep

        say(f"evidence: {keep(content)}")
    if any(finding["verdict"] != "holds" for finding in content["findings"]):
        raise typer.Exit(4)


def _check(proof: Proof) -> None:
    from lmworks.core import recipe as recipes
    from lmworks.prove.recipe import arm_table

    for arm in proof.arms:
        recipes.decode(arm_table(proof, arm), verb="train", source=f"arm '{arm.name}'")
    typer.echo(recipes.dump(proof))


def run_proof(proof: Proof, folder: Path, *, as_json: bool) -> dict[str, Any]:
    """Compare, write the report, and show what was found; the comparison as JSON values."""
    import dataclasses

    from lmworks.prove import report
    from lmworks.prove.compare import compare
    from lmworks.prove.evidence import content_of

    claims = [dataclasses.asdict(claim) for claim in proof.claims]
    tested = [claim for claim in proof.claims if claim.untested is None]
    for claim in tested:
        say(f"claim {claim.name}: {claim.statement}\n      {claim.figure}, {claim.condition} ({claim.source})")
    if len(tested) < len(claims):
        say(f"{len(claims) - len(tested)} more claims are not tested here; lmworks methods {proof.method} says why")
    content = content_of(compare(proof, folder, Stages()))
    page = report.write(content, claims, folder)
    answer(content, as_json=as_json, text=_text(content))
    say(f"report: {page}")
    return content


def _text(content: dict[str, Any]) -> str:
    from lmworks.prove import report

    lines = [table(report.arm_rows(content), header=report.ARM_HEADER), ""]
    lines += report.finding_lines(content)
    for arm, what in content["confounded"].items():
        lines.append(f"confounded: {arm} differs from what it is held against in {', '.join(what)} as well")
    if len(content["seeds"]) < 5:
        lines.append(f"With {len(content['seeds'])} seeds the interval is the range of the paired values.")
    return "\n".join(lines)


class Stages:
    """Tells a person which jobs run, and how long the stage still takes."""

    def __init__(self) -> None:
        self._left = 0
        self._begun = 0.0
        self._done = 0

    def stage(self, name: str, jobs: int) -> None:
        """A stage begins."""
        self._left, self._done, self._begun = jobs, 0, time.monotonic()
        say(f"{name}: {jobs} to do" if jobs else f"{name}: all done")

    def job(self, name: str, event: str) -> None:
        """A job begins or ends."""
        if event == "started":
            return
        self._done += 1
        seconds = (time.monotonic() - self._begun) / self._done * (self._left - self._done)
        say(f"  {name} {event}  {self._done}/{self._left}, {clock(seconds)} left")
