"""What runs jobs: a part, so that a recipe can name it. All of them run the same process on the same folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from lmworks.core.errors import LmworksError
from lmworks.jobs.job import JobFolder

Told = Callable[[str, str], None]
"""Called with a job's name and 'started' or 'done'."""


class Executor(ABC):
    """Runs every job of a list that has no result yet."""

    def run(self, folder: JobFolder, names: Sequence[str], told: Told) -> None:
        """Return when all have results. Raises LmworksError, with the end of its log, for the first that failed."""
        waiting = [name for name in names if not folder.is_done(name)]
        if waiting:
            self.start(folder, waiting, told)
        failed = [name for name in waiting if not folder.is_done(name)]
        if failed:
            first = min(failed, key=lambda name: (not folder.log(name).exists(), failed.index(name)))
            raise LmworksError(
                f"job '{first}' failed:\n{folder.why_failed(first)}",
                where=str(folder.log(first)),
                next_step="the same command goes on; jobs that are done are not run again",
            )

    @abstractmethod
    def start(self, folder: JobFolder, names: Sequence[str], told: Told) -> None:
        """Run these jobs to their ends, failed ones too, unless one fails and nothing was gained by going on."""
