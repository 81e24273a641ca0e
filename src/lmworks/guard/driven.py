"""A driver of nodes on this machine as a process of its own, which a drill can kill.

    python -m lmworks.guard.driven FILE

FILE is what the drill wrote: run, plan, nodes, rules.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lmworks.core.errors import LmworksError
from lmworks.guard.diagnose import Rules
from lmworks.guard.driver import Driving, drive
from lmworks.guard.nodes import Local
from lmworks.guard.report import Plan


def main(words: list[str]) -> int:
    """Drive the run; its exit code."""
    table = json.loads(Path(words[0]).read_text(encoding="utf-8"))
    plan = Plan(**table["plan"] | {"program": tuple(table["plan"]["program"])})
    run = Path(table["run"])

    def note(text: str) -> None:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    try:
        nodes = Local(run, table["nodes"])
        fits = frozenset({table["nodes"]})
        drive(Driving(run=run, plan=plan, nodes=nodes, rules=Rules(**table["rules"]), fits=fits, note=note))
    except LmworksError as error:
        note(f"lmworks: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
