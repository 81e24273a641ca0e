"""How a long job looks: a progress bar with the time left on a terminal, plain lines otherwise."""

from __future__ import annotations

import json
import sys
import time
from types import TracebackType
from typing import Any

import typer

Row = dict[str, Any]


def say(text: str) -> None:
    """A line for people, on standard error, so that standard output stays clean for answers."""
    typer.echo(text, err=True)


def answer(value: Any, *, as_json: bool, text: str) -> None:
    """The answer of a verb on standard output: JSON for scripts, text for people."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False) if as_json else text)


def table(rows: list[list[str]], *, header: list[str]) -> str:
    """A plain text table, columns as wide as their longest cell."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def clock(seconds: float) -> str:
    """'0:42' or '1:02:03'."""
    hours, rest = divmod(max(0, round(seconds)), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


def count(value: float) -> str:
    """'134.5M' for 134515008: three or four figures and a letter."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.1f}{letter}"
    return f"{value:.0f}"


class Reporter:
    """Tells a person how a run goes. Implements what train.loop asks of a reporter."""

    def __init__(self) -> None:
        self._steps = 0
        self._first = 0
        self._begun = time.monotonic()
        self._said = 0.0
        self._validation = ""
        self._bar: _Bar | None = None

    def note(self, text: str) -> None:
        """A sentence, above the bar when there is one."""
        if self._bar is not None:
            self._bar.above(text)
        else:
            say(text)

    def preparing(
        self, *, stage: str, done: int, total: int | None, unit: str, seconds_left: float | None = None
    ) -> None:
        """How far the documents are; at most once a second."""
        finished = total is not None and done >= total
        if time.monotonic() - self._said < 1.0 and not finished:
            return
        self._said = time.monotonic()
        of = f" of {count(total)}" if total is not None else ""
        left = f", {clock(seconds_left)} left" if seconds_left is not None and not finished else ""
        say(f"{stage}: {count(done)}{of} {unit}{left}")

    def begin(self, step: int, steps: int) -> None:
        """The first step is about to run."""
        self._steps, self._first, self._begun = steps, step, time.monotonic()
        if sys.stderr.isatty():
            self._bar = _Bar(step, steps)

    def row(self, row: Row) -> None:
        """One finished step, or one validation."""
        if "val_loss" in row:
            bits = f" ({row['val_bits_per_byte']:.3f} bits/byte)" if "val_bits_per_byte" in row else ""
            self._validation = f"  val {row['val_loss']:.4f}{bits}"
            if self._bar is None:
                say(f"step {row['step']}/{self._steps}{self._validation}")
            return
        step = row["step"]
        left = (time.monotonic() - self._begun) / max(1, step - self._first) * (self._steps - step)
        line = (
            f"loss {row['loss']:.4f}  norm {row['grad_norm']:.2f}  lr {row['lr']:.2e}"
            f"  {count(row['tokens_per_second'])} tok/s  {row['memory_bytes'] / 2**30:.2f} GiB"
        )
        if self._bar is not None:
            self._bar.move(step, line + self._validation)
        elif time.monotonic() - self._said >= 1.0 or step == self._steps:
            self._said = time.monotonic()
            say(f"step {step}/{self._steps}  {line}  left {clock(left)}")

    def end(self) -> None:
        """The last step has run."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


class _Bar:
    """rich's progress bar on standard error."""

    def __init__(self, step: int, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TimeRemainingColumn(),
            TextColumn("{task.fields[line]}"),
            console=Console(stderr=True),
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("train", total=steps, completed=step, line="")
        self._progress.start()

    def above(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def move(self, step: int, line: str) -> None:
        self._progress.update(self._task, completed=step, line=line)

    def close(self) -> None:
        self._progress.stop()
