"""lmworks trace RUN: where the time of each rank went, which rank is slow, and who did not arrive when a run hung."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmworks.cli.console import answer, table

if TYPE_CHECKING:
    from lmworks.audit.trace import Trace

MOST_COLUMNS = 9
"""Of the heat map on a terminal; the page has all."""


def trace(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    steps: Annotated[
        str | None,
        typer.Option(metavar="A:B", help="Only the steps from A to B, both included; either may be left out."),
    ] = None,
    perfetto: Annotated[Path | None, typer.Option(help="Write spans as JSON for ui.perfetto.dev.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write timeline, heat map and grid of ranks as one page.")] = None,
    hang: Annotated[
        bool,
        typer.Option("--hang", help="Say who did not arrive when ranks waited in vain, from their flight records."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
) -> None:
    """Where the time of each rank went: a heat map of ranks and segments, the slow rank by name, a timeline.

    Example: lmworks trace runs/quickstart --html trace.html
    """
    from lmworks.audit import hang as hangs
    from lmworks.audit import trace as traces
    from lmworks.audit import trace_page

    folder = hangs.newest(run)
    if hang:
        _hang(run, folder, as_json=as_json)
        return
    found = traces.read(run, **_span(steps))
    if perfetto is not None:
        trace_page.perfetto(found, perfetto)
    if html is not None:
        trace_page.page(found, html, stuck=None if folder is None else hangs.read(folder))
    answer(_content(found), as_json=as_json, text=_text(found, hung=folder))


def _hang(run: Path, folder: Path | None, *, as_json: bool) -> None:
    from lmworks.audit import hang as hangs
    from lmworks.core.errors import UsageError

    if not run.is_dir():
        raise UsageError("no run is here", where=str(run), next_step="name a run folder: lmworks trace runs/quickstart")
    if folder is None:
        text = f"no rank of {run} has left a flight record: none has waited in vain"
        answer({"folder": None, "suspects": [], "waits": []}, as_json=as_json, text=text)
        return
    found = hangs.read(folder)
    answer(hangs.report(found), as_json=as_json, text=hangs.text(found))


def _span(steps: str | None) -> dict[str, int | None]:
    from lmworks.core.errors import UsageError

    if steps is None:
        return {"first": None, "last": None}
    first, colon, last = steps.partition(":")
    ends = [int(end) if end.isdigit() else None for end in (first, last)]
    if not colon or any(text and end is None for text, end in zip((first, last), ends, strict=True)):
        raise UsageError(
            f"--steps {steps}", legal="A:B, as in 10:20, 10: or :20", next_step="lmworks trace RUN --steps 10:20"
        )
    return {"first": ends[0], "last": ends[1]}


def _content(found: Trace) -> dict[str, Any]:
    from lmworks.audit import trace as traces

    return {
        "run": found.run,
        "steps": found.steps,
        "ranks": [rank.number for rank in found.ranks],
        "seconds": traces.heat(found),
        "slow": [vars(slow) | {"text": slow.text()} for slow in traces.slow_ranks(found)],
        "grid": traces.grid(found),
        "clock_error": max(rank.error for rank in found.ranks),
    }


def _text(found: Trace, *, hung: Path | None) -> str:
    """The heat map in milliseconds, then who is slow."""
    from lmworks.audit import trace as traces

    seconds = traces.heat(found)
    names = list(seconds)[:MOST_COLUMNS]
    rows = [
        [str(rank.number), *(f"{1e3 * seconds[name][i]:.2f}" for name in names)] for i, rank in enumerate(found.ranks)
    ]
    first, last = found.steps[0], found.steps[-1]
    lines = [f"median ms a step, {len(found.steps)} steps from {first} to {last}; work without the exchanges inside it"]
    lines.append(table(rows, header=["rank", *names]))
    if len(seconds) > len(names):
        lines.append(f"and {len(seconds) - len(names)} more with --html or --json")
    slow = [entry.text() for entry in traces.slow_ranks(found)]
    lines += slow or (["no rank is slower than its peers"] if len(found.ranks) > 1 else [])
    if hung is not None:
        lines.append(f"flight records are in {hung}: lmworks trace RUN --hang")
    return "\n".join(lines)
