"""A model on the ranks of a layout: this rank's part of it, and what ranks agree on in a step.

`place` takes a model's shape and gives a Placement, in this order, each step on what the one before left:

    build on meta      nothing is allocated
    pipeline           the blocks of this rank's stages are kept
    tensor parallel    matrices become this rank's part
    saved, compile     what a block keeps, and its compiled form
    FSDP               each block, then the rest, divided over dp_shard x cp (and repeated over dp_replicate), or
                       over as many of them as a placement of states says; then masters, where they are finer
    allocate, fill     from first values by name, or a checkpoint: only this rank's boxes

With one rank nothing is cut and nothing is sent; the code is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lmworks.data.load import Batch
from lmworks.model import moe
from lmworks.model.backbone import Backbone
from lmworks.model.head import accumulate_dtype
from lmworks.model.pieces import Box, whole_box
from lmworks.parallel import context, experts, tensor
from lmworks.parallel.fsdp import shard
from lmworks.parallel.ladder import Ladder
from lmworks.parallel.parameters import Chunks, Masters
from lmworks.parallel.pipeline import Pipeline, held_by, split
from lmworks.parallel.pool import Pool
from lmworks.parallel.quantised import Route
from lmworks.parallel.replicas import Replicas
from lmworks.parallel.shard import Cut, boxes, divide, local
from lmworks.parallel.wire import Wire, alone

LossOf = Callable[..., Tensor]
"""(model, micro-batch, hidden states or None) -> its loss, divided by the counts of the whole step."""


class Placement:
    """This rank's part of a model. `model` is what optimizers, watchers and probes are given; `kind` the type of what
    an optimizer steps."""

    def __init__(
        self,
        chunks: Sequence[Backbone],
        cuts: Mapping[str, Cut],
        wire: Wire,
        device: torch.device,
        kind: torch.dtype = torch.float32,
        fed_back: Sequence[Route] = (),
    ) -> None:
        self.chunks = list(chunks)
        self.wire = wire
        self.layout = wire.layout
        self.device = device
        self.cuts = dict(cuts)
        self.weights: nn.Module = chunks[0] if len(chunks) == 1 else Chunks(chunks)
        """What blocks are given."""
        self.fed_back = list(fed_back)
        """Sums over ranks that remember what their codes missed."""
        weights = dict(self.weights.named_parameters())
        self.ladder = Ladder(weights, wire, kind, self.fed_back) if wire.layout.masters else None
        stepped = self.weights if self.ladder is None else Masters(self.weights, self.ladder.masters)
        self.model: Backbone = stepped  # type: ignore[assignment]  # asked for its parameters only, where it is no Backbone
        self._boxes = {name: box for chunk in self.chunks for name, box in boxes(chunk, self.cuts, wire).items()}
        self.boxes = self._boxes if self.ladder is None else self.ladder.boxes(self._boxes)
        self.context = context.Context(wire) if wire.size("cp") > 1 else None
        self.pipeline = Pipeline(self.chunks, wire, device) if wire.size("pp") > 1 else None
        self.replicas = self._alike()
        self._remarked = False
        self._stepped = False
        self._holders = {p: math.prod(self.others_alike(name).values()) for name, p in self.model.named_parameters()}

    def _alike(self) -> Replicas | None:
        """The sum over ranks with the same weights, where neither FSDP nor the ladder makes it."""
        axis = "dp_replicate" if self.layout.state is None else "copies"
        summed = self.ladder is not None or (axis == "dp_replicate" and self.wire.size("fsdp") > 1)
        if summed or self.wire.size(axis) == 1:
            return None
        return Replicas(self.model.parameters(), self.wire, axis)

    @property
    def share(self) -> tuple[int, int]:
        """(i, n): this rank reads rows i, i + n, ... of every draw."""
        return self.wire.place("batch"), self.wire.size("batch")

    @property
    def with_head(self) -> Backbone | None:
        """The model that holds the head; None where this rank does not."""
        return self.chunks[0] if self.pipeline is None else self.pipeline.last

    def fill(self, value: Callable[[str, Box], Tensor]) -> None:
        """Give every parameter of this rank its values: `value(name, box)` is that part of the whole tensor.

        By name, so that ranks may tell them to each other."""
        for module in self.weights.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a pass without gradient may have left gathered weights, or a second copy
        with torch.no_grad():
            for name, parameter in sorted(self.weights.named_parameters()):
                part = value(name, self._boxes[name])
                local(parameter).copy_(part)
                if self.ladder is not None and name in self.ladder.masters:
                    self.ladder.masters[name].copy_(self.ladder.own(name, part))

    # --- a step ------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Ask for the weights that the first block needs, so that they travel while the rows of the step are read.

        Not before the first step, in which FSDP finds out about its modules, nor where weights travel as codes.
        """
        chunk, state = self.chunks[0], self.layout.state
        plain = state is None or (state.weights_as == "plain" and state.secondary is None)
        if self._stepped and plain and isinstance(chunk, FSDPModule):
            first = next(iter(chunk.blocks.values()))
            for module in (chunk, first):
                assert isinstance(module, FSDPModule), "blocks are divided where their model is"
                module.unshard(async_op=True)

    def backward(self, micros: Sequence[Batch], loss_of: LossOf) -> Tensor:
        """Forward and backward over the micro-batches; gradients add up in `.grad`. Returns this rank's loss."""
        micros = [self.own(micro) for micro in micros]
        if self.pipeline is not None:
            total = self.pipeline.backward(micros, loss_of)
        else:
            total = torch.zeros((), device=self.device)
            for i, micro in enumerate(micros):
                self._sync_at_the_end(i == len(micros) - 1)
                if self.replicas is not None and i == len(micros) - 1:
                    self.replicas.begin()
                with self.wire.spans.span("forward", number=i):
                    loss = loss_of(self.chunks[0], micro)
                if self.ladder is not None:
                    self.ladder.begin()
                with self.wire.spans.span("backward", number=i):
                    torch.autograd.backward(loss)
                if self.ladder is not None:
                    self.ladder.flush()
                total = total + loss.detach()
        self._join_gradients()
        self._stepped = True
        return total

    def own(self, batch: Batch) -> Batch:
        """This rank's tokens of its rows."""
        return batch if self.context is None else self.context.own(batch)

    def hidden(self, batch: Batch) -> Tensor | None:
        """The model's hidden states of this rank's rows and tokens, no gradient; None where the head is elsewhere."""
        if self.pipeline is not None:
            return self.pipeline.hidden(batch)
        with torch.no_grad():
            result: Tensor = self.chunks[0](
                batch.tokens_BT, positions_BT=batch.positions_BT, documents_BT=batch.documents_BT
            )
        return result

    def total_of_rows(self, x: Tensor) -> Tensor:
        """Numbers counted on this rank's rows, summed over all rows, in place."""
        return self.wire.sum(x, "batch")

    def total_of_tokens(self, x: Tensor) -> Tensor:
        """Numbers counted by the ranks with a head on their tokens, zero elsewhere: summed over all, in place."""
        return self.wire.sum(x.div_(self.wire.size("tp")), "world")

    def norm_and(self, parameters: Sequence[nn.Parameter], facts: Tensor) -> tuple[Tensor, Tensor]:
        """The global L2 norm of the gradients, and `facts` [K] of each rank's tokens, summed: one collective."""
        mine = facts.double() / self.wire.size("tp")
        if self.with_head is None:
            mine.zero_()
        summed = self.wire.sum(torch.cat([self._squares(parameters)[None], mine]), "world")
        kind = accumulate_dtype(next(self.model.parameters()))
        return summed[0].sqrt().to(kind), summed[1:].to(kind)

    def _squares(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """The sum of squares of this rank's gradients, each divided by the number of ranks that hold the same."""
        found = [(p, local(p.grad)) for p in parameters if p.grad is not None]
        if not found:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        norms = torch.stack(torch._foreach_norm([grad for _, grad in found])).double()
        holders = torch.tensor([self._holders[p] for p, _ in found], dtype=torch.float64, device=self.device)
        return (norms.square() / holders).sum()

    def others_alike(self, name: str) -> dict[str, int]:
        """Along which axes other ranks hold the same values of a parameter, and how many ranks hold them."""
        axes, cut = ["dp_replicate"], self.cuts.get(name)
        if cut is not None and cut.axis == "ep":
            axes.append("edp")
        elif self.layout.state is not None and self.model.get_parameter(name).requires_grad:
            axes.append("copies")
        elif not isinstance(self.model.get_parameter(name), DTensor):
            axes.append("fsdp")
        if cut is None:
            axes.append("tp")
        if self._at_both_ends(name):
            axes.append("ends")
        return {axis: self.wire.size(axis) for axis in axes}

    def first_holder(self, name: str) -> bool:
        """Whether this rank is the first of those that hold the same values."""
        return not any(self.wire.place("pp" if axis == "ends" else axis) for axis in self.others_alike(name))

    def remarks(self) -> tuple[str, ...]:
        """What people should hear of the passes so far, once a run."""
        if self.layout.servers is None:
            return ()
        found = [text for chunk in self.chunks if isinstance(chunk.reach, Pool) for text in chunk.reach.remarks[:1]]
        told, self._remarked = self._remarked, self._remarked or bool(found)
        return () if told else tuple(found[:1])

    # --- around the passes ------------------------------------------------------------------------------------------

    def balanced(self, rows: int) -> AbstractContextManager[None]:
        """Around the passes of a step over `rows` rows: experts' loads are counted and their aux loss enters."""
        return moe.balanced(self.weights, rows=rows)

    def after_update(self) -> dict[str, Tensor]:
        """Bring weights to their masters, move the experts' biases, and tell of the step: how even their load was, how
        long pipeline ranks waited."""
        if self.ladder is not None:
            self.ladder.refresh()
        return self._waited() | self._loads()

    def _waited(self) -> dict[str, Tensor]:
        """Seconds that ranks waited in the pipeline over seconds that they computed: the bubble, sends included."""
        if self.pipeline is None:
            return {}
        busy, idle = self.wire.sum(torch.tensor(self.pipeline.seconds(), device=self.device).double(), "world")
        return {"pipeline/idle_share": idle / busy}

    def _loads(self) -> dict[str, Tensor]:
        if getattr(self.chunks[0].config, "experts", None) is None:
            return {}
        columns = moe.after_update(self.weights, lambda x: self.wire.sum(x, "loss"))
        none = torch.zeros((), dtype=torch.float64, device=self.device)
        found = {name: columns.get(name, none).double() for name in ("experts/max_load", "experts/aux_loss")}
        same = self.layout.ranks // self.layout.pp  # ranks of one stage hold one figure
        return {
            "experts/max_load": self.wire.maximum(found["experts/max_load"], "world"),
            "experts/aux_loss": self.wire.sum(found["experts/aux_loss"] / same, "world"),
        }

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def values(self) -> dict[str, Tensor]:
        """Everything that a checkpoint keeps of the model: parameters and persistent buffers of this rank by name."""
        own = {} if self.ladder is None else self.ladder.masters
        return {name: own.get(name, value) for chunk in self.chunks for name, value in chunk.state_dict().items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter of the whole model, and of this rank's buffers."""
        buffers = {name: tuple(value.shape) for name, value in self.values().items() if name not in self.boxes}
        return dict(self.chunks[0].config.shapes()) | buffers

    def saved(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Box]]:
        """Of tensors named 'parameter' or 'parameter/state': those that this rank is the first to hold, and where they
        lie. So each value is with one rank; `spread.saved` shares them out evenly.

        A tensor with one entry for each run of values along its parameter's last dim lies as the values do. Any other
        tensor, such as a step count, is whole on every rank.
        """
        mine, where = {}, {}
        first = not any(self.wire.place(axis) for axis in ("dp_replicate", "fsdp", "tp"))
        for name, either in tensors.items():
            parameter = name if name in self.boxes else name.rpartition("/")[0]
            box, value = self.boxes.get(parameter), local(either)
            if box is None:
                holds, part = first, whole_box(value.shape)
            elif (lies := box.of(value.shape, box.lengths)) is not None:
                holds, part = self.first_holder(parameter) and not box.empty, lies
            else:
                holds, part = self.first_holder(parameter) and not any(box.offsets), whole_box(value.shape)
            if holds:
                mine[name], where[name] = value, part
        return mine, where

    # --- gradients that FSDP does not know of -----------------------------------------------------------------------

    def _sync_at_the_end(self, last: bool) -> None:
        """Gradients are exchanged once a step, with the last micro-batch; a pipeline's schedule does it by itself.

        With a placement of states they are exchanged with every micro-batch.
        """
        for chunk in self.chunks:
            if isinstance(chunk, FSDPModule) and self.pipeline is None and self.layout.state is None:
                chunk.set_requires_gradient_sync(last)
                chunk.set_is_last_backward(last)

    def _join_gradients(self) -> None:
        """Sum what replicas have, what tp ranks have a part of each, and a tied token table that stands at both ends of
        a pipeline."""
        if self.replicas is not None:
            self.replicas.finish()
        if self.ladder is not None:
            self.ladder.flush()  # in a pipeline nothing was sent before
            self.ladder.finish()
        named = dict(self.model.named_parameters())
        if self.wire.size("tp") > 1:
            divided = self.layout.sequence_parallel
            partial = [
                local(p.grad)
                for name, p in named.items()
                if p.grad is not None and name not in self.cuts and tensor.partial_over_tp(name, tokens_divided=divided)
            ]
            self._sum_together(partial, "tp")
        cut = [local(p.grad) for name, p in named.items() if p.grad is not None and self._by_expert(name)]
        if self.wire.size("edp") > 1:
            self._sum_together(cut, "edp")
        if self.replicas is None and self.wire.size("dp_replicate") > 1:
            self._sum_together(cut, "dp_replicate")
        table = named.get("embed.weight")
        if table is not None and table.grad is not None and self._at_both_ends("embed.weight"):
            self.wire.sum(local(table.grad), "ends" if self.wire.size("pp") > 2 else "pp")

    @property
    def masters_bytes(self) -> int:
        """Bytes of the parameters that an optimizer steps in place of the weights."""
        return 0 if self.ladder is None else sum(x.nbytes for x in self.ladder.masters.values())

    def gradients(self) -> list[Tensor]:
        """What this rank holds of gradients at the end of a step, each value once."""
        found = [p.grad for p in self.model.parameters() if p.grad is not None]
        return found if self.ladder is None else self.ladder.held(found)

    def _sum_together(self, tensors: Sequence[Tensor], axis: str) -> None:
        """Sum several tensors over an axis by one collective."""
        if not tensors:
            return
        flat = torch.cat([x.flatten() for x in tensors])
        self.wire.sum(flat, axis)
        for x, summed in zip(tensors, torch.split(flat, [x.numel() for x in tensors]), strict=True):
            x.copy_(summed.view_as(x))

    def _by_expert(self, name: str) -> bool:
        """Whether this rank holds some of the experts, of which FSDP does not know."""
        return name in self.cuts and self.cuts[name].axis == "ep"

    def _at_both_ends(self, name: str) -> bool:
        """Whether a parameter stands on the first and on the last rank of the pipeline."""
        if self.pipeline is None or name != "embed.weight" or not self.chunks[0].config.tied:
            return False
        return not self.layout.both_ends_on_one_rank


def place(
    config: Any,
    wire: Wire,
    device: torch.device,
    *,
    dtype: torch.dtype,
    sequence: int,
    arrange: Callable[[Backbone], None] = lambda model: None,
    param_dtype: torch.dtype = torch.float32,
) -> Placement:
    """This rank's part of a model of that shape, allocated and not yet filled. `arrange`: saved policy and compile."""
    layout = wire.layout
    wholes = [range(config.n_layers)]
    stages = split(config, layout, sequence=sequence) if layout.pp > 1 else wholes
    held = held_by(layout, wire.place("pp")) if layout.pp > 1 else [0]
    chunks: list[Backbone] = []
    cuts: dict[str, Cut] = {}
    for stage in held:
        chunk = config.build(dtype=dtype, device="meta", param_dtype=dtype if layout.narrow_weights else param_dtype)
        for parameter in chunk.parameters():
            if not parameter.requires_grad:  # such as experts' biases: nobody keeps a master of them
                parameter.data = parameter.data.to(param_dtype)
        if layout.pp > 1:
            chunk.keep_stage(stages[stage], first=stage == 0, last=stage == layout.stages - 1)
        cuts |= (own := tensor.cuts_for(chunk, wire) | experts.cuts_for(chunk, wire))
        divide(chunk, own)
        tensor.connect(chunk, own, wire, tokens_divided=layout.sequence_parallel, slices=layout.tp_slices)
        experts.connect(chunk, wire)
        context.connect(chunk, wire)
        arrange(chunk)
        chunks.append(chunk)
    if len(chunks) > 1 and config.tied and held[0] == 0 and held[-1] == layout.stages - 1:
        chunks[-1].embed = chunks[0].embed  # both ends of a V: one table, one gradient
    fed_back: list[Route] = []
    if layout.size("fsdp" if layout.state is None else "weights") > 1:
        for chunk in chunks:
            shard(chunk, wire, device, dtype, {name for name, cut in cuts.items() if cut.axis == "ep"}, fed_back)
    for chunk in chunks:
        chunk.to_empty(device=device)
    return Placement(chunks, cuts, wire, device, param_dtype, fed_back)


def whole(model: Backbone) -> Placement:
    """A model that one rank holds as it is."""
    return Placement([model], {}, alone(), next(model.parameters()).device)
