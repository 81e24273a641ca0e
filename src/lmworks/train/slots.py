"""The seven slots of a training step, and the record by which watchers speak.

    Source      what rows come next
    Selector    which of them are trained on
    Objective   what is minimised
    Gradient    what happens between backward and the update
    Saved       what is kept for the backward pass
    Optimizer   how gradients change weights
    Watcher     what looks at a finished step, and may answer with a Change

Every slot class is abstract or final: nothing that works is overridden; to vary, wrap. A part in a recipe is a frozen
dataclass; the object it makes may hold state, and only through `state()` and `load()`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, final

import torch
from torch import Tensor, nn

from lmworks.data.load import Batch, Origin
from lmworks.model.backbone import Backbone
from lmworks.model.sizes import BlockBytes, Held
from lmworks.parallel.shard import local
from lmworks.train.ledger import Forward, Ledger, counted
from lmworks.train.spent import Bill

if TYPE_CHECKING:
    from lmworks.train.offload import TensorCache
    from lmworks.train.probe import Probe

State = dict[str, Any]
"""What a slot keeps across a restart: JSON values, and tensors under string keys."""


class Source(Protocol):
    """Where batches come from. The order depends on (seed, row) only, never on workers or world size."""

    def draw(self, rows: int) -> Batch:
        """The next `rows` rows."""
        ...

    def origins(self) -> Sequence[Origin]:
        """Where the rows of the last draw are from, in their order; none where it is not known."""
        ...

    def state(self) -> State:
        """Where the next row is, as JSON values."""
        ...

    def load(self, state: State) -> None:
        """Continue at a saved place."""
        ...

    def close(self) -> None:
        """End its threads."""
        ...


@dataclass(frozen=True, kw_only=True)
class Component:
    """One term of a loss: the sum over its units, and how much it weighs."""

    total: Tensor
    weight: float = 1.0


class Objective(ABC):
    """What is minimised: a sum of named components, each divided by its own count over the whole step."""

    predicts: ClassVar[bool] = False
    """Whether the model's answer is a distribution that targets can be drawn from: `sampled` then works."""

    @abstractmethod
    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Units (tokens, pairs) of each component in this batch, counted before any forward pass.

        Where the batch has `weights_B`, a unit counts as much as its row weighs.
        """

    @abstractmethod
    def loss(self, model: Backbone, batch: Batch, hidden_BTD: Tensor | None = None) -> dict[str, Component]:
        """The components' sums over this batch, each row times its weight, with gradient.

        `hidden_BTD`: the model's hidden states of this batch, where the caller has them already.
        """

    def each(self, model: Backbone, batch: Batch, hidden_BTD: Tensor | None = None) -> Tensor:
        """The loss of each row by itself (B), no gradient: the mean over the row's own units; nan for a row of none.

        Rows' weights do not matter here. `hidden_BTD` as in `loss`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss of a single row")

    def sampled(self, model: Backbone, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with each counted target drawn from the model's own distribution, no gradient."""
        raise NotImplementedError(f"{type(self).__name__} predicts no distribution")


def divisors(objective: Objective, batch: Batch) -> dict[str, Tensor]:
    """What each component is divided by over the whole batch: its count, and 1 where nothing counts."""
    return {name: count.clamp(min=1) for name, count in objective.count(batch).items()}


def combined(parts: Mapping[str, Component], counts: Mapping[str, Tensor]) -> Tensor:
    """The loss: the sum over components of weight * total / count; a scalar."""
    return torch.stack([part.total * part.weight / counts[name] for name, part in parts.items()]).sum()


class Selector(ABC):
    """Which rows of a draw are trained on."""

    @abstractmethod
    def candidates(self, rows: int) -> int:
        """How many rows to draw so that `rows` of them can be chosen."""

    @abstractmethod
    def select(self, batch: Batch, rows: int, probe: Probe) -> Batch:
        """The chosen `rows` rows."""

    def state(self) -> dict[str, Tensor]:
        """What to keep across a restart."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` gave."""


class Selecting(ABC):
    """A selector's settings, which start the running selector."""

    row_by_row: ClassVar[bool] = False
    """Whether a row is chosen whatever the other rows are, so that each rank may choose among its own."""

    @abstractmethod
    def start(self, model: Backbone, optimizer: Optimizer, sources: Mapping[str, float]) -> Selector:
        """A selector that has seen nothing yet. `sources`: each reader's name and its share of the rows, in order."""


@final
@dataclass(frozen=True, kw_only=True)
class SelectAll(Selecting):
    """Every row that was drawn."""

    row_by_row: ClassVar[bool] = True
    """All of them."""

    def start(self, model: Backbone, optimizer: Optimizer, sources: Mapping[str, float]) -> Selector:
        """A selector that takes all."""
        return _All()


class _All(Selector):
    def candidates(self, rows: int) -> int:
        """Exactly as many as are wanted."""
        return rows

    def select(self, batch: Batch, rows: int, probe: Probe) -> Batch:
        """The batch as it is."""
        return batch


class Gradient(ABC):
    """What happens to gradients: a context around the backward passes, and a finish before the update."""

    def around(self, model: Backbone) -> AbstractContextManager[None]:
        """Entered before the first forward pass of a step, left after the last backward pass."""
        return nullcontext()

    @abstractmethod
    def finish(self, parameters: Sequence[nn.Parameter], norm: Tensor) -> dict[str, Tensor]:
        """Change `.grad` in place. `norm` is the global norm as it came from the backward pass; returns metrics."""


class Saved(ABC):
    """What blocks keep for their backward pass. Set on the model once, before anything is compiled or sharded."""

    @abstractmethod
    def passes(self, block: nn.Module, name: str, books: Ledger | None = None) -> Forward:
        """The forward pass of a block as this policy makes it, by its number in the whole model; uncounted.

        `books`: where the bytes of a pass that is made again are counted.
        """

    def arrange(self, blocks: Mapping[str, nn.Module], books: Ledger | None = None) -> Sequence[TensorCache]:
        """Arrange some blocks, by their number in the whole model and in the order of the forward pass.

        `books`: where saved bytes are counted, by block; None where nobody counts. Returns the caches in which saved
        tensors wait, where there are any: the step closes them.
        """
        for name, block in blocks.items():
            forward = self.passes(block, name, books)
            if forward != block.forward or books is not None:
                block.forward = counted(forward, name, books)
        return ()

    def apply(self, model: Backbone, books: Ledger | None = None) -> Sequence[TensorCache]:
        """Arrange all blocks of the model."""
        return self.arrange(dict(model.get_submodule("blocks").named_children()), books)

    def exact(self) -> bool:
        """Whether what is learned is to the bit what `keep` learns. A policy around another is as exact as that one."""
        inner = getattr(self, "around", None)
        return isinstance(inner, Saved) and inner.exact()

    def leaves(self) -> bool:
        """Whether saved tensors leave memory within a step: on a CPU what is freed must then go back to the system."""
        return False

    def again(self, block: int) -> bool:
        """Whether a block's forward pass is made again in the backward pass, exchanges among ranks included."""
        return False

    def held(self, blocks: Sequence[BlockBytes]) -> Sequence[Held] | None:
        """What it will hold of these blocks, in their order, told from sizes; None: not known beforehand."""
        return None


class Update(ABC):
    """A running optimizer: a learning rate that the loop sets, a step, and state by parameter name."""

    @abstractmethod
    def set_lr(self, factor: float) -> float:
        """Set every group's rate to `factor` times its own; returns the first group's rate."""

    def set_decay(self, factor: float) -> float:
        """Set every group's weight decay to `factor` times its own; returns the largest. Where it is 0 it stays so."""
        groups = [group for optimizer in self.optimizers() for group in optimizer.param_groups]
        for group in groups:
            group["weight_decay"] = group.setdefault("base_decay", group["weight_decay"]) * factor
        return max((float(group["weight_decay"]) for group in groups), default=0.0)

    @abstractmethod
    def step(self, probe: Probe) -> None:
        """Change the weights from their gradients. May ask the probe for further passes."""

    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """The torch optimizers that hold its state: those of the updates it wraps, where it has none of its own."""
        inner = (value for value in vars(self).values() if isinstance(value, Update))
        return [optimizer for update in inner for optimizer in update.optimizers()]

    @abstractmethod
    def zero_grad(self) -> None:
        """Drop all gradients."""

    def held_bytes(self) -> int:
        """Bytes that it holds between steps on this rank."""
        return sum(local(x).nbytes for x in self.state().values())

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """All state tensors under 'parameter name/state name'."""

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` gave."""


class Optimizer(ABC):
    """How gradients change weights: the settings, which build an Update."""

    value_by_value: ClassVar[bool] = False
    """Whether a value's update hangs on its own gradients only, so that each rank may update its part of a matrix."""

    def core(self) -> Optimizer:
        """The optimizer whose rule it is: itself, or the one that it wraps."""
        return self

    @abstractmethod
    def build(self, model: Backbone) -> Update:
        """The running optimizer over the model's trainable parameters, grouped by name."""

    def state_bytes(self, shapes: Mapping[str, Sequence[int]]) -> int | None:
        """Bytes of its state once it has stepped; None: not known beforehand.

        `shapes`: of each float32 parameter that is trained, by name: those of this rank's part.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a watcher asks for, as plain data. The loop applies it, logs it and saves it, so that a run replays."""

    reason: str
    stop: bool = False
    """End the run after this step."""
    alerts: tuple[Mapping[str, Any], ...] = ()
    """What is out of order, for events called `alert`: JSON values."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """A finished step, for watchers and sinks. Numbers are plain floats; lr is before any per-group factor."""

    step: int
    tokens: int
    """Valid target tokens seen by the run so far."""
    loss: float
    grad_norm: float
    lr: float
    seconds: float
    validation: dict[str, float] | None = None
    """val_loss and val_bits_per_byte when this step ended with a validation."""
    spent: Bill | None = None
    """Energy, carbon and money of the run so far, the same on all ranks; None where nothing is counted."""
    row: Mapping[str, float] = field(default_factory=dict)
    """All numbers of the step: its row in metrics.jsonl, its validation, `data_share` and `ignored_share`."""
    origins: Callable[[], Sequence[Origin]] = list
    """Where this rank's rows were drawn from, worked out when it is asked for."""


class Watcher(ABC):
    """Looks at finished steps. It never mutates anything: it answers with a Change or None."""

    @abstractmethod
    def look(self, record: StepRecord, probe: Probe) -> Change | None:
        """Called after every step."""

    def state(self) -> State:
        """What to keep across a restart."""
        return {}

    def load(self, state: State) -> None:
        """Take back what `state()` gave."""


class Watching(ABC):
    """A watcher's settings, which start the running watcher."""

    def sizes_update(self) -> int | None:
        """Steps between two measurements of how far an update moves the weights, which it reads as `update_ratio`;
        None: it reads none."""
        return None

    @abstractmethod
    def start(self) -> Watcher:
        """A watcher that has seen nothing yet."""
