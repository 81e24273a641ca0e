"""python -m lmworks.jobs FOLDER NAME: run one job of a folder.

With --child the process ends itself (SIGTERM, so that training saves first) when the process that started it is gone.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from lmworks.jobs.job import JobFolder, execute


def _end_with_parent() -> None:
    """The parent holds the other end of our standard input; it closes when the parent ends, however it ends."""
    while os.read(0, 1):  # not sys.stdin: its lock would still be held when the interpreter shuts down
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main(arguments: list[str]) -> int:
    """Run the job; the exit code is that of its error."""
    child = "--child" in arguments
    folder, name = (a for a in arguments if a != "--child")
    if child:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    return execute(JobFolder(Path(folder)), name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
