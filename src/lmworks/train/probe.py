"""Extra passes, lent by the step to the parts that need more than the step's own gradient.

A probe has random numbers of its own, never touches `.grad`, and books what its passes cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lmworks.data.load import Batch
from lmworks.model import ops
from lmworks.model.backbone import Backbone
from lmworks.train.slots import Objective, combined, divisors


class Probe:
    """Passes over a batch, booked; and notes, which become columns of the step's row in metrics.jsonl."""

    def __init__(self, model: Backbone, objective: Objective, *, seed: int, micro_rows: int | None = None) -> None:
        self.model = model
        self.objective = objective
        self.micro_rows = micro_rows
        """Rows of one pass; None: all at once."""
        device = next(model.parameters()).device
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.batch: Batch | None = None
        """The rows that this step trains on."""
        self.booked = 0.0
        """Tokens times forward passes of everything that was done here since the step began."""
        self.booked_aside = 0.0
        """The same for measurements."""
        self._notes: dict[str, Tensor | float] = {}

    def begin(self) -> None:
        """A new step: nothing is booked, nothing noted."""
        self.batch, self.booked, self.booked_aside, self._notes = None, 0.0, 0.0, {}

    def note(self, name: str, value: Tensor | float) -> None:
        """A number for this step's row; names are 'method/what'."""
        self._notes[name] = value

    def notes(self) -> dict[str, float]:
        """What was noted since the step began."""
        return {name: float(value) for name, value in self._notes.items()}

    def book(self, tokens: int, passes: float) -> None:
        """Book `passes` forward passes over `tokens` tokens; a backward pass counts as two."""
        self.booked += tokens * passes

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is booked in here is a measurement, not the method's: it counts in `booked_aside` only."""
        before = self.booked
        try:
            yield
        finally:
            self.booked_aside += self.booked - before
            self.booked = before

    def gradients(self, batch: Batch, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, ...]:
        """Gradient of the objective's mean over `batch`, for the given parameters, micro-batch by micro-batch."""

        def each() -> Iterator[tuple[Tensor, ...]]:
            for loss, micro in self._losses(batch):
                yield torch.autograd.grad(loss, list(parameters))
                self.book(micro.tokens_BT.numel(), 3)

        return _added(each())

    def sampled(self, batch: Batch) -> Batch:
        """The batch with each counted target drawn from the model's own distribution, micro-batch by micro-batch."""
        targets = []
        for micro in batch.split(self.micro_rows or batch.rows):
            targets.append(self.objective.sampled(self.model, micro, self.generator).targets_BT)
            self.book(micro.tokens_BT.numel(), 1)
        return dataclasses.replace(batch, targets_BT=torch.cat(targets))

    def hessian_product(
        self, batch: Batch, parameters: Sequence[nn.Parameter], vectors: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Hessian of the objective's mean over `batch`, times `vectors`; one double backward a micro-batch.

        The forward pass runs in the plain forms of the model's operations, which can be differentiated twice.
        """

        def each() -> Iterator[tuple[Tensor, ...]]:
            for loss, micro in self._losses(batch):
                first = torch.autograd.grad(loss, list(parameters), create_graph=True)
                slope = torch.stack([(g * v).sum() for g, v in zip(first, vectors, strict=True)]).sum()
                yield torch.autograd.grad(slope, list(parameters), materialize_grads=True)  # linear ones: zero
                self.book(micro.tokens_BT.numel(), 9)  # a backward pass costs two, and is itself gone through backward

        with twice_differentiable():
            return _added(each())

    def _losses(self, batch: Batch) -> Iterator[tuple[Tensor, Batch]]:
        """The loss of each micro-batch, divided by the counts of the whole batch: their sum is the batch's mean."""
        counts = divisors(self.objective, batch)
        for micro in batch.split(self.micro_rows or batch.rows):
            yield combined(self.objective.loss(self.model, micro), counts), micro

    def state(self) -> dict[str, Tensor]:
        """The generator's state."""
        return {"generator": self.generator.get_state()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` gave."""
        self.generator.set_state(state["generator"])


def _added(parts: Iterator[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The sum over micro-batches, in the memory of the first; there is at least one."""
    found = next(parts)
    for more in parts:
        found = tuple(a.add_(b) for a, b in zip(found, more, strict=True))
    return found


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Forward passes inside can be differentiated twice: plain operations, and attention by its formula."""
    with ops.plain_forms(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield
