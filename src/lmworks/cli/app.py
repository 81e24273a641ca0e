"""The command `lmworks`: its verbs, and how errors reach a person.

Exit codes: 0 done, 1 failed, 2 usage or recipe, 3 stopped and resumable, 4 the answer is no.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import typer

from lmworks.cli import (
    audit,
    board,
    chat,
    compare,
    data,
    doctor,
    drill,
    eval,
    export,
    fetch,
    generate,
    guard,
    launch,
    methods,
    mix,
    plan,
    probe,
    prove,
    quickstart,
    rehearse,
    tokenizer,
    trace,
    train,
)
from lmworks.core.errors import LmworksError

VERBS: dict[str, Callable[..., None]] = {
    "quickstart": quickstart.quickstart,
    "data": data.data,
    "mix": mix.mix,
    "train": train.train,
    "plan": plan.plan,
    "rehearse": rehearse.rehearse,
    "launch": launch.launch,
    "guard": guard.guard,
    "drill": drill.drill,
    "probe": probe.probe,
    "fetch": fetch.fetch,
    "generate": generate.generate,
    "chat": chat.chat,
    "export": export.export,
    "eval": eval.eval,
    "trace": trace.trace,
    "doctor": doctor.doctor,
    "methods": methods.methods,
    "compare": compare.compare,
    "prove": prove.prove,
    "board": board.board,
}

app = typer.Typer(
    name="lmworks",
    help="Every published way to train a language model, as a part you can switch on, combine and prove.\n\n"
    "Start with: lmworks quickstart",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _verb in VERBS.items():
    app.command(_name)(_verb)
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(audit.app, name="audit")


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("lmworks"))
        raise typer.Exit


SPIN = "10000"
"""Turns that an idle OpenMP thread waits busily before it sleeps: long enough for the gaps between two operations."""


def main() -> None:
    """Run the command line; a person's mistake ends with a message and an exit code, never with a stack trace."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # libgomp's own default spins so long that a run beside one other busy process is several times slower.
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN)
    try:
        app()
    except LmworksError as error:
        _tell(error, str(error))
        sys.exit(error.exit_code)
    except OSError as error:  # a full disk, a folder that went away: the machine's state, not our bug
        _tell(error, f"{error.filename or 'the machine'}: {error.strerror or error}")
        sys.exit(1)
    except KeyboardInterrupt as error:
        _tell(error, "interrupted")
        sys.exit(130)
    except Exception as error:
        _for_launcher(error)
        raise


def _tell(error: BaseException, text: str) -> None:
    """Say what went wrong, unless a launcher will: it tells the first error of all ranks, last."""
    if not _for_launcher(error):
        typer.echo(f"lmworks: {text}", err=True)


def _for_launcher(error: BaseException) -> bool:
    """Whether this is a rank whose launcher will tell the error."""
    if "RANK" not in os.environ:
        return False
    from lmworks.parallel import failure

    return failure.write(error)
