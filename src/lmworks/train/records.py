"""What a run leaves behind in its folder and in its sinks: rows, texts, events, the record, the summary."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from lmworks.core.energy.grid import in_words
from lmworks.core.errors import LmworksError
from lmworks.core.events import Events
from lmworks.core.files import sha256_of, write_json
from lmworks.core.journal import Journal, rewind, rows
from lmworks.core.recipe import table_of
from lmworks.core.run import RunFolder, record_of
from lmworks.model.pretrained import Pretrained
from lmworks.parallel.footprint import Footprint, as_table
from lmworks.parallel.layout import AXES
from lmworks.train.build import Built
from lmworks.train.checkpoints import News
from lmworks.train.curves import draw
from lmworks.train.energy import Account
from lmworks.train.rate import peak_memory_bytes
from lmworks.train.sinks import Row, Writer


class Reporter(Protocol):
    """Who is told how the run goes: a progress bar, lines in a log, or nobody."""

    def note(self, text: str) -> None:
        """A sentence for people."""
        ...

    def preparing(
        self, *, stage: str, done: int, total: int | None, unit: str, seconds_left: float | None = None
    ) -> None:
        """How far the documents are on their way to tokens."""
        ...

    def begin(self, step: int, steps: int) -> None:
        """The first step is about to run."""
        ...

    def row(self, row: Row) -> None:
        """A finished row of metrics.jsonl."""
        ...

    def end(self) -> None:
        """The last step has run."""
        ...


class Unheard:
    """The reporter of ranks but the first."""

    def note(self, text: str) -> None:
        """Nothing."""

    def preparing(self, **facts: Any) -> None:
        """Nothing."""

    def begin(self, step: int, steps: int) -> None:
        """Nothing."""

    def row(self, row: Row) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


@dataclass(kw_only=True)
class Progress:
    """What the loop itself remembers; all of it is in the checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Of all steps."""
    flops: float = 0.0
    """Of training and of the probe's passes."""
    wall_seconds: float = 0.0
    """From the start to this moment, over all attempts, as far as checkpoints know of them."""
    peak_memory_bytes: int = 0
    """The most memory of any attempt."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    energy: Account = field(default_factory=dict)
    """Joules by phase, of all attempts."""
    stopped: str | None = None
    """Why a watcher ended the run early."""

    def state(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        return asdict(self)


class Records:
    """The files of one run, open for writing. Ranks but the first keep rows and events in a folder of their own."""

    def __init__(self, built: Built, run: RunFolder, report: Reporter, *, began: float) -> None:
        self.built, self.report = built, report
        layout, rank = built.wire.layout, built.wire.rank
        self.first = rank == 0
        self.folder = run if self.first else run.of_rank(rank)
        axes = {axis: layout.place(rank, axis) for axis in AXES if layout.size(axis) > 1}
        clock = built.wire.spans.clock.now  # one clock for all that is written
        self.events = Events(self.folder.events, run=run.name, rank=rank, axes=axes, clock=clock)
        self.memory: Footprint | None = None
        """What this rank takes; None before it was measured."""
        self.energy: dict[str, Any] | None = None
        """What the run took, for summary and record; None where nothing is counted."""
        self._sinks: list[Writer] = []
        self._began = began
        self._wall_before = 0.0

    def open(self, progress: Progress, *, parent: Path | None, peak: tuple[float, str]) -> None:
        """Cut rows and texts back to where the run goes on from, write record.json, open the sinks."""
        folder, at = self.folder, progress.step
        self._wall_before = progress.wall_seconds
        rewind(folder.metrics, lambda row: row["step"] <= at)
        rewind(folder.samples, lambda row: row["step"] <= at)
        self.metrics, self.samples = Journal(folder.metrics), Journal(folder.samples)
        if self.first:
            folder.summary.unlink(missing_ok=True)
            self._write_record(at, parent, peak)
            recipe = self.built.recipe
            self._sinks = [sink.open(folder, table_of(recipe), step=at) for sink in recipe.sinks]
        self.events.step = at
        self.events.write("start", resumed_from=str(parent) if parent else None)

    def write(self, step: int, row: Row) -> None:
        """A row of metrics.jsonl, for the sinks and the reporter too."""
        self.metrics.append(row)
        for sink in self._sinks:
            sink.write(step, row)
        self.report.row(row)

    @contextmanager
    def forgiving(self, what: str) -> Iterator[None]:
        """Let a run go on when something beside it fails (a text, not the training): it is told and kept as an event.

        RuntimeError is what torch raises when a device or the machine has no memory left.
        """
        try:
            with self.events.span(what):
                yield
        except (LmworksError, RuntimeError, MemoryError) as error:
            self.events.write(f"{what} failed", reason=str(error))
            self.report.note(f"no {what}, the run goes on: {error}")

    def checkpoint(self, news: News) -> None:
        """What became of a checkpoint: an event, and a sentence where something went wrong."""
        self.events.write(news.name, **news.facts)
        if news.text is not None:
            self.report.note(news.text)

    def sync(self) -> None:
        """Make all rows and texts durable: a checkpoint may only be newer than what led to it."""
        self.metrics.sync()
        self.samples.sync()

    def note_cost(self, progress: Progress) -> None:
        """Bring time and memory up to this moment."""
        progress.wall_seconds = self._wall_before + time.monotonic() - self._began
        progress.peak_memory_bytes = max(progress.peak_memory_bytes, peak_memory_bytes(self.built.device))

    def close(self, finish: Callable[[], None]) -> None:
        """Write everything out, close the sinks, draw the curves; `finish` waits for the last checkpoint."""
        self.report.end()
        finish()
        for (axis, operation), bill in self.built.wire.bills.items():
            self.events.write("sent", axis=axis, operation=operation, calls=bill.calls, bytes=round(bill.bytes))
        self.metrics.flush()
        self.samples.flush()
        self.events.flush()
        for sink in self._sinks:
            sink.close()
        if self.first:
            if self.energy is not None:
                self.folder.add_to_record(energy=self.energy)
            draw(self.folder)

    def summarise(self, progress: Progress) -> None:
        """Write summary.json: the run is done."""
        if not self.first:
            return
        self.note_cost(progress)
        recipe = self.built.recipe
        last: Row = {}
        for row in rows(self.folder.metrics):
            last |= row
        names = ("loss", "grad_norm", "val_loss", "val_bits_per_byte")
        trained = progress.step * recipe.batch_size * recipe.data.sequence_length
        summary = {
            "steps": progress.step,
            "tokens": progress.tokens,
            "parameters": self.built.cost.parameters,
            **{name: last[name] for name in names if name in last},
            "seconds": progress.seconds,
            "wall_seconds": progress.wall_seconds,
            "flops": progress.flops,
            "tokens_per_second": trained / progress.seconds,
            "peak_memory_bytes": progress.peak_memory_bytes,
            "memory": {
                "predicted": self.built.account.predicted.by_class(),
                "measured": None if self.memory is None else self.memory.by_class(),
            },
            "energy": self.energy,
            "changes": progress.changes,
            "stopped": progress.stopped,
        }
        write_json(self.folder.summary, summary)
        if self.energy is not None:
            self.report.note(f"energy: {in_words(self.energy)}")
        if self.memory is not None:
            table = as_table(self.built.account.predicted, self.memory)
            self.report.note("\n".join(["memory beside the program itself:", *(f"  {line}" for line in table)]))

    def _write_record(self, step: int, parent: Path | None, peak: tuple[float, str]) -> None:
        built, device = self.built, self.built.device
        facts = record_of(built.recipe)
        facts["hardware"] |= {"threads": torch.get_num_threads(), "device": str(device)}
        if device.type == "cuda":
            facts["hardware"]["gpu"] = torch.cuda.get_device_name(device)
        came_from = {"path": str(parent), "sha256": sha256_of(parent / "manifest.json")} if parent else None
        attempt = {name: facts[name] for name in ("code", "versions", "hardware", "command")}
        attempt = {"began": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": step, "parent": came_from, **attempt}
        record = {
            **facts,
            "data": built.prepared.manifest,
            "parent": came_from,
            "pretrained": self._pretrained(),
            "parameters": built.cost.parameters,
            "peak_flops": peak[0],
            "peak_flops_source": peak[1],
        }
        self.folder.write_record(record, attempt)

    def _pretrained(self) -> dict[str, Any] | None:
        """Where the first weights came from; a run that goes on keeps what it wrote at its start."""
        model = self.built.recipe.model
        if not isinstance(model, Pretrained):
            return None
        if self.folder.record.is_file():
            before = json.loads(self.folder.record.read_text(encoding="utf-8")).get("pretrained")
            if before is not None:
                return dict(before)
        return {"path": model.path, "sha256": model.hashes()}


def dropped(sources: dict[str, Any]) -> Sequence[str]:
    """A sentence for each source of a data manifest that has documents which were left out."""
    found = []
    for name, facts in sources.items():
        documents = facts["documents"]
        reasons = [
            f"{count} {why} ({', '.join(documents['dropped_names'][why][:3])}{', ...' if count > 3 else ''})"
            for why, count in documents["dropped"].items()
        ]
        if reasons:
            total = sum(documents["dropped"].values())
            found.append(f"{name}: {documents['kept']} documents kept, {total} left out: {'; '.join(reasons)}")
    return found
