"""Start a training run again and again, kill it each time at a random moment, until it ends. Run as a script.

    python -m tests.train.killed SPEC.json

SPEC: {"table": recipe table, "run": folder, "delays": [seconds, ...]}, each counted from where an attempt's steps
begin. Each child is forked from this process, which has imported everything but started no thread, so that a kill costs
a tenth of a second and not an import of torch.
Prints one line for each kill: the newest step in metrics.jsonl, the complete checkpoints, whether a save was going on.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from lmworks.core import recipe as recipes
from lmworks.core.journal import rows
from lmworks.core.run import RunFolder
from lmworks.model.checkpoint import complete, step_of
from lmworks.train import save
from lmworks.train.loop import run
from tests.train.toy import Silent


def slowly(*words: Any, **named: Any) -> None:
    """Write a file of a checkpoint as on a busy disk, so that some kills fall into a save."""
    save_file(*words, **named)
    time.sleep(0.02)


class Telling(Silent):
    """Writes a byte when the first step is about to run."""

    def __init__(self, pipe: int) -> None:
        super().__init__()
        self.pipe = pipe

    def begin(self, step: int, steps: int) -> None:
        os.write(self.pipe, b".")


def child(spec: dict[str, object], pipe: int) -> None:
    """One attempt, in a forked process that ends without returning."""
    code = 1
    save.save_file = slowly
    try:
        run(recipes.decode(spec["table"]), Path(str(spec["run"])), resume="auto", report=Telling(pipe))  # type: ignore[arg-type]
        code = 0
    finally:
        traceback.print_exception(sys.exception())
        sys.stderr.flush()
        os._exit(code)


def main() -> int:
    """Kill and start again; 0 when the last attempt ended by itself."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    folder = RunFolder(Path(spec["run"]))
    for delay in [*spec["delays"], None]:
        begun, pipe = os.pipe()
        pid = os.fork()
        if pid == 0:
            child(spec, pipe)
        os.close(pipe)
        if delay is not None:
            os.read(begun, 1)  # until the steps begin: a busy machine takes long to get there
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        os.close(begun)
        seen = max((row["step"] for row in rows(folder.metrics)), default=0)
        saved = [step_of(path) for path in complete(folder.checkpoints)]
        writing = any(folder.checkpoints.glob(".writing-*"))
        print(json.dumps({"status": status, "step": seen, "saved": saved, "writing": writing}), flush=True)  # noqa: T201
        if status == 0:
            return 0
        if os.WIFEXITED(status):
            return 1
    return 1


if __name__ == "__main__":
    sys.exit(main())
