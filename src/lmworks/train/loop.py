"""The loop around the step: rates, records, validations, samples, checkpoints, stops."""

from __future__ import annotations

import time
from contextlib import nullcontext, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from lmworks.core import recipe as recipes
from lmworks.core.errors import LmworksError, OutOfMemory, RecipeError, Stopped, UsageError
from lmworks.core.run import RunFolder, fresh
from lmworks.model.checkpoint import complete, unfinished, write_shape
from lmworks.model.pieces import Pieces
from lmworks.parallel import failure, feedback, restore, spread, world
from lmworks.parallel.footprint import Footprint, in_words, listed, measured
from lmworks.parallel.gather import gather
from lmworks.parallel.layout import Layout
from lmworks.parallel.pulse import Pulse
from lmworks.parallel.wire import Wire
from lmworks.train import save
from lmworks.train.build import Built, build, settle
from lmworks.train.checkpoints import Checkpoints
from lmworks.train.energy import Meter, meter_of
from lmworks.train.rate import memory_bytes, most_bytes, peak_flops
from lmworks.train.recipe import MAY_DIFFER, Train, may_differ
from lmworks.train.records import Progress, Records, Reporter, Unheard, dropped
from lmworks.train.samples import must_fit_positions, sample
from lmworks.train.shortage import explained
from lmworks.train.sinks import Row
from lmworks.train.slots import StepRecord, Watcher
from lmworks.train.spending import Spending
from lmworks.train.step import StepResult
from lmworks.train.stop import StopRequest
from lmworks.train.tracing import Tracer
from lmworks.train.validate import validate


def run(recipe: Train, path: Path, *, resume: str, report: Reporter) -> RunFolder:
    """Run a recipe in a folder and return the folder when it is done. Under torchrun every rank calls it.

    `resume`: 'auto' goes on with a run that is in the folder, 'never' starts a new one beside it, a path continues from
    that checkpoint. Raises Stopped (exit 3) when a signal or the time limit ended the run, saved as far as it was, and
    LmworksError when another process trains in the folder.
    """
    began = time.monotonic()
    place = world.seat()
    notes = recipe.layout.notes(place.world, recipe)
    recipe = settle(recipe, place.world)
    for sink in recipe.sinks:
        sink.must_be_installed()
    device = world.device_of(recipe.device, place)
    assert isinstance(recipe.layout, Layout), "settle leaves a layout"
    place = world.seated(place, recipe.layout)
    with Pulse() as pulse, world.connected(place, device):
        wire = pulse.on(world.wire(recipe.layout, place))
        path = Path(wire.told(str(fresh(path) if resume == "never" else path)))
        folder = RunFolder(path)
        alone = folder.alone() if place.first else nullcontext()
        meter = meter_of(recipe.energy, device, first_here=wire.first_here)
        with alone, StopRequest(minutes=recipe.max_minutes) as stop, meter.running():
            report = report if place.first else Unheard()
            checkpoint = _start(folder, recipe, resume, wire)
            if checkpoint is DONE:
                report.note("this run is already done; --resume never starts a new one beside it")
                return folder
            for text in (*notes, *passed_over(folder, wire.rank)):
                report.note(text)
            stored = save.Stored(checkpoint, wire.seat) if checkpoint is not None else None
            built = _build(recipe, wire, device, stored, stop, report)
            if place.first:
                folder.create(recipe)
                built.prepared.tokenizer.save(folder.tokenizer)
                write_shape(folder.path, built.placement.chunks[0].config)
            wire.wait()
            records = Records(built, folder, report, began=began)
            pulse.events = records.events
            try:
                Loop(built, records, folder, meter, parent=checkpoint).run(stored, stop)
            finally:
                built.step.close()
    return folder


MEASURE_EVERY = 100
"""Steps between two counts of the bytes that wait for the backward pass."""
MEASURE_EARLY = (1, 3)
"""Of each attempt the second step is counted as well, since the first one still makes what is kept from step to step;
and the fourth: what a policy learns of the second is then in use."""
DONE = Path("done")
"""Stands for a run that has reached its end."""


def _start(folder: RunFolder, recipe: Train, resume: str, wire: Wire) -> Path | None:
    """The checkpoint to go on from, None for a new run, DONE; as the first rank sees it."""
    found = ""
    if wire.rank == 0:
        if folder.exists():
            folder.must_match(recipe, may_differ=_may_differ(folder, recipe))
        if folder.exists() and folder.is_done() and resume == "auto":
            found = str(DONE)
        else:
            found = str(_checkpoint(folder, resume) or "")
    found = wire.told(found)
    return DONE if found == str(DONE) else Path(found) if found else None


def _may_differ(folder: RunFolder, recipe: Train) -> tuple[str, ...]:
    """What may be otherwise than in the run that lives here; of a recipe that cannot be read any more, the least."""
    try:
        return may_differ(recipe, recipes.load(folder.recipe))
    except RecipeError:
        return MAY_DIFFER


def _checkpoint(folder: RunFolder, resume: str) -> Path | None:
    if resume not in ("auto", "never"):
        path = Path(resume)
        if not path.is_dir():
            raise UsageError(f"no checkpoint folder {resume}", next_step="--resume auto takes the newest complete one")
        return path
    found = complete(folder.checkpoints)
    return found[-1] if found else None


def passed_over(folder: RunFolder, rank: int) -> list[str]:
    """A sentence for each checkpoint that a kill, or a full disk, left half written."""
    names = unfinished(folder.checkpoints) if rank == 0 else []
    return [f"checkpoint {name} was not written to its end, and is passed over" for name in names]


def _build(
    recipe: Train, wire: Wire, device: torch.device, stored: save.Stored | None, stop: StopRequest, report: Reporter
) -> Built:
    """Everything the run is made of. A request to stop is heard while documents are made ready."""

    def preparing(**facts: Any) -> None:
        report.preparing(**facts)
        why = stop.reason()
        if why is not None:
            step = "the same command goes on; what was tokenised to its end is kept"
            raise Stopped(f"stopped while documents were made ready: {why}", next_step=step)

    resume = None if stored is None else stored.state["source"]
    built = build(recipe, wire, device=device, progress=preparing, resume=resume)
    for text in (*dropped(built.prepared.manifest["sources"]), *built.notes):
        report.note(text)
    micro_batches = built.step.micro_batches
    if micro_batches < wire.layout.pp:
        share = 100 * wire.layout.waits(micro_batches)
        text = f"ranks of the pipeline wait {share:.0f} % of the time that they compute"
        report.note(
            f"{text}: {wire.layout.pp} ranks, {micro_batches} micro-batches; a smaller micro_batch_size makes more"
        )
    must_fit_positions(built.placement.chunks[0].config, built.prepared.tokenizer, recipe.samples)
    return built


class Loop:
    """One run, from its first step or a checkpoint to its last step."""

    def __init__(
        self, built: Built, records: Records, folder: RunFolder, meter: Meter, *, parent: Path | None = None
    ) -> None:
        self.built, self.records, self.folder, self.parent = built, records, folder, parent
        self.placement, self.wire = built.placement, built.wire
        self.recipe, self.report, self.events = built.recipe, records.report, records.events
        self.progress = Progress()
        self.began = 0
        """The step that this attempt goes on from."""
        self.since: Row = {}
        """What the next step's row says of the time between the steps."""
        self.watchers: list[Watcher] = [settings.start() for settings in built.recipe.watchers]
        self.checkpoints = Checkpoints(
            folder.checkpoints,
            built.recipe.checkpoints,
            self.wire.seat,
            tell=records.checkpoint,
            agree=lambda facts: self.wire.anywhere(facts, built.device),
        )
        rate, source = peak_flops(built.device, built.dtype)
        self.peak = (rate * self.wire.layout.ranks, source)
        self.energy = Spending(meter, built.recipe.energy, self.wire, self.events, built.device)
        told, trace = self.report.note, built.recipe.trace
        self.tracer = Tracer(trace, self.wire, self.events, folder, device=built.device, told=told)

    def run(self, stored: save.Stored | None, stop: StopRequest) -> None:
        """Go on from a checkpoint's snapshot, or from the start, to the end."""
        if stored is not None:
            self._restore(stored)
        self.began = self.progress.step
        self.wire.wait()  # all have read before anything is deleted
        later = self.checkpoints.forget_after(self.progress.step) if self.wire.rank == 0 else []
        if later:
            self.report.note(f"the checkpoints of later steps are deleted: {', '.join(map(str, later))}")
        self.records.open(self.progress, parent=self.parent, peak=self.peak)
        self.tracer.begin(self.progress.step)
        try:
            with explained(
                self.built.account, lambda: f"in step {self.progress.step + 1}", lambda: self.records.memory
            ):
                why = self._steps(stop)
        except BaseException as error:
            # the others are raised on all ranks, or where none waits for another
            if not isinstance(error, LmworksError) or isinstance(error, OutOfMemory):
                if self.wire.layout.ranks > 1:
                    error.add_note(f"last exchanges of this rank: {self.wire.last()}")
                self.checkpoints.hurry()
            self.tracer.failed(error)
            failure.write(error, step=self.progress.step + 1)  # before the wait for a save: the first one is told
            self.events.write("failed", reason=f"{type(error).__name__}: {error}")
            with suppress(OSError, LmworksError, ImportError, MemoryError):  # the first error is the one to tell
                self._close(together=False)
            raise
        if why is not None:
            self.events.write("stopped", reason=why)
        self._close(together=True)
        if why is not None:
            where = f"step {self.progress.step} of {self.recipe.steps}"
            stopped = Stopped(f"stopped at {where}: {why}", next_step="the same command goes on")
            failure.write(stopped, step=self.progress.step)
            raise stopped
        self.records.summarise(self.progress)

    def _close(self, *, together: bool) -> None:
        """Take stock of energy and close the records. `together`: all ranks have come here."""
        self.tracer.close(together=together)
        self.energy.end(together=together)
        self.records.energy = self.energy.facts(tokens=self.progress.tokens, flops=self.progress.flops)
        self.records.close(self.checkpoints.wait)

    def _steps(self, stop: StopRequest) -> str | None:
        """Steps until the end, or until a signal or the time limit: its reason."""
        progress, recipe = self.progress, self.recipe
        self.energy.begin()
        self.report.begin(progress.step, recipe.steps)
        while progress.step < recipe.steps and progress.stopped is None:
            record = self._step()
            self._watch(record)
            at_end = progress.step == recipe.steps or progress.stopped is not None
            why = self._why(stop)
            if _due(recipe.samples.every, progress.step) or at_end:
                self._sample()
            if _due(recipe.checkpoints.every, progress.step) or at_end or why is not None:
                self._save(last=at_end or why is not None)
            if why is not None and not at_end:
                return why
        return None

    def _why(self, stop: StopRequest) -> str | None:
        """Why the run should stop now, as all ranks see it."""
        why = stop.reason()
        (asked,) = self.wire.anywhere([why is not None], self.built.device)
        return (why or "another rank was asked to stop") if asked else None

    def _step(self) -> StepRecord:
        """One step, its row in metrics.jsonl, and a validation when one is due."""
        progress, recipe = self.progress, self.recipe
        self.events.step = progress.step + 1
        update, at = self.built.step.update, (progress.step, recipe.steps)
        lr, decay = update.set_lr(recipe.schedule.factor(*at)), recipe.schedule.weight_decay(*at)
        moved = {} if decay is None else {"weight_decay": update.set_decay(decay)}
        books = self.built.step.books
        books.on = progress.step - self.began in MEASURE_EARLY or self.events.step % MEASURE_EVERY == 0
        start, begun = time.perf_counter(), self.wire.spans.clock.now()
        with self.energy.phase("train"), self.tracer.step(self.events.step):
            result = self.built.step()
        seconds = time.perf_counter() - start
        self.events.write("step", start=begun, end=begun + seconds)
        seen = self._measure() if books.on else None
        for note in result.notes:
            self.events.write("note", text=note)
            self.report.note(note)
        progress.step += 1
        progress.tokens += result.targets
        progress.seconds += seconds
        progress.flops += result.passes * self.built.cost.forward_flops_per_token
        rate = recipe.batch_size * recipe.data.sequence_length / seconds
        spent = self.energy.bill()
        row: Row = {
            "step": progress.step,
            "tokens": progress.tokens,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            **moved,
            "seconds": seconds,
            "flops": progress.flops,
            "tokens_per_second": rate,
            "mfu": rate * self.built.cost.train_flops_per_token / self.peak[0],
            "memory_bytes": memory_bytes(self.built.device),
            **({"saved_bytes": books.peak, "state_bytes": seen.optimizer} if seen is not None else {}),
            **self.energy.row(spent),
            **result.extra,
            **self.since,
        }
        self.since = {}
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
            spent=spent,
            row={**row, **(found or {}), **self._shares(result, seconds)},
            origins=self.built.step.source.origins,
        )

    def _shares(self, result: StepResult, seconds: float) -> dict[str, float]:
        """Of the step's time, waited for data; of its tokens, those that are no target."""
        tokens = self.recipe.batch_size * self.recipe.data.sequence_length
        return {"data_share": result.data_seconds / seconds, "ignored_share": 1 - result.targets / tokens}

    def _measure(self) -> Footprint:
        """What each class of memory takes, while gradients are there; told once."""
        built, account, first = self.built, self.built.account, self.records.memory is None
        placement = built.placement
        seen = measured(
            placement.weights.parameters(),
            placement.gradients(),
            optimizer=built.step.update.held_bytes() + placement.masters_bytes,
            saved=built.step.books.peak,
            logits=account.predicted.logits,
            whole=most_bytes(built.device) - account.before,
        )
        self.records.memory = seen
        self.events.write("memory", predicted=account.predicted.by_class(), measured=seen.by_class())
        if first:
            self.report.note(f"memory: {in_words(seen.total)} beside the program: {listed(seen)}")
        return seen

    def _validate(self) -> dict[str, float] | None:
        with self.events.span("validate"), self.energy.phase("validate"):
            batches = self.built.prepared.validation(self.recipe.validation.rows, share=self.placement.share)
            found = validate(self.placement, batches, self.recipe.data.validated)
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
                for alert in change.alerts:
                    self.events.write("alert", **alert)
                self.report.note(change.reason)
                if change.stop:
                    self.progress.stopped = change.reason

    def _sample(self) -> None:
        recipe, prepared = self.recipe, self.built.prepared
        if not recipe.samples.prompts:
            return
        found: list[Row] = []
        with self.energy.phase("sample"):
            model = gather(self.placement)
            if model is not None:
                with self.records.forgiving("sample"):
                    found = sample(model, prepared.tokenizer, recipe.samples, seed=recipe.seed, step=self.progress.step)
            self.wire.wait()  # longer than a collective waits
        for row in found:
            self.records.samples.append(row)
        if found:
            self.report.note(f"sample: {found[0]['prompt']}{found[0]['text']}")

    def _save(self, *, last: bool) -> None:
        with self.events.span("save"), self.energy.phase("checkpoint"):
            self.records.sync()
            self.records.note_cost(self.progress)
            if self.energy.bill() is not None:  # otherwise what earlier attempts counted stays
                self.progress.energy = self.energy.account
            blocked = self.checkpoints.save(self.progress.step, self._snapshot(), last=last)
            self.since = {"checkpoint/blocked_seconds": blocked}

    def _snapshot(self) -> save.Snapshot:
        step = self.built.step
        state = {
            **self.progress.state(),
            "source": step.source.state(),
            "watchers": [watcher.state() for watcher in self.watchers],
            "parts": parts_of(self.recipe),
            "layout": feedback.made_on(self.wire.layout),
        }
        random = save.random_state() | {"probe": step.probe.state()["generator"]}
        kept = {
            "model": spread.saved(self.placement, self.placement.values()),
            "optimizer": spread.saved(self.placement, step.update.state()),
            "selector": (step.selector.state(), {}) if self.wire.rank == 0 else ({}, {}),
            "random": ({self._own(name): value for name, value in random.items()}, {}),
        }
        if self.placement.fed_back:
            kept["missed"] = (feedback.state(self.placement.fed_back, self.wire.rank), {})
        tensors, boxes = ({kind: pair[i] for kind, pair in kept.items()} for i in range(2))
        return save.Snapshot(tensors=tensors, state=state, boxes=boxes)  # type: ignore[arg-type]  # of each pair the one

    def _own(self, name: str) -> str:
        """The name of this rank's random state in a checkpoint."""
        return f"rank-{self.wire.rank}/{name}" if self.wire.rank else name

    def _restore(self, stored: save.Stored) -> None:
        state, step, where = stored.state, self.built.step, str(self.parent)
        model, optimizer = stored.pieces("model"), stored.pieces("optimizer")
        save.must_fit(model.shapes(), self.placement.shapes(), where=where)
        changed = save.must_be_the_same_parts(state["parts"], parts_of(self.recipe), where=where)
        restore.load(self.placement, model)
        step.update.load(restore.states(self.placement, optimizer, model.shapes()))
        of, missed = self.placement.fed_back, stored.pieces("missed")
        anew = feedback.load(of, self.wire, missed, state.get("layout"), self.built.device)
        self._restore_random(stored.pieces("random"))
        step.source.load(state["source"])
        step.selector.load(stored.pieces("selector").all())
        for watcher, kept in zip(self.watchers, state["watchers"], strict=True):
            watcher.load(kept)
        # checkpoints from before energy was counted do not have it
        self.progress = Progress(**{entry.name: state[entry.name] for entry in fields(Progress) if entry.name in state})
        self.report.note(f"going on from step {self.progress.step} ({self.parent})")
        lost = self.energy.go_on(self.progress.energy, self.folder, self.progress.step)
        for text in filter(None, (lost, anew)):
            self.report.note(text)
        if changed:
            self.report.note(f"with other settings than the checkpoint's: {'; '.join(changed)}")

    def _restore_random(self, pieces: Pieces) -> None:
        """This rank's generators; a rank that was not there takes the first one's."""
        stored = pieces.all()
        names = [name for name in stored if not name.startswith("rank-")]
        random = {name: stored.get(self._own(name), stored[name]) for name in names}
        self.built.step.probe.load({"generator": random.pop("probe")})
        save.set_random_state(random)


def parts_of(recipe: Train) -> dict[str, Any]:
    """The settings of the parts whose state is in a checkpoint, or that act on the gradients it goes on with."""
    table = recipes.table_of(recipe)
    return {slot: table[slot] for slot in ("optimizer", "selector", "gradient", "watchers")}


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
