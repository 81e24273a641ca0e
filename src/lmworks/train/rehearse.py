"""A rehearsal: the layout of a large run, with small widths, on processes of this machine, held against one process.

What is kept is the structure: axes, stages, schedule, micro-batches, what is kept for the backward pass, optimizer and
gradient stages, tied or untied tables, windows. What shrinks are widths, tokens and, where there are too many, ranks: a
degree above 2 becomes 2. Rows are made up, in float64, so that what is equal is equal to ten digits and what is not is
a fault of the layout and not of rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmworks.data.load import Batch, Origin
from lmworks.model.backbone import Backbone
from lmworks.model.init import first_value
from lmworks.model.pieces import Box
from lmworks.parallel import gang, world
from lmworks.parallel import state as states
from lmworks.parallel.apply import Placement, place
from lmworks.parallel.footprint import BYTES, vocabulary_of
from lmworks.parallel.layout import AXES, Layout
from lmworks.parallel.levels import by_level
from lmworks.parallel.levels import names as level_names
from lmworks.parallel.pipeline import block_costs, split
from lmworks.parallel.schedule import order
from lmworks.parallel.shard import local
from lmworks.parallel.timeline import Timeline, simulate
from lmworks.parallel.traffic import Work, traffic
from lmworks.parallel.wire import alone
from lmworks.train.objective import CrossEntropy
from lmworks.train.probe import Probe
from lmworks.train.saved import Keep
from lmworks.train.slots import Gradient, Objective, Optimizer, Saved, SelectAll, State
from lmworks.train.step import Step

Values = NDArray[np.floating[Any]]
SEED = 3
STEPS = 3
"""Of a rehearsal: one would not show an update that went wrong."""
UNPLANNED = ("world", "batch", "loss", "ep", "attention")
"""Counts, the loss, the norm and experts' loads are a few numbers; what ep sends hangs on what tokens choose, and what
servers of attention send on the documents of a row."""
EQUAL = 1e-9
"""Relative difference below which float64 results of another order of additions are equal."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A small model, a layout, and what one step does."""

    model: Any
    layout: Layout
    rows: int
    micro_rows: int
    length: int
    optimizer: Optimizer
    objective: Objective = CrossEntropy()
    gradient: tuple[Gradient, ...] = ()
    saved: Saved = Keep()

    def alone(self) -> Scene:
        """The same on one rank, all rows at once."""
        return dataclasses.replace(self, layout=Layout(dp_shard=1), micro_rows=self.rows)

    def work(self, *, value_bytes: int) -> Work:
        """What a rank does in one step, for the formulas."""
        own = self.rows // self.layout.size("batch")
        micro = min(self.micro_rows, own)
        micro_batches = -(-own // micro)
        return Work(
            rows=micro,
            micro_batches=micro_batches,
            last=own - (micro_batches - 1) * micro,
            sequence=self.length,
            value_bytes=value_bytes,
            weight_bytes=value_bytes,
            recomputed=frozenset(block for block in range(self.model.n_layers) if self.saved.again(block)),
        )


@dataclass(kw_only=True)
class Seen:
    """What one rank saw."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, tuple[Box, Values]]
    """Of the first step, as the update gets them: this rank's part of each, and where it lies."""
    weights: dict[str, tuple[Box, Values]]
    """After the last step."""
    bills: dict[tuple[str, str], tuple[int, float]]
    """Calls and bytes of all steps by (axis, operation)."""

    def sent(self, steps: int) -> dict[str, float]:
        """Bytes by axis and step."""
        found: dict[str, float] = {}
        for (axis, _), (_, size) in self.bills.items():
            found[axis] = found.get(axis, 0.0) + size / steps
        return found

    def by_level(self, layout: Layout, rank: int, steps: int) -> dict[str, float]:
        """Bytes of states by level of links and step; nothing for a layout without a placement of states."""
        if layout.state is None:
            return {}
        sizes = {key: size / steps for key, (_, size) in self.bills.items()}
        return dict(zip(level_names(layout), by_level(layout, rank, sizes), strict=True))


def perform(rank: int, scene: Scene, dtype: torch.dtype = torch.float64, steps: int = STEPS) -> Seen:
    """The steps of a scene as one of its ranks, which are connected."""
    made = placed(rank, scene, dtype)
    step = stepping(made, scene)
    results = [step()]
    gradients = _pieces(made, {name: p.grad for name, p in made.model.named_parameters() if p.grad is not None})
    results += [step() for _ in range(steps - 1)]
    return Seen(
        losses=[result.loss for result in results],
        norms=[result.grad_norm for result in results],
        gradients=gradients,
        weights=_pieces(made, dict(made.model.named_parameters())),
        bills={key: (bill.calls, bill.bytes) for key, bill in made.wire.bills.items()},
    )


def placed(rank: int, scene: Scene, dtype: torch.dtype, *, param_dtype: torch.dtype | None = None) -> Placement:
    """A rank's part of the scene's model, with first values by name. `param_dtype`: where it is another than dtype."""
    layout, config = scene.layout, scene.model
    wire = alone() if layout.ranks == 1 else world.wire(layout, world.Seat(rank=rank, world=layout.ranks))
    device, kept = torch.device("cpu"), param_dtype or dtype

    def arrange(chunk: Backbone) -> None:
        scene.saved.apply(chunk)

    made = place(config, wire, device, dtype=dtype, sequence=scene.length, param_dtype=kept, arrange=arrange)
    made.fill(lambda name, box: first_value(name, box.whole, config.n_layers, SEED)[box.index])
    return made


def stepping(made: Placement, scene: Scene) -> Step:
    """The real step over made-up rows."""
    return Step(
        placement=made,
        source=MadeUp(scene, made.share),
        selector=SelectAll().start(made.model, scene.optimizer, {}),
        objective=scene.objective,
        gradient=scene.gradient,
        update=scene.optimizer.build(made.model),
        probe=Probe(made.model, scene.objective, seed=0),
        rows=scene.rows,
        micro_rows=min(scene.micro_rows, scene.rows // made.share[1]),
    )


class MadeUp:
    """Packed rows of documents of uneven lengths. Some targets do not count, in one row most of them."""

    def __init__(self, scene: Scene, share: tuple[int, int]) -> None:
        self._scene, self._share, self._step = scene, share, 0

    def draw(self, rows: int) -> Batch:
        """This rank's share of the next rows, the same on any number of ranks."""
        self._step += 1
        length, vocabulary = self._scene.length, self._scene.model.vocab_size
        generator = torch.Generator().manual_seed(self._step)
        tokens = torch.randint(0, vocabulary, (rows, length + 1), generator=generator)
        targets = tokens[:, 1:].clone()
        targets[:, 2 * length // 3] = -100
        targets[self._step % rows, length // 6 :] = -100
        change = torch.randint(length // 6, length - 1, (rows, 1), generator=generator)
        places = torch.arange(length)[None]
        documents = (places >= change).long()
        positions = torch.where(places >= change, places - change, places)
        batch = Batch(tokens[:, :-1].contiguous(), targets, positions, documents, torch.zeros_like(documents))
        return batch[slice(self._share[0], None, self._share[1])]

    def origins(self) -> list[Origin]:
        """None: rows are made up."""
        return []

    def state(self) -> State:
        """How many draws were made."""
        return {"step": self._step}

    def load(self, state: State) -> None:
        """Go on behind them."""
        self._step = state["step"]

    def close(self) -> None:
        """Nothing to end."""


def _pieces(made: Placement, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Box, Values]]:
    return {name: (made.boxes[name], local(x).detach().numpy().copy()) for name, x in tensors.items()}


# --- the verdict ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a rehearsal showed."""

    loss: float
    """The largest relative difference of a loss."""
    gradient: float
    """The largest difference of a gradient's value, relative to the largest value of its tensor."""
    missing: tuple[str, ...]
    """Parameters of which no rank held some part."""
    sent: dict[str, float]
    """Bytes that the ranks sent in a step, by axis, summed over ranks."""
    expected: dict[str, float]
    """The same by the formulas."""
    levels: dict[str, float] = field(default_factory=dict)
    """Of what they sent of states, how much went over which links, where the layout names levels."""

    @property
    def equal(self) -> bool:
        """Whether ranks learn what one process learns."""
        return self.loss <= EQUAL and self.gradient <= EQUAL and not self.missing

    @property
    def billed(self) -> bool:
        """Whether what was sent is what the formulas say."""
        axes = set(self.sent) | set(self.expected)
        return all(abs(self.sent.get(a, 0.0) - self.expected.get(a, 0.0)) < 1.0 for a in axes)


def rehearse(scene: Scene) -> Verdict:
    """Run a scene on its ranks and on one, and compare."""
    (want,) = gang.run(perform, 1, scene.alone())
    found = gang.run(perform, scene.layout.ranks, scene)
    work = scene.work(value_bytes=8)
    sent: dict[str, float] = {}
    expected: dict[str, float] = {}
    levels = dict.fromkeys(level_names(scene.layout), 0.0) if scene.layout.state is not None else {}
    for rank, seen in enumerate(found):
        for level, size in seen.by_level(scene.layout, rank, STEPS).items():
            levels[level] += size
        for axis, size in seen.sent(STEPS).items():
            if axis not in UNPLANNED:
                sent[axis] = sent.get(axis, 0.0) + size
        for axis, size in traffic(scene.model, scene.layout, rank, work).items():
            expected[axis] = expected.get(axis, 0.0) + size
    worst, missing = differences(found, want)
    loss = max(abs(a / b - 1) for seen in found for a, b in zip(seen.losses, want.losses, strict=True))
    return Verdict(loss=loss, gradient=worst, missing=missing, sent=sent, expected=expected, levels=levels)


def differences(found: list[Seen], want: Seen) -> tuple[float, tuple[str, ...]]:
    """The largest relative difference of a gradient, and the parameters of which a part is on no rank.

    A gradient that is zero but for rounding (a key's bias moves all scores of a query alike) is left out.
    """
    scale = max(np.abs(whole).max() for _, whole in want.gradients.values())
    worst, missing = 0.0, []
    for name, (_, whole) in want.gradients.items():
        largest = np.abs(whole).max()
        left = np.ones(whole.shape, dtype=bool)
        for seen in found:
            if name in seen.gradients:
                box, piece = seen.gradients[name]
                left[box.index] = False
                if largest > 1e-6 * scale:
                    worst = max(worst, float(np.abs(piece - whole[box.index]).max(initial=0) / largest))
        if left.any():
            missing.append(name)
    return worst, tuple(missing)


# --- the real pipeline ------------------------------------------------------------------------------------------------


def pipeline_of(recipe: Any, layout: Layout) -> Timeline:
    """The real pipeline of a recipe under a settled layout on a clock: stages take what their blocks and the head cost.

    The unit of time is a micro-batch forward through all stages of a rank, on average; backward takes twice that. Sends
    take none.
    """
    shape, length = getattr(recipe.model, "shape", recipe.model), recipe.data.sequence_length
    if shape.vocab_size is None:
        shape = shape.with_vocab(vocabulary_of(recipe) or BYTES)
    costs = block_costs(shape, sequence=length)
    stages = [sum(costs[block] for block in blocks) for blocks in split(shape, layout, sequence=length)]
    stages[-1] += 2.0 * shape.vocab_size * shape.hidden_size
    forward = [cost * layout.pp / sum(stages) for cost in stages]
    number = micro_batches_of(recipe, layout)
    found = order(layout.schedule, ranks=layout.pp, micro_batches=number, stages_per_rank=layout.held)
    return simulate(found, forward_seconds=forward, backward_seconds=[2 * cost for cost in forward])


def micro_batches_of(recipe: Any, layout: Layout) -> int:
    """Micro-batches of one rank in a step of the real run."""
    own: int = recipe.batch_size // layout.size("batch")
    return -(-own // min(recipe.micro_batch_size or own, own))


def described(layout: Layout) -> str:
    """The axes above 1, in words."""
    found = [f"{axis} {layout.size(axis)}" for axis in AXES if layout.size(axis) > 1]
    if layout.sequence_parallel:
        found.append("sequence parallel")
    if layout.state is not None:
        shared = ", ".join(f"{name} {layout.state.degree(name, layout.size('fsdp'))}" for name in states.DEGREES)
        found.append(f"shared by: {shared}")
    if layout.servers is not None:
        found.append("attention served by all ranks")
    if layout.cp > 1:
        engine = f"{layout.context} over " if layout.servers is None else ""
        found.append(f"{engine}{layout.order} tokens")
    if layout.pp > 1:
        found.append(f"{layout.schedule}, {layout.held} stages a rank" if layout.held > 1 else layout.schedule)
    return ", ".join(found) or "one rank"
