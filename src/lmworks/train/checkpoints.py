"""When a run is saved: copied to host memory, written beside training, kept, and given up where a store is too slow.

    stage 1   all ranks copy what they write to memory that they keep for it; training stands still
    stage 2   a thread writes the copy, syncs it and renames it (`save.write`); training goes on

Before stage 1 the ranks agree whether the checkpoint before is written everywhere. One that is still being written
after `patience` seconds costs this one: it is skipped, by all ranks, and said. One that could not be written costs
nothing but itself: that is said too, and the next one is tried. Only the last one of a run must be written.
"""

from __future__ import annotations

import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lmworks.core import files
from lmworks.core.errors import CheckpointError
from lmworks.core.recipe import NonNegativeFloat, PositiveInt
from lmworks.model.checkpoint import complete, step_of
from lmworks.train import save
from lmworks.train.save import Snapshot
from lmworks.train.staging import Staging

HURRY_SECONDS = 10
"""How long a rank that is known to be gone, or to have failed, is waited for."""
AGAIN_SECONDS = 5.0
"""How often the ranks ask each other whether the checkpoint before is written."""


@dataclass(frozen=True, kw_only=True)
class Saving:
    """When checkpoints are written and which are kept."""

    every: PositiveInt | None = None
    """Steps between checkpoints; left out: only at the end and when the run is stopped."""
    keep: PositiveInt = 2
    """How many of the newest are kept."""
    keep_every: PositiveInt | None = None
    """Steps whose multiples are kept for good."""
    background: bool = True
    """Copy to host memory, then write while training goes on."""
    patience: NonNegativeFloat = 60.0
    """Seconds that training waits for the checkpoint before, when it is still being written; then this one is skipped.
    The last one of a run waits as long as it takes."""


@dataclass(frozen=True, kw_only=True)
class News:
    """What became of a checkpoint: an event, and a sentence for people where something went wrong."""

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    text: str | None = None


class Checkpoints:
    """The checkpoints of one run, as one of its ranks sees them: `seat` = (rank, ranks).

    `tell` hears, on the thread that trains, what became of them. `agree`: of each fact, whether it holds on any rank.
    """

    def __init__(
        self,
        folder: Path,
        saving: Saving,
        seat: tuple[int, int] = (0, 1),
        *,
        tell: Callable[[News], None] = lambda news: None,
        agree: Callable[[Sequence[bool]], Sequence[bool]] = lambda facts: facts,
    ) -> None:
        self.folder = folder
        self._saving = saving
        self._seat = seat
        self._tell, self._agree = tell, agree
        self._staging = Staging()
        self._writing: _Writing | None = None
        self._until = math.inf
        self._missed = 0
        """Checkpoints in a row that are not there."""
        self._newest = max((step_of(path) for path in complete(folder)), default=None)
        if seat[0] == 0:
            for leftover in folder.glob(".writing-*"):
                shutil.rmtree(leftover)

    def forget_after(self, step: int) -> list[int]:
        """Delete the checkpoints of later steps, which a run that goes on from `step` left behind; their steps.

        Without this the next start would take one of them, and not what was written since.
        """
        later = [path for path in complete(self.folder) if step_of(path) > step]
        for path in [_doomed(path) for path in later]:  # all names are gone before the first byte is
            shutil.rmtree(path)
        return [step_of(path) for path in later]

    def save(self, step: int, snapshot: Snapshot, *, last: bool = False) -> float:
        """Write a checkpoint, in the background when so set; the seconds that training stood still for it.

        What fails is told, and no error: neither this one, which is told later, nor the one before. `last`: the run
        ends with it, and `wait` raises what it meets. All ranks call it together.
        """
        began = time.monotonic()
        free = self._is_written(last=last)
        if free:
            self._begin(step, snapshot)
        else:
            self._is_missing(step, "skipped", self._why_skipped())
        blocked = time.monotonic() - began
        if free:
            self._tell(News(name="checkpoint", facts={"of": step, "blocked_seconds": blocked}))
        return blocked

    def wait(self) -> None:
        """Return when nothing is being written. Raises CheckpointError when the last write failed."""
        writing = self._writing
        if writing is not None and writing.thread is not None:
            writing.thread.join()
        self._take(raising=True)

    def hurry(self) -> None:
        """Give up soon on what other ranks have not written: one of them is gone."""
        self._until = time.monotonic() + HURRY_SECONDS

    # --- the checkpoint before ----------------------------------------------------------------------------------------

    def _is_written(self, *, last: bool) -> bool:
        """Whether nothing is being written any more on any rank, after no more than `patience`.

        The ranks ask each other every few seconds, for none of them may wait for an answer longer than a collective
        does; how often hangs on the setting and on no clock, so they end together.
        """
        left = self._saving.patience
        while True:
            nap = AGAIN_SECONDS if last else min(left, AGAIN_SECONDS)
            busy, failed = self._agree(self._look(nap))
            if failed:  # its part will not come, and the first rank may not have heard of it
                self._until = min(self._until, time.monotonic())
                busy, _ = self._agree(self._look(HURRY_SECONDS))
            self._take(raising=False)
            left -= nap
            if not busy or (left <= 0 and not last):
                return not busy

    def _look(self, seconds: float) -> tuple[bool, bool]:
        """Whether this rank still writes after so many seconds, and whether it could not."""
        writing = self._writing
        if writing is None:
            return False, False
        if writing.thread is not None:
            writing.thread.join(seconds)
        return writing.busy, writing.failure is not None

    def _take(self, *, raising: bool) -> None:
        """Tell what became of what was written, once it is over. An error that is none of a store is raised always."""
        writing = self._writing
        if writing is None or writing.busy:
            return
        self._writing = None
        if writing.failure is None:
            self._missed, self._newest = 0, writing.step
            self._tell(News(name="checkpoint written", facts={"of": writing.step, "seconds": writing.seconds}))
        elif raising or not isinstance(writing.failure, CheckpointError):
            raise writing.failure
        else:
            self._is_missing(writing.step, "failed", writing.failure.what)

    def _why_skipped(self) -> str:
        if self._writing is None:
            return "another rank still writes the one before"
        seconds = time.monotonic() - self._writing.began
        limit = f"checkpoints.patience is {self._saving.patience:g} s"
        return f"that of step {self._writing.step} is still being written after {seconds:.0f} s ({limit})"

    def _is_missing(self, step: int, how: str, why: str) -> None:
        """Tell of a checkpoint that is not there, and what a kill would cost now."""
        self._missed += 1
        newest = "there is none yet" if self._newest is None else f"the newest is of step {self._newest}"
        row = f", {self._missed} in a row" if self._missed > 1 else ""
        text = f"NO CHECKPOINT of step {step}{row}: {why}. Training goes on, the next one is tried; {newest}"
        facts = {"of": step, "reason": why, "in_a_row": self._missed}
        self._tell(News(name=f"checkpoint {how}", facts=facts, text=text))

    # --- this one -----------------------------------------------------------------------------------------------------

    def _begin(self, step: int, snapshot: Snapshot) -> None:
        self._until = math.inf
        writing = _Writing(step)
        if self._saving.background:
            held = self._staging.copy(snapshot.tensors)
            state = json.loads(json.dumps(snapshot.state))
            copy = Snapshot(tensors=held, state=state, boxes=snapshot.boxes)
            writing.thread = threading.Thread(
                target=writing.guarded, args=(lambda: self._write(step, copy),), name="checkpoint", daemon=False
            )
            writing.thread.start()  # one that could not be started is not waited for
            self._writing = writing
        else:
            writing.guarded(lambda: self._write(step, snapshot))
            self._writing = writing

    def _write(self, step: int, snapshot: Snapshot) -> None:
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".writing-{final.name}"
        if self._seat[0] == 0:
            self._clear_up(temporary)
        try:
            save.write(temporary, snapshot, self._seat, until=lambda: self._until)
            if self._seat[0] > 0:
                return  # the first rank goes on when all have come so far
            if final.exists():  # from an attempt that went further than the checkpoint this one resumed from
                _remove(final)
            temporary.rename(final)
            files.sync(self.folder)
        except (OSError, SafetensorError) as error:
            if self._seat[0] == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"could not be written: {files.why_not_written(error)}",
                where=str(final),
                next_step="make room, then run the same command again: it resumes from the newest complete checkpoint",
            ) from error
        self._drop_old()

    def _drop_old(self) -> None:
        every = self._saving.keep_every
        spare = [p for p in complete(self.folder) if every is None or step_of(p) % every != 0]
        for path in spare[: -self._saving.keep]:
            _remove(path)

    def _clear_up(self, temporary: Path) -> None:
        """Make room: delete what was not written to its end. Of the checkpoint that begins other ranks write already;
        of all others the ranks have agreed that nobody does."""
        for leftover in self.folder.glob(".writing-*"):
            if leftover != temporary or self._seat[1] == 1:
                shutil.rmtree(leftover, ignore_errors=True)


class _Writing:
    """A checkpoint on its way to the store."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.began = time.monotonic()
        self.seconds = 0.0
        self.failure: BaseException | None = None
        self.thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def guarded(self, write: Callable[[], None]) -> None:
        """Write; what is met is kept for the thread that trains."""
        try:
            write()
        except BaseException as error:  # noqa: BLE001  (told or raised by Checkpoints)
            self.failure = error
        self.seconds = time.monotonic() - self.began


def _remove(path: Path) -> None:
    """Delete a checkpoint; a kill while files are being deleted must not leave half of one under its name."""
    shutil.rmtree(_doomed(path))


def _doomed(path: Path) -> Path:
    return path.rename(path.with_name(f".writing-old-{path.name}"))
