"""The loop around the step: rates, records, validations, samples, checkpoints, stops."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lmworks.core.errors import LmworksError, Stopped, UsageError
from lmworks.core.events import Events
from lmworks.core.files import write_json
from lmworks.core.journal import Journal, rewind, rows
from lmworks.core.recipe import table_of
from lmworks.core.run import RunFolder, fresh, record_of
from lmworks.model.checkpoint import write_shape
from lmworks.train import save
from lmworks.train.build import Built, build, settle
from lmworks.train.curves import draw
from lmworks.train.rate import memory_bytes, peak_flops, peak_memory_bytes
from lmworks.train.recipe import MAY_DIFFER, Train
from lmworks.train.samples import sample
from lmworks.train.sinks import Row, Writer
from lmworks.train.slots import StepRecord, Watcher
from lmworks.train.stop import StopRequest
from lmworks.train.validate import validate


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


@dataclass(kw_only=True)
class Progress:
    """What the loop itself remembers; all of it is in the checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    """Of training and of the probe's passes."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    stopped: str | None = None
    """Why a watcher ended the run early."""


def run(recipe: Train, path: Path, *, resume: str, report: Reporter) -> RunFolder:
    """Run a recipe in a folder and return the folder when it is done.

    `resume`: 'auto' goes on with a run that is in the folder, 'never' starts a new one beside it, a path continues from
    that checkpoint. Raises Stopped (exit 3) when a signal or the time limit ended the run after saving it.
    """
    recipe = settle(recipe)
    folder = RunFolder(fresh(path) if resume == "never" else path)
    if folder.exists():
        folder.must_match(recipe, may_differ=MAY_DIFFER)
        if folder.is_done() and resume == "auto":
            report.note("this run is already done; --resume never starts a new one beside it")
            return folder
    checkpoint = _checkpoint(folder, resume)
    snapshot = save.read(checkpoint) if checkpoint is not None else None
    built = build(recipe, progress=report.preparing, resume=None if snapshot is None else snapshot.state["source"])
    folder.create(recipe)
    built.prepared.tokenizer.save(folder.tokenizer)
    write_shape(folder.path, built.model.config)
    with StopRequest(minutes=recipe.max_minutes) as stop:
        Loop(built, folder, report, parent=checkpoint).run(snapshot, stop)
    return folder


def _checkpoint(folder: RunFolder, resume: str) -> Path | None:
    if resume not in ("auto", "never"):
        path = Path(resume)
        if not path.is_dir():
            raise UsageError(f"no checkpoint folder {resume}", next_step="--resume auto takes the newest complete one")
        return path
    found = save.complete(folder.checkpoints)
    return found[-1] if found else None


class Loop:
    """One run, from its first step or a checkpoint to its last step."""

    def __init__(self, built: Built, folder: RunFolder, report: Reporter, *, parent: Path | None = None) -> None:
        self.built, self.folder, self.report, self.parent = built, folder, report, parent
        self.recipe = built.recipe
        self.progress = Progress()
        self.watchers: list[Watcher] = [settings.start() for settings in built.recipe.watchers]
        self.checkpoints = save.Checkpoints(folder.checkpoints, built.recipe.checkpoints)
        self.events = Events(folder.events, run=folder.name)
        self.peak, self.peak_source = peak_flops(built.device, built.dtype)

    def run(self, snapshot: save.Snapshot | None, stop: StopRequest) -> None:
        """Go on from a checkpoint's snapshot, or from the start, to the end."""
        self._open(snapshot)
        try:
            why = self._steps(stop)
        except BaseException:
            with suppress(OSError, LmworksError):  # the first error is the one to tell
                self._close()
            raise
        self._close()
        if why is not None:
            where = f"step {self.progress.step} of {self.recipe.steps}"
            raise Stopped(f"stopped at {where}: {why}", next_step="the same command goes on")
        write_json(self.folder.summary, self._summary())

    def _steps(self, stop: StopRequest) -> str | None:
        """Steps until the end, or until a signal or the time limit: its reason."""
        progress, recipe = self.progress, self.recipe
        self.report.begin(progress.step, recipe.steps)
        while progress.step < recipe.steps and progress.stopped is None:
            record = self._step()
            self._watch(record)
            at_end = progress.step == recipe.steps or progress.stopped is not None
            why = stop.reason()
            if _due(recipe.samples.every, progress.step) or at_end:
                self._sample()
            if _due(recipe.checkpoints.every, progress.step) or at_end or why is not None:
                self._save()
            if why is not None and not at_end:
                return why
        return None

    def _step(self) -> StepRecord:
        """One step, its row in metrics.jsonl, and a validation when one is due."""
        progress, recipe = self.progress, self.recipe
        self.events.step = progress.step + 1
        lr = self.built.step.update.set_lr(recipe.schedule.factor(progress.step, recipe.steps))
        start, begun = time.perf_counter(), time.time()
        result = self.built.step()
        seconds = time.perf_counter() - start
        self.events.write("step", start=begun, end=begun + seconds)
        progress.step += 1
        progress.tokens += result.units["cross_entropy"]
        progress.seconds += seconds
        progress.flops += result.passes * self.built.cost.forward_flops_per_token
        rate = recipe.batch_size * recipe.data.sequence_length / seconds
        row: Row = {
            "step": progress.step,
            "tokens": progress.tokens,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "seconds": seconds,
            "flops": progress.flops,
            "tokens_per_second": rate,
            "mfu": rate * self.built.cost.train_flops_per_token / self.peak,
            "memory_bytes": memory_bytes(self.built.device),
            **result.extra,
        }
        self._write(row)
        found = (
            self._validate() if _due(recipe.validation.every, progress.step) or progress.step == recipe.steps else None
        )
        return StepRecord(
            step=progress.step,
            tokens=progress.tokens,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=lr,
            seconds=seconds,
            validation=found,
        )

    def _validate(self) -> dict[str, float] | None:
        with self.events.span("validate"):
            batches = self.built.prepared.validation(self.recipe.validation.rows)
            sources = list(self.recipe.data.shares)
            found = validate(self.built.model, batches, self.built.device, sources)
        if not found:
            return None
        self._write({"step": self.progress.step, "tokens": self.progress.tokens, **found})
        return found

    def _watch(self, record: StepRecord) -> None:
        for watcher in self.watchers:
            change = watcher.look(record, self.built.step.probe)
            if change is not None:
                self.progress.changes.append({"step": record.step, "reason": change.reason, "stop": change.stop})
                self.events.write("change", reason=change.reason, stop=change.stop)
                self.report.note(change.reason)
                if change.stop:
                    self.progress.stopped = change.reason

    def _sample(self) -> None:
        recipe, prepared = self.recipe, self.built.prepared
        with self.events.span("sample"):
            found = sample(
                self.built.model, prepared.tokenizer, recipe.samples, seed=recipe.seed, step=self.progress.step
            )
        for row in found:
            self.samples.append(row)
        if found:
            self.report.note(f"sample: {found[0]['prompt']}{found[0]['text']}")

    def _save(self) -> None:
        with self.events.span("save"):
            self.metrics.flush()
            self.samples.flush()
            self.checkpoints.save(self.progress.step, self._snapshot())

    def _snapshot(self) -> save.Snapshot:
        step, progress = self.built.step, self.progress
        state = {
            "step": progress.step,
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "flops": progress.flops,
            "changes": progress.changes,
            "stopped": progress.stopped,
            "source": step.source.state(),
            "watchers": [watcher.state() for watcher in self.watchers],
        }
        tensors = {
            "model": dict(self.built.model.state_dict()),
            "optimizer": step.update.state(),
            "selector": step.selector.state(),
            "random": {**save.random_state(), "probe": step.probe.state()["generator"]},
        }
        return save.Snapshot(tensors=tensors, state=state)

    def _open(self, snapshot: save.Snapshot | None) -> None:
        """Take a checkpoint's state, if there is one, and cut the records back to it."""
        if snapshot is not None:
            self._restore(snapshot)
        at = self.progress.step
        rewind(self.folder.metrics, lambda row: row["step"] <= at)
        rewind(self.folder.samples, lambda row: row["step"] <= at)
        self.metrics, self.samples = Journal(self.folder.metrics), Journal(self.folder.samples)
        self.sinks: list[Writer] = [
            sink.open(self.folder, table_of(self.recipe), step=at) for sink in self.recipe.sinks
        ]
        self.folder.summary.unlink(missing_ok=True)
        write_json(self.folder.record, self._record())
        self.events.step = at
        self.events.write("start", resumed_from=str(self.parent) if self.parent else None)

    def _restore(self, snapshot: save.Snapshot) -> None:
        state, step = snapshot.state, self.built.step
        save.must_fit(snapshot.tensors["model"], self.built.model.state_dict(), where=str(self.parent))
        self.built.model.load_state_dict(dict(snapshot.tensors["model"]))
        step.update.load(snapshot.tensors["optimizer"])
        random = dict(snapshot.tensors["random"])
        step.probe.load({"generator": random.pop("probe")})
        save.set_random_state(random)
        step.source.load(state["source"])
        step.selector.load(snapshot.tensors["selector"])
        for watcher, kept in zip(self.watchers, state["watchers"], strict=True):
            watcher.load(kept)
        names = ("step", "tokens", "seconds", "flops", "changes", "stopped")
        self.progress = Progress(**{name: state[name] for name in names})
        self.report.note(f"going on from step {self.progress.step} ({self.parent})")

    def _record(self) -> dict[str, Any]:
        prepared = self.built.prepared
        return {
            **record_of(self.recipe),
            "data": prepared.manifest,
            "parent": str(self.parent) if self.parent else None,
            "parameters": self.built.cost.parameters,
            "peak_flops": self.peak,
            "peak_flops_source": self.peak_source,
        }

    def _write(self, row: Row) -> None:
        self.metrics.append(row)
        for sink in self.sinks:
            sink.write(self.progress.step, row)
        self.report.row(row)

    def _close(self) -> None:
        self.report.end()
        self.checkpoints.wait()
        self.metrics.flush()
        self.samples.flush()
        self.events.flush()
        for sink in self.sinks:
            sink.close()
        draw(self.folder)

    def _summary(self) -> dict[str, Any]:
        progress = self.progress
        last: Row = {}
        for row in rows(self.folder.metrics):
            last |= row
        names = ("loss", "grad_norm", "val_loss", "val_bits_per_byte")
        return {
            "steps": progress.step,
            "tokens": progress.tokens,
            "parameters": self.built.cost.parameters,
            **{name: last[name] for name in names if name in last},
            "seconds": progress.seconds,
            "flops": progress.flops,
            "tokens_per_second": progress.step
            * self.recipe.batch_size
            * self.recipe.data.sequence_length
            / progress.seconds,
            "peak_memory_bytes": peak_memory_bytes(self.built.device),
            "changes": progress.changes,
            "stopped": progress.stopped,
        }


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
