"""How a run is asked to stop: a signal or a time limit. It finishes its step, saves, and ends with exit code 3."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what Slurm sends before it takes a job's time away."""


class StopRequest:
    """Catches the signals while it is entered. A second interrupt gives up at once, without saving."""

    def __init__(self, *, minutes: float | None = None) -> None:
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._minutes = minutes
        self._signal: str | None = None
        self._before: dict[signal.Signals, object] = {}

    def reason(self) -> str | None:
        """Why the run should stop now, or None."""
        if self._signal is not None:
            return f"got {self._signal}"
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return f"reached its limit of {self._minutes:g} minutes"
        return None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself returned

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number).name
