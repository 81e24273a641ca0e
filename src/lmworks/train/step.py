"""One optimizer step: draw, select, count, run, finish, guard, update. It names no method and no axis of a layout.

On several ranks each one draws its own rows; counts, loss and norm are those of all rows on every rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lmworks.core.errors import NonFinite
from lmworks.data.load import Batch
from lmworks.model.backbone import Backbone
from lmworks.model.head import IGNORE
from lmworks.parallel.apply import Placement
from lmworks.train.ledger import Ledger
from lmworks.train.moved import Facts
from lmworks.train.offload import TensorCache
from lmworks.train.probe import Probe
from lmworks.train.slots import Gradient, Objective, Selector, Source, Update, combined


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step measured."""

    loss: float
    """Sum over components of weight * mean, over the whole step."""
    grad_norm: float
    """Global L2 norm as it came from the backward passes."""
    targets: int
    """Target tokens that counted, whatever the objective makes of them; 0 for a batch without any."""
    units: dict[str, int]
    """Counts of each component, at least 1: the loss was divided by them."""
    data_seconds: float
    """That this rank waited for its rows."""
    passes: float
    """Tokens times forward passes that were spent: three for every token trained on, and what the probe booked."""
    extra: dict[str, float]
    """What the gradient stages reported and the other slots noted."""
    notes: tuple[str, ...] = ()
    """Sentences for people."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """The slots of a run, wired. Calling it makes one optimizer step."""

    placement: Placement
    source: Source
    selector: Selector
    objective: Objective
    gradient: Sequence[Gradient]
    update: Update
    probe: Probe
    rows: int
    """Rows of one optimizer step, over all ranks."""
    micro_rows: int
    """Rows of one forward pass on one rank; the last one may be smaller."""
    books: Ledger = field(default_factory=lambda: Ledger(on=False))
    """Bytes that wait for the backward pass, by block."""
    caches: Sequence[TensorCache] = ()
    """Where saved tensors wait that are not in memory, one for each chunk of the model."""
    around_update: Callable[[], AbstractContextManager[None]] = nullcontext
    """Entered around each update: a measurement of it."""

    @property
    def micro_batches(self) -> int:
        """Forward passes of one step on one rank."""
        return -(-self.rows // (self.placement.share[1] * self.micro_rows))

    def __call__(self) -> StepResult:
        """One step. Raises NonFinite, on all ranks and with nothing updated, when loss or gradient is not finite."""
        placement, span = self.placement, self.placement.wire.spans.span
        self.probe.begin()
        placement.begin()
        begun = time.perf_counter()
        with span("data"):
            drawn = self.source.draw(self.selector.candidates(self.rows)).to(placement.device)
        data_seconds = time.perf_counter() - begun
        with span("select"):
            batch = self.selector.select(drawn, self.rows // placement.share[1], self.probe)
        self.probe.batch = batch
        counts, facts = self._count(batch)
        self.update.zero_grad()
        self.books.begin()
        with ExitStack() as stack:
            stack.enter_context(self.books.counting())
            stack.enter_context(placement.balanced(self.rows))
            for stage in self.gradient:
                stack.enter_context(stage.around(placement.model))
            own_loss = accumulate(placement, self.objective, batch.split(self.micro_rows), counts)
        parameters = [p for p in placement.model.parameters() if p.grad is not None]
        norm, (loss,) = placement.norm_and(parameters, own_loss[None])
        guard(loss, norm)
        extra: dict[str, Tensor] = {}
        for stage in self.gradient:
            extra |= stage.finish(parameters, norm)
        with span("optimizer"), self.around_update():
            self.update.step(self.probe)
        extra |= placement.after_update()
        moved = [cache.told() for cache in self.caches]
        extra |= summed(moved)
        return StepResult(
            loss=float(loss),
            grad_norm=float(norm),
            targets=facts["targets"],
            data_seconds=data_seconds,
            units={name: facts[name] for name in counts},
            passes=3.0 * facts["tokens"] + self.probe.booked,
            extra={name: float(value) for name, value in extra.items()} | self.probe.notes(),
            notes=(*placement.remarks(), *(note for facts in moved for note in facts.notes)),
        )

    def close(self) -> None:
        """End the threads of source and caches, and give their files back."""
        self.source.close()
        for cache in self.caches:
            cache.close()

    def _count(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, int]]:
        """What each component is divided by over the whole step; for the record, tokens, targets and whole units."""
        counts = self.objective.count(batch)
        units = counts if batch.weights_B is None else self.objective.count(replace(batch, weights_B=None))
        targets = (batch.targets_BT != IGNORE).sum()
        vector = torch.stack([*(value.double() for value in (*counts.values(), *units.values(), targets))])
        summed = self.placement.total_of_rows(vector)
        of_all = {name: x.to(kind.dtype).clamp(min=1) for (name, kind), x in zip(counts.items(), summed, strict=False)}
        whole = [round(x) for x in summed[len(counts) :].tolist()]
        tokens = batch.tokens_BT.numel() * self.placement.share[1]
        return of_all, {
            **dict(zip(units, (max(1, x) for x in whole), strict=False)),
            "targets": whole[-1],
            "tokens": tokens,
        }


def accumulate(
    placement: Placement, objective: Objective, micro_batches: Sequence[Batch], counts: dict[str, Tensor]
) -> Tensor:
    """Forward and backward over this rank's micro-batches; gradients add up in `.grad`. Returns its loss (scalar).

    Each component is divided by its count over the *whole* step, so any split gives the same gradient.
    """

    def loss_of(model: Backbone, micro: Batch, hidden_BTD: Tensor | None = None) -> Tensor:
        return combined(objective.loss(model, micro, hidden_BTD), counts)

    return placement.backward(micro_batches, loss_of)


def summed(moved: Sequence[Facts]) -> dict[str, Tensor]:
    """What saved tensors' caches moved in a step, on this rank: bytes, misses, and seconds that were waited."""
    names = ("stored", "loaded", "forwarded", "kept", "misses", "stalled")
    found = {name: float(sum(getattr(facts, name) for facts in moved)) for name in names if moved}
    return {f"offload/{name}": torch.tensor(value, dtype=torch.float64) for name, value in found.items()}


def guard(loss: Tensor, norm: Tensor) -> None:
    """Raise NonFinite before anything is updated."""
    if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
        raise NonFinite(
            f"loss is {float(loss)}, gradient norm is {float(norm)}; the update was not made",
            next_step="start anew with a lower rate: --resume never --set optimizer.lr=...; its checkpoints are kept",
        )
