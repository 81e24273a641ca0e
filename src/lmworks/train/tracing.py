"""How a run tells where its time goes: spans of each step, clocks of ranks held against each other, flight records.

Every step leaves one event, `sums`: calls, seconds and bytes by name. Some leave their spans one by one as well.
`lmworks trace` reads them.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch

from lmworks.core.errors import LmworksError, OutOfMemory
from lmworks.core.events import Events
from lmworks.core.recipe import NonNegativeInt, PositiveFloat, PositiveInt
from lmworks.core.run import RunFolder
from lmworks.core.spans import Recorded, sums
from lmworks.parallel.clock import align, clock_of
from lmworks.parallel.flight import Recorder
from lmworks.parallel.layout import AXES
from lmworks.parallel.wire import Wire

EARLY = 3
"""This step of each attempt has its spans written: what is made once is behind it."""
ALIGN_EVERY = 500
"""Steps between two comparisons of the ranks' clocks."""


@dataclass(frozen=True, kw_only=True)
class Tracing:
    """What a run tells of its own time."""

    on: bool = True
    """Record spans. Flight records are kept either way."""
    every: NonNegativeInt = 50
    """Steps between two steps whose spans are written one by one, as those of an attempt's third step are; 0: none."""
    patience: PositiveFloat = 300.0
    """Seconds without any movement after which a rank writes its flight record, and asks the others for theirs."""
    collect_every: PositiveInt | None = None
    """Steps between two collections of Python's garbage, in the same steps on all ranks; left out: when Python likes,
    on each rank at another time, which the others wait for."""


class _Taken(NamedTuple):
    """What was recorded of a step."""

    step: int
    inside: Recorded
    between: Recorded
    """After the step before."""
    traced: bool
    """Whether spans are written one by one."""


@final
class Tracer:
    """Takes the spans of one rank step by step, and watches over its flight record."""

    def __init__(
        self,
        settings: Tracing,
        wire: Wire,
        events: Events,
        folder: RunFolder,
        *,
        device: torch.device,
        told: Callable[[str], None],
    ) -> None:
        self._settings, self._wire, self._events, self._folder = settings, wire, events, folder
        self._device, self._told = device, told
        self._spans = wire.spans
        self._waiting: deque[_Taken] = deque()
        """Not yet read: on a GPU a step's spans are read a step later, when nothing waits for them."""
        self._stack = ExitStack()
        self._recorder: Recorder | None = None
        self._step = self._began = 0

    def begin(self, step: int) -> None:
        """The first step is about to run; all ranks are here. `step`: the one that this attempt goes on from."""
        self._step = self._began = step
        if self._device.type == "cuda":
            self._spans.clock = clock_of(self._device)
        self._spans.on = self._settings.on
        self._align()
        attempt = self._wire.told(time.strftime("%Y%m%dT%H%M%S", time.gmtime()))
        self._wire.flight.touch()
        self._recorder = self._stack.enter_context(
            Recorder(
                self._wire.flight,
                self._folder.flight / f"{attempt}-{step}",
                rank=self._wire.rank,
                facts=self._facts,
                moved=lambda: self._spans.moved,
                patience=self._settings.patience,
                told=self._told,
            )
        )
        if self._settings.collect_every is not None:
            self._stack.enter_context(_collected_by_hand())

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around one step, `number` of the run. A step that fails leaves its spans, for the flight record."""
        self._step = number
        self._wire.flight.touch()
        if number % ALIGN_EVERY == 0:
            self._align()
        every = self._settings.every
        traced = every > 0 and (number % every == 0 or number == self._began + EARLY)
        between = self._spans.take()  # a validation's, for one: they are in no step's sums
        yield
        if self._spans.on:
            self._waiting.append(_Taken(number, self._spans.take(), between, traced))
        while len(self._waiting) > self._spans.clock.behind:
            self._write(self._waiting.popleft())
        collect = self._settings.collect_every
        if collect is not None and number % collect == 0:
            gc.collect()

    def failed(self, error: BaseException) -> None:
        """The run ends with an error: keep where this rank stands, and have the others do so, unless all were told."""
        if self._recorder is None or (isinstance(error, LmworksError) and not isinstance(error, OutOfMemory)):
            return
        if self._wire.layout.ranks > 1:
            path = self._recorder.write(f"{type(error).__name__}: {error}", replace=False)
            if path is not None:
                error.add_note(f"where each rank stood is in {path.parent}: lmworks trace {self._folder.path} --hang")

    def close(self, *, together: bool) -> None:
        """Write what is left. `together`: all ranks are here, so that clocks are held against each other once more.
        Where they are not, something went wrong, and a GPU may not be asked any more."""
        if not together and self._spans.clock.behind:
            self._waiting.clear()
        while self._waiting:
            self._write(self._waiting.popleft())
        if together:
            self._align()
        self._spans.on = False
        self._spans.take()
        self._stack.close()
        self._recorder = None

    def _align(self) -> None:
        if self._wire.layout.ranks == 1 or not self._settings.on:
            return
        found = align(self._wire, self._spans.clock.now)
        self._events.write("clock", start=found.at, end=found.at, offset=found.seconds, error=found.error)

    def _write(self, taken: _Taken) -> None:
        found = [each.read() for each in taken.inside]
        table = {
            name: [entry.calls, round(entry.seconds, 7), entry.bytes, int(entry.exchange)]
            for name, entry in sums(found).items()
        }
        end = max((span.end for span in found), default=self._spans.clock.now())
        start = min((span.start for span in found), default=end)
        now, self._events.step = self._events.step, taken.step
        self._events.write("sums", start=start, end=end, stream="sums", spans=table)
        self._events.step = now
        if taken.traced:
            self._events.spans((*(each.read() for each in taken.between), *found), step=taken.step)

    def _facts(self) -> Mapping[str, Any]:
        layout = self._wire.layout
        return {
            "run": self._folder.name,
            "world": layout.ranks,
            "axes": {axis: layout.place(self._wire.rank, axis) for axis in AXES},
            "groups": self._wire.members() if layout.ranks > 1 else {},
            "step": self._step,
            "doing": self._spans.doing(),
        }


@contextmanager
def _collected_by_hand() -> Iterator[None]:
    """Python collects no garbage by itself inside."""
    on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
