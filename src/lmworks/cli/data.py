"""lmworks data RECIPE: documents through stages, every one of them accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lmworks.cli.console import Reporter, answer, say, table


def data(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one (stdlib).")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder. Default: runs/data-<name of the recipe>.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a setting; may be given many times.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Decode the recipe, print it with every default and what it would take."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
) -> None:
    """Clean, deduplicate and split documents; what is left out lies apart, each document with its reason.

    Example: lmworks data stdlib --out runs/documents

    A run that was killed goes on where it was; changed settings run again only what they touch.
    """
    from lmworks.core import recipe as recipes
    from lmworks.make.trial import budget

    decoded = recipes.load(recipe, verb="data", sets=set_ or [])
    if check:
        typer.echo(recipes.dump(decoded))
        typer.echo(f"# {budget(decoded).line()}")
        return
    content = run(decoded, out or Path("runs") / f"data-{recipes.find(recipe, 'data').stem}")
    answer(content, as_json=as_json, text=_text(content))


def run(decoded: Any, folder: Path) -> dict[str, Any]:
    """Run a data recipe, write its report, and put documents and dropped documents in their places."""
    from lmworks.cli.prove import Stages
    from lmworks.core.errors import DataError
    from lmworks.make import account, report, rounds
    from lmworks.make.trial import budget

    if not rounds.DataFolder(folder).account.is_file():
        say(budget(decoded).line())
    trail = rounds.clean(decoded, folder, Stages(), Reporter().preparing)
    content = {**account.account(decoded, trail), "folder": str(folder)}
    page = report.write(content, folder)
    say(f"report: {page}")
    rounds.publish_dropped(decoded, folder, trail)
    rounds.publish_tables(decoded, folder, trail)
    for source, step in account.gone_sources(content).items():
        raise DataError(
            f"nothing is left of the source '{source}': '{step}' dropped its last documents",
            where=str(folder),
            next_step=f"{page} shows why; change the stage, or leave the source out of the recipe",
        )
    rounds.publish(decoded, folder, trail)
    return content


def _text(content: dict[str, Any]) -> str:
    from lmworks.make import report

    lines = [table(report.rows(content), header=report.HEADER), ""]
    splits = ", ".join(f"{count:,} {name}" for name, count in content["splits"].items())
    return "\n".join([*lines, f"documents: {splits}", f"{content['folder']}/documents"])
