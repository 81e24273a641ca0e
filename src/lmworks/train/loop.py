"""The loop around the step: rates, records, validations, samples, checkpoints, stops."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from lmworks.core.errors import LmworksError, Stopped, UsageError
from lmworks.core.recipe import table_of
from lmworks.core.run import RunFolder, fresh
from lmworks.model.checkpoint import complete, write_shape
from lmworks.train import save
from lmworks.train.build import Built, build, settle
from lmworks.train.energy import Meter
from lmworks.train.rate import memory_bytes, peak_flops
from lmworks.train.recipe import MAY_DIFFER, Train
from lmworks.train.records import Progress, Records, Reporter, dropped
from lmworks.train.samples import must_fit_positions, sample
from lmworks.train.sinks import Row
from lmworks.train.slots import StepRecord, Watcher
from lmworks.train.stop import StopRequest
from lmworks.train.validate import validate


def run(recipe: Train, path: Path, *, resume: str, report: Reporter) -> RunFolder:
    """Run a recipe in a folder and return the folder when it is done.

    `resume`: 'auto' goes on with a run that is in the folder, 'never' starts a new one beside it, a path continues from
    that checkpoint. Raises Stopped (exit 3) when a signal or the time limit ended the run, saved as far as it was, and
    LmworksError when another process trains in the folder.
    """
    began = time.monotonic()
    recipe = settle(recipe)
    for sink in recipe.sinks:
        sink.must_be_installed()
    folder = RunFolder(fresh(path) if resume == "never" else path)
    with folder.alone(), StopRequest(minutes=recipe.max_minutes) as stop:
        if folder.exists():
            folder.must_match(recipe, may_differ=MAY_DIFFER)
            if folder.is_done() and resume == "auto":
                report.note("this run is already done; --resume never starts a new one beside it")
                return folder
        checkpoint = _checkpoint(folder, resume)
        snapshot = save.read(checkpoint) if checkpoint is not None else None
        built = _build(recipe, snapshot, stop, report)
        folder.create(recipe)
        built.prepared.tokenizer.save(folder.tokenizer)
        write_shape(folder.path, built.model.config)
        records = Records(built, folder, report, began=began)
        Loop(built, records, parent=checkpoint).run(snapshot, stop)
    return folder


def _checkpoint(folder: RunFolder, resume: str) -> Path | None:
    if resume not in ("auto", "never"):
        path = Path(resume)
        if not path.is_dir():
            raise UsageError(f"no checkpoint folder {resume}", next_step="--resume auto takes the newest complete one")
        return path
    found = complete(folder.checkpoints)
    return found[-1] if found else None


def _build(recipe: Train, snapshot: save.Snapshot | None, stop: StopRequest, report: Reporter) -> Built:
    """Everything the run is made of. A request to stop is heard while documents are made ready."""

    def preparing(**facts: Any) -> None:
        report.preparing(**facts)
        why = stop.reason()
        if why is not None:
            step = "the same command goes on; what was tokenised to its end is kept"
            raise Stopped(f"stopped while documents were made ready: {why}", next_step=step)

    built = build(recipe, progress=preparing, resume=None if snapshot is None else snapshot.state["source"])
    for text in dropped(built.prepared.manifest["sources"]):
        report.note(text)
    must_fit_positions(built.model, built.prepared.tokenizer, recipe.samples)
    return built


class Loop:
    """One run, from its first step or a checkpoint to its last step."""

    def __init__(self, built: Built, records: Records, *, parent: Path | None = None) -> None:
        self.built, self.records, self.parent = built, records, parent
        self.recipe, self.report, self.events = built.recipe, records.report, records.events
        self.progress = Progress()
        self.watchers: list[Watcher] = [settings.start() for settings in built.recipe.watchers]
        self.checkpoints = save.Checkpoints(records.folder.checkpoints, built.recipe.checkpoints)
        self.peak = peak_flops(built.device, built.dtype)
        self.meter = Meter(built.device)

    def run(self, snapshot: save.Snapshot | None, stop: StopRequest) -> None:
        """Go on from a checkpoint's snapshot, or from the start, to the end."""
        if snapshot is not None:
            self._restore(snapshot)
        later = self.checkpoints.forget_after(self.progress.step)
        if later:
            self.report.note(f"the checkpoints of later steps are deleted: {', '.join(map(str, later))}")
        self.records.open(self.progress, parent=self.parent, peak=self.peak)
        try:
            why = self._steps(stop)
        except BaseException:
            with suppress(OSError, LmworksError):  # the first error is the one to tell
                self.records.close(self.checkpoints.wait)
            raise
        self.records.close(self.checkpoints.wait)
        if why is not None:
            where = f"step {self.progress.step} of {self.recipe.steps}"
            raise Stopped(f"stopped at {where}: {why}", next_step="the same command goes on")
        self.records.summarise(self.progress)

    def _steps(self, stop: StopRequest) -> str | None:
        """Steps until the end, or until a signal or the time limit: its reason."""
        progress, recipe = self.progress, self.recipe
        self.meter.joules()  # what was spent before the first step is nobody's
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
        progress.tokens += result.targets
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
            "mfu": rate * self.built.cost.train_flops_per_token / self.peak[0],
            "memory_bytes": memory_bytes(self.built.device),
            **({"joules": joules} if (joules := self.meter.joules()) is not None else {}),
            **result.extra,
        }
        self.records.write(progress.step, row)
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
        self.records.write(self.progress.step, {"step": self.progress.step, "tokens": self.progress.tokens, **found})
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
        found: list[Row] = []
        with self.records.forgiving("sample"):
            found = sample(
                self.built.model, prepared.tokenizer, recipe.samples, seed=recipe.seed, step=self.progress.step
            )
        for row in found:
            self.records.samples.append(row)
        if found:
            self.report.note(f"sample: {found[0]['prompt']}{found[0]['text']}")

    def _save(self) -> None:
        with self.events.span("save"):
            self.records.sync()
            self.records.note_cost(self.progress)
            self.checkpoints.save(self.progress.step, self._snapshot())

    def _snapshot(self) -> save.Snapshot:
        step = self.built.step
        state = {
            **self.progress.state(),
            "source": step.source.state(),
            "watchers": [watcher.state() for watcher in self.watchers],
            "parts": parts_of(self.recipe),
        }
        tensors = {
            "model": dict(self.built.model.state_dict()),
            "optimizer": step.update.state(),
            "selector": step.selector.state(),
            "random": {**save.random_state(), "probe": step.probe.state()["generator"]},
        }
        return save.Snapshot(tensors=tensors, state=state)

    def _restore(self, snapshot: save.Snapshot) -> None:
        state, step, where = snapshot.state, self.built.step, str(self.parent)
        save.must_fit(snapshot.tensors["model"], self.built.model.state_dict(), where=where)
        changed = save.must_be_the_same_parts(state["parts"], parts_of(self.recipe), where=where)
        self.built.model.load_state_dict(dict(snapshot.tensors["model"]))
        step.update.load(snapshot.tensors["optimizer"])
        random = dict(snapshot.tensors["random"])
        step.probe.load({"generator": random.pop("probe")})
        save.set_random_state(random)
        step.source.load(state["source"])
        step.selector.load(snapshot.tensors["selector"])
        for watcher, kept in zip(self.watchers, state["watchers"], strict=True):
            watcher.load(kept)
        self.progress = Progress(**{entry.name: state[entry.name] for entry in fields(Progress)})
        self.report.note(f"going on from step {self.progress.step} ({self.parent})")
        if changed:
            self.report.note(f"with other settings than the checkpoint's: {'; '.join(changed)}")


def parts_of(recipe: Train) -> dict[str, Any]:
    """The settings of the parts whose state is in a checkpoint, or that act on the gradients it goes on with."""
    table = table_of(recipe)
    return {slot: table[slot] for slot in ("optimizer", "selector", "gradient", "watchers")}


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
