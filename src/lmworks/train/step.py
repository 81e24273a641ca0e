"""One optimizer step: draw, select, count, run, finish, guard, update. It names no method and knows no layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from lmworks.core.errors import NonFinite
from lmworks.data.load import Batch
from lmworks.model.backbone import Backbone
from lmworks.model.head import IGNORE
from lmworks.train.probe import Probe
from lmworks.train.slots import Gradient, Objective, Selector, Source, Update, combined, divisors


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
    passes: float
    """Tokens times forward passes that were spent: three for every token trained on, and what the probe booked."""
    extra: dict[str, float]
    """What the gradient stages reported and the other slots noted."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """The slots of a run, wired. Calling it makes one optimizer step."""

    model: Backbone
    source: Source
    selector: Selector
    objective: Objective
    gradient: Sequence[Gradient]
    update: Update
    probe: Probe
    rows: int
    """Rows of one optimizer step."""
    micro_rows: int
    """Rows of one forward pass; the last one may be smaller."""
    device: torch.device

    def __call__(self) -> StepResult:
        """Make one step. Raises NonFinite, with nothing updated, when loss or gradient is inf or nan."""
        self.probe.begin()
        drawn = self.source.draw(self.selector.candidates(self.rows)).to(self.device)
        batch = self.selector.select(drawn, self.rows, self.probe)
        self.probe.batch = batch
        counts = divisors(self.objective, batch)
        self.update.zero_grad()
        with ExitStack() as stack:
            for stage in self.gradient:
                stack.enter_context(stage.around(self.model))
            loss = accumulate(self.model, self.objective, batch.split(self.micro_rows), counts)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        guard(loss, norm)
        extra: dict[str, Tensor] = {}
        for stage in self.gradient:
            extra |= stage.finish(parameters, norm)
        self.update.step(self.probe)
        return StepResult(
            loss=float(loss),
            grad_norm=float(norm),
            targets=int((batch.targets_BT != IGNORE).sum()),
            units=self._units(batch, counts),
            passes=3.0 * batch.tokens_BT.numel() + self.probe.booked,
            extra={name: float(value) for name, value in extra.items()} | self.probe.notes(),
        )

    def _units(self, batch: Batch, counts: dict[str, Tensor]) -> dict[str, int]:
        """Whole units, where the divisors are weighted too."""
        if batch.weights_B is not None:
            counts = self.objective.count(dataclasses.replace(batch, weights_B=None))
        return {name: int(count) for name, count in counts.items()}


def accumulate(
    model: Backbone, objective: Objective, micro_batches: Sequence[Batch], counts: dict[str, Tensor]
) -> Tensor:
    """Forward and backward over the micro-batches; gradients add up in `.grad`. Returns the step's loss (scalar).

    Each component is divided by its count over the *whole* step, so any split gives the same gradient.
    """
    total: Tensor | None = None
    for micro in micro_batches:
        parts = objective.loss(model, micro)
        loss = combined(parts, counts)
        torch.autograd.backward(loss)
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None, "a step has at least one micro-batch"
    return total


def guard(loss: Tensor, norm: Tensor) -> None:
    """Raise NonFinite before anything is updated."""
    if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
        raise NonFinite(
            f"loss is {float(loss)}, gradient norm is {float(norm)}; the update was not made",
            next_step="start anew with a lower rate: --resume never --set optimizer.lr=...; its checkpoints are kept",
        )
