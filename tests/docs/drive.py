"""Run many `lmworks` commands in one process, so that torch is imported once.

python drive.py JOBS.json RESULTS.json: a job is {cwd, argv, how}. how = 'run' runs it; 'parse' only parses verb and
options. A result is {code, out, err}.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import typer.main

from lmworks.cli import main
from lmworks.cli.app import app


def run(argv: list[str]) -> int:
    """What the installed command does, and its exit code; a traceback counts as 70."""
    sys.argv = ["lmworks", *argv]
    try:
        main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:  # noqa: BLE001  (one command that breaks must not hide the others)
        traceback.print_exc()
        return 70
    return 0


def parse(argv: list[str]) -> int:
    """Whether verb, arguments and options exist; nothing runs."""
    group = typer.main.get_command(app)
    context = group.make_context("lmworks", [], resilient_parsing=True)
    try:
        name, command, rest = group.resolve_command(context, argv)
        command.make_context(name, rest, parent=context)
    except Exception as error:  # noqa: BLE001  (click's errors, whichever click it is)
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    return 0


def drive(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of all jobs, in order."""
    results = []
    for job in jobs:
        os.chdir(job["cwd"])
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = (run if job["how"] == "run" else parse)(job["argv"])
        results.append({"code": code, "out": out.getvalue(), "err": err.getvalue()})
    return results


if __name__ == "__main__":
    asked, answered = (
        Path(sys.argv[1]).resolve(),
        Path(sys.argv[2]).resolve(),
    )  # commands change both argv and folder
    answered.write_text(json.dumps(drive(json.loads(asked.read_text()))))
