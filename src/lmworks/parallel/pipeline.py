"""Pipeline parallel: which blocks make a stage, and micro-batches through the stages by torch's schedules
(`schedule.py` tells them apart).

A stage is a model with `keep_stage` applied: names stay, so checkpoints do. The loss of a micro-batch is already
divided by the counts of the whole step, and so nothing is scaled afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage

from lmworks.core.spans import Clock
from lmworks.data.load import Batch
from lmworks.model.backbone import Backbone
from lmworks.model.sizes import Shape, mean_keys
from lmworks.parallel.clock import clock_of
from lmworks.parallel.flight import Entry
from lmworks.parallel.layout import V_SHAPED, Layout
from lmworks.parallel.schedule import TORCH, Action, Kind, order
from lmworks.parallel.wire import BACK, Running, Wire


def split(config: Shape, layout: Layout, *, sequence: int) -> list[range]:
    """The blocks of each stage: as the layout says, or so that the dearest stage is cheapest."""
    n_layers = config.n_layers
    if layout.split is not None:
        stops = [sum(layout.split[: i + 1]) for i in range(len(layout.split))]
        return [range(stop - size, stop) for stop, size in zip(stops, layout.split, strict=True)]
    costs = block_costs(config, sequence=sequence)
    head = 2.0 * (config.vocab_size or 0) * config.hidden_size
    lengths = cheapest(costs, layout.stages, after=head)
    assert sum(lengths) == n_layers, "every block is in a stage"
    return [range(sum(lengths[:i]), sum(lengths[: i + 1])) for i in range(len(lengths))]


def block_costs(config: Shape, *, sequence: int) -> list[float]:
    """Forward FLOPs of each block per token, as in `model.sizes.cost`. A token table is looked up, which is free."""
    found = [4.0 * block.n_heads * block.head_dim * mean_keys(sequence, block.window) for block in config.blocks()]
    for name, shape in config.shapes():
        parts = name.split(".")
        if parts[0] == "blocks" and len(shape) == 2:
            found[int(parts[1])] += 2.0 * shape[0] * shape[1]
    return found


def cheapest(costs: Sequence[float], stages: int, *, after: float) -> list[int]:
    """Blocks per stage, at least one each, in order, so that the dearest stage costs least; `after` falls on the last.

    Of several such splits the one whose early stages are longest. Exact, by dynamic programming.
    """
    total = len(costs)
    starts = [sum(costs[:i]) for i in range(total + 1)]
    # best[i]: the least dearest cost of blocks i .. in the stages that are left, and how many blocks the first takes
    best: list[tuple[float, int]] = [(starts[total] - starts[i] + after, total - i) for i in range(total)]
    tables = [best]
    for left in range(2, stages + 1):
        row = []
        for i in range(total):
            choices = [(max(starts[j] - starts[i], tables[-1][j][0]), i - j) for j in range(i + 1, total - left + 2)]
            least, taken = min(choices) if choices else (float("inf"), 0)
            row.append((least, -taken))
        tables.append(row)
    lengths, at = [], 0
    for table in reversed(tables):
        lengths.append(table[at][1])
        at += table[at][1]
    return lengths


def held_by(layout: Layout, place: int) -> list[int]:
    """The stages of the rank at a place of pp, in order."""
    if layout.schedule in V_SHAPED:
        return [place, layout.stages - 1 - place]
    return [place + layout.pp * i for i in range(layout.held)]


def holder(layout: Layout, stage: int) -> int:
    """The place in pp of the rank that holds a stage."""
    return next(place for place in range(layout.pp) if stage in held_by(layout, place))


class Mail:
    """What a stage that is alone on its rank receives and sends in a step, none of it waited for before it is needed.

    Gradients go back over a group of their own: where a backend keeps what goes between two ranks in one order, a
    receive that stands early would hold up the send behind it. Shown with gloo only, for want of several GPUs.
    """

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._coming: dict[tuple[Kind, int], list[Running]] = {}
        self._going: list[Running] = []

    def await_all(self, kind: Kind, of: Callable[[int], Any], micro_batches: int) -> None:
        """Post the receives of all micro-batches; `of` gives torch's."""
        of_place = self._wire.place("pp") + (-1 if kind is Kind.FORWARD else 1)
        for i in range(micro_batches):
            posted = [self._wire.begin_receive(x.tensor, of_place, "pp", _group(kind)) for x in of(i)]
            self._coming[kind, i] = posted

    def arrived(self, kind: Kind, micro_batch: int) -> None:
        """Return when what a micro-batch needs is there."""
        for running in self._coming.pop((kind, micro_batch), ()):
            running.wait()

    def send(self, kind: Kind, operations: Any) -> None:
        """Send, and do not wait."""
        to = self._wire.place("pp") + (1 if kind is Kind.FORWARD else -1)
        self._going += [self._wire.begin_send(x.tensor, to, "pp", _group(kind)) for x in operations]

    def settle(self) -> None:
        """The step is over: return when all is sent."""
        for running in self._going:
            running.wait()
        self._going.clear()


def _group(kind: Kind) -> str:
    return "pp" if kind is Kind.FORWARD else BACK


class Stage(PipelineStage):
    """torch's stage, with what it sends put on the bill, and the time that it computes on the clock.

    With `mail` torch's schedule finds nothing to send or to wait for: it is under way already.
    """

    wire: Wire
    timed: Callable[[Action], AbstractContextManager[None]]
    awaited: dict[tuple[Kind, int], list[Entry]]
    """On the flight record: messages that are to come, by direction and micro-batch."""
    mail: Mail | None = None
    micro_batches: int = 0

    def forward_one_chunk(self, fwd_chunk_id: int, *words: Any, **named: Any) -> Any:
        """A micro-batch forward."""
        self._came(Kind.FORWARD, fwd_chunk_id)
        with self.timed(Action(Kind.FORWARD, self.stage_index, fwd_chunk_id)):
            return super().forward_one_chunk(fwd_chunk_id, *words, **named)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Tensor | None = None, full_backward: bool = True, last_backward: bool = False
    ) -> Any:
        """A micro-batch backward, or the gradient of its input alone."""
        self._came(Kind.BACKWARD, bwd_chunk_id)
        kind = Kind.BACKWARD if full_backward else Kind.BACKWARD_INPUT
        with self.timed(Action(kind, self.stage_index, bwd_chunk_id)):
            return super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *words: Any, **named: Any) -> Any:
        """The gradient of the weights for a micro-batch, where it was left for later."""
        with self.timed(Action(Kind.BACKWARD_WEIGHT, self.stage_index, bwd_chunk_id)):
            return super().backward_weight_one_chunk(bwd_chunk_id, *words, **named)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Any:
        """What torch receives from the stage before. The first question of a step is for micro-batch 0."""
        if self.mail is None:
            return self._expected(super().get_fwd_recv_ops(fwd_chunk_id), Kind.FORWARD, fwd_chunk_id)
        if fwd_chunk_id == 0:
            self.mail.await_all(Kind.FORWARD, super().get_fwd_recv_ops, self.micro_batches)
            self.mail.await_all(Kind.BACKWARD, super().get_bwd_recv_ops, self.micro_batches)
        return []

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Any:
        """What torch receives from the next stage."""
        if self.mail is not None:
            return []
        return self._expected(super().get_bwd_recv_ops(bwd_chunk_id), Kind.BACKWARD, bwd_chunk_id)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> Any:
        """What torch sends to the next stage."""
        return self._sent(Kind.FORWARD, super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> Any:
        """What torch sends to the stage before."""
        return self._sent(Kind.BACKWARD, super().get_bwd_send_ops(bwd_chunk_id))

    def _sent(self, kind: Kind, operations: Any) -> Any:
        if self.mail is not None:
            self.mail.send(kind, operations)
            return []
        flight = self.wire.flight
        for operation in operations:
            size = operation.tensor.nbytes
            self.wire.note("pp", "send", size)
            flight.leave(flight.enter("pp", "send", size, operation.peer))  # it goes on beside the work
        return operations

    def _expected(self, operations: Any, kind: Kind, micro_batch: int) -> Any:
        enter = self.wire.flight.enter
        self.awaited[kind, micro_batch] = [enter("pp", "receive", o.tensor.nbytes, o.peer) for o in operations]
        return operations

    def _came(self, kind: Kind, micro_batch: int) -> None:
        """What a piece of work needs has come, or comes now."""
        if self.mail is not None:
            self.mail.arrived(kind, micro_batch)
        for entry in self.awaited.pop((kind, micro_batch), ()):
            self.wire.flight.leave(entry)


class Pipeline:
    """The stages of this rank."""

    def __init__(self, chunks: Sequence[Backbone], wire: Wire, device: torch.device) -> None:
        self.chunks = list(chunks)
        self.wire = wire
        self.device = device
        layout = wire.layout
        self.stages = held_by(layout, wire.place("pp"))
        self._schedules: dict[tuple[int, int, int], Any] = {}
        self._mail = Mail(wire) if layout.sends == "early" else None
        self._loss_of: Callable[[Backbone, Batch, Tensor], Tensor] | None = None
        self._micros: Sequence[Batch] = ()
        self._clock: Clock = clock_of(device)
        self._computed: list[tuple[Any, Any]] = []
        self._whole: tuple[Any, Any] | None = None
        self._next: dict[Action, Action | None] = {}
        self._orders: dict[int, dict[Action, Action | None]] = {}
        self.on_stage: Callable[[Action, Action | None], None] | None = None
        """Told before each piece of work what it is, and what this rank does after it."""

    @contextmanager
    def _timed(self, action: Action | None = None) -> Iterator[None]:
        if self.on_stage is not None and action is not None:
            self.on_stage(action, self._next.get(action))
        name, number = ("loss", None) if action is None else (str(action.kind.value), action.micro_batch)
        start = self._clock.mark()
        with self.wire.spans.span(name, number=number):
            yield
        self._computed.append((start, self._clock.mark()))

    def seconds(self) -> tuple[float, float]:
        """Of the last backward pass: seconds that this rank computed, exchanges inside a stage with it, and waited."""
        if self._whole is None:
            return 0.0, 0.0
        busy = sum(self._clock.between(*span) for span in self._computed)
        return busy, self._clock.between(*self._whole) - busy

    @property
    def last(self) -> Backbone | None:
        """The stage with the head, where this rank holds it."""
        return self.chunks[-1] if self.stages[-1] == self.wire.layout.stages - 1 else None

    def backward(self, micros: Sequence[Batch], loss_of: Callable[[Backbone, Batch, Tensor], Tensor]) -> Tensor:
        """All micro-batches forward and backward; the sum of their losses, 0 where the head is not."""
        self._micros, self._loss_of = micros, loss_of
        rows, length = micros[0].tokens_BT.shape
        schedule = self._schedule(len(micros), rows, length)
        if self.on_stage is not None:
            self._next = self._following(len(micros))
        tokens_BT, positions_BT, documents_BT = (
            torch.cat([getattr(micro, name) for micro in micros])
            for name in ("tokens_BT", "positions_BT", "documents_BT")
        )
        losses: list[Tensor] = []
        facts = {"positions_BT": positions_BT, "documents_BT": documents_BT}
        if self.last is not None:
            facts |= {"target": torch.arange(len(micros)), "losses": losses}  # type: ignore[dict-item]  # not all are tensors
        inputs = (tokens_BT,) if self.stages[0] == 0 else ()
        self._computed.clear()
        start = self._clock.mark()
        with self.wire.spans.span("pipeline", exchange=True):  # what is not in the passes is waiting
            schedule.step(*inputs, return_outputs=False, **facts)
            if self._mail is not None:
                self._mail.settle()
        self._whole = start, self._clock.mark()
        self._micros, self._loss_of = (), None
        if not losses:
            return torch.zeros((), device=self.device)
        return torch.stack([loss.detach() for loss in losses]).sum()

    def _loss(self, hidden_BTD: Tensor, which: Tensor) -> Tensor:
        assert self._loss_of is not None, "the schedule runs inside of backward"
        assert self.last is not None, "only the last stage has a loss"
        with self._timed():
            return self._loss_of(self.last, self._micros[int(which)], hidden_BTD)

    def _schedule(self, micro_batches: int, rows: int, length: int) -> Any:
        """torch's schedule for so many micro-batches of this shape, made once."""
        key = (micro_batches, rows, length)
        if key not in self._schedules:
            stages = [self._stage(i, rows, length) for i in range(len(self.chunks))]
            for stage in stages:
                stage.mail, stage.micro_batches = self._mail, micro_batches
            made = TORCH[self.wire.layout.schedule]
            single = self.wire.layout.held == 1
            self._schedules[key] = made(
                stages[0] if single else stages, micro_batches, loss_fn=self._loss, scale_grads=False
            )
        return self._schedules[key]

    def _following(self, micro_batches: int) -> dict[Action, Action | None]:
        """What this rank does after each piece of its work."""
        layout = self.wire.layout
        if micro_batches not in self._orders:
            found = order(layout.schedule, ranks=layout.pp, micro_batches=micro_batches, stages_per_rank=layout.held)
            mine = found.ranks[self.wire.place("pp")]
            self._orders[micro_batches] = dict(zip(mine, [*mine[1:], None], strict=True))
        return self._orders[micro_batches]

    def _stage(self, which: int, rows: int, length: int) -> Stage:
        chunk, index = self.chunks[which], self.stages[which]
        first, last = index == 0, index == self.wire.layout.stages - 1
        tokens = torch.empty((rows, length), dtype=torch.int64, device="meta")
        between = torch.empty(self._between(rows, length), dtype=chunk.dtype, device="meta", requires_grad=True)
        whole = torch.empty((rows, length, between.shape[-1]), dtype=chunk.dtype, device="meta", requires_grad=True)
        stage = Stage(
            chunk,
            index,
            self.wire.layout.stages,
            self.device,
            input_args=tokens if first else between,
            output_args=whole if last else between,
            group=self.wire.group("pp"),
        )
        stage.wire, stage.timed, stage.awaited = self.wire, self._timed, {}
        return stage

    def _between(self, rows: int, length: int) -> tuple[int, int, int]:
        """The shape of what stages hand on."""
        divided = self.wire.size("tp") if self.wire.layout.sequence_parallel else 1
        return rows, length // divided, self.chunks[0].config.hidden_size

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor | None:
        """Forward only: the hidden states where the head is, None elsewhere."""
        layout, x = self.wire.layout, batch.tokens_BT
        for stage in range(layout.stages):
            if stage not in self.stages:
                continue
            chunk = self.chunks[self.stages.index(stage)]
            if stage > 0 and stage - 1 not in self.stages:
                shape = self._between(*batch.tokens_BT.shape)
                x = self.wire.receive(shape, chunk.dtype, self.device, holder(layout, stage - 1), "pp")
            x = chunk(x, positions_BT=batch.positions_BT, documents_BT=batch.documents_BT)
            if stage + 1 < layout.stages and stage + 1 not in self.stages:
                self.wire.send(x, holder(layout, stage + 1), "pp")
        return x if self.last is not None else None
