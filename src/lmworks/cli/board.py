"""lmworks board: a local web page over run folders and evidence."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

PORT = 8472


def board(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Run folders, or folders that hold some. Default: runs.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = PORT,
    host: Annotated[
        str, typer.Option(help="The address to listen on. Beyond this machine, a token is asked for.")
    ] = "127.0.0.1",
    evidence: Annotated[
        Path | None, typer.Option(help="A folder of evidence of your own, in place of what lmworks ships.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list of runs as JSON and stop.")] = False,
) -> None:
    """Show runs, comparisons and the methods' ledger as a page in the browser; it reads, and changes nothing.

    Example: lmworks board runs --port 8472
    """
    from lmworks.core.need import must_be_there

    for package in ("starlette", "uvicorn", "markdown_it"):
        must_be_there(package, extra="board", why="the board")
    from lmworks.board.app import Board
    from lmworks.cli.console import answer

    made = Board(_folders(runs), _folder(evidence) if evidence is not None else None)
    if as_json:
        answer(made.rows(), as_json=True, text="")
        return
    made.ledger.entries()  # evidence that cannot be read is told now
    _serve(made, host, port)


def _serve(made: Any, host: str, port: int) -> None:
    from lmworks.board import serve
    from lmworks.board.app import make
    from lmworks.board.guard import Guard
    from lmworks.cli.console import say

    with serve.bound(host, port) as listening:
        taken = listening.getsockname()[1]
        guard = Guard.of(host, taken)

        def started() -> None:
            typer.echo(serve.address(guard, taken))
            say("Open the address above. Ctrl-C ends the board; the runs go on.")

        with suppress(KeyboardInterrupt):  # whether one comes through hangs on where the server is
            serve.serve(make(made, guard), listening, started=started)
        say("the board is closed")


def _folders(runs: list[Path] | None) -> list[Path]:
    """The folders that were asked for; the default one need not be there yet."""
    return [_folder(path) for path in runs] if runs else [Path("runs")]


def _folder(path: Path) -> Path:
    from lmworks.core.errors import UsageError

    if not path.is_dir():
        raise UsageError("there is no such folder", where=str(path), next_step="lmworks board FOLDER, such as runs")
    return path
