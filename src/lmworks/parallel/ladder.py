"""States that are shared by more and more ranks: weights by few, sums of gradients by more, the optimizer by most.

The optimizer is given masters: parameters under the names of the weights, of this rank's finest parts, in float32. Each
part is a slice of the coarser one, so nothing is ever put in another order:

    each micro-batch    gradients of a bucket go down to the ranks of `gradients` as soon as they are there, are added
                        to sums that stay, and are dropped
    end of the step     sums go down to the ranks of `optimizer`, and over the `copies`: gradients of the masters
    after the update    masters go up to the ranks of `gradients`, and up to the weights, in the type of the weights

Sums over the ranks that share weights are FSDP's; it calls a parameter's hooks behind its own sum, as autograd does for
a plain parameter. So both kinds come here the same way. In a pipeline the hooks rest, and all of it happens at the end
of the step: torch's schedules sum once.

Unproved, for want of several GPUs: FSDP calls hooks on its own stream, and exchanges that begin there run beside the
backward pass. Tensors of an exchange are made and read on the stream of the hook; the last ones are waited for on the
stream of the step, which FSDP has made wait for its own. They are kept until then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmworks.model.pieces import Box
from lmworks.parallel.quantised import Route
from lmworks.parallel.replicas import BUCKET_BYTES
from lmworks.parallel.shard import Slice, local, slice_of
from lmworks.parallel.travel import chosen
from lmworks.parallel.wire import Running, Wire

IN_FLIGHT = 2
"""Buckets whose sums are on their way at once; each holds its gradients twice."""


class Ladder:
    """The masters of one rank, the way of gradients down to them, and of weights back up. `kind`: their type;
    `fed_back`: as in `travel.chosen`."""

    def __init__(
        self, weights: Mapping[str, nn.Parameter], wire: Wire, kind: torch.dtype, fed_back: list[Route]
    ) -> None:
        self.wire = wire
        trained = {name: p for name, p in weights.items() if p.requires_grad}
        slices = {name: slice_of(local(p).shape[0], wire.layout, wire.rank) for name, p in trained.items()}
        self.masters = {name: _master(p, slices[name], kind) for name, p in trained.items()}
        self.slices = slices
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[Tensor, int] = {}
        for names in bucketed({name: local(p).nbytes for name, p in trained.items()}):
            members = [(trained[name], self.masters[name], slices[name]) for name in names]
            self._bucket_of |= {trained[name]: len(self._buckets) for name in names}
            self._buckets.append(_Bucket(members, wire, fed_back))
        for p in trained.values():
            p.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]
        self._left: list[int] | None = None
        self._sent = 0
        self._running: list[tuple[_Bucket, Tensor, Tensor, Running]] = []

    def own(self, name: str, part: Tensor) -> Tensor:
        """Of this rank's rows of a weight those of its master."""
        lies = self.slices[name]
        return part[lies.start : lies.start + lies.optimizer.length]

    def boxes(self, boxes: Mapping[str, Box]) -> dict[str, Box]:
        """Where masters lie in whole tensors, given where weights do; what is not trained lies as it did."""
        found = dict(boxes)
        for name, lies in self.slices.items():
            found[name] = boxes[name].narrowed(0, lies.start, lies.optimizer.length)
        return found

    def held(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """The sums that stay, and those of the masters' gradients that are no part of them."""
        sums = [bucket.sums_W for bucket in self._buckets]
        kept = {x.untyped_storage().data_ptr() for x in sums}
        return sums + [x for x in gradients if x.untyped_storage().data_ptr() not in kept]

    # --- down -------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A backward pass comes: send what arrives."""
        self._left = [len(bucket.members) for bucket in self._buckets]

    def _arrived(self, weight: Tensor) -> None:
        """torch calls it when a weight's gradient is complete, FSDP when its sum is."""
        if self._left is None:
            return
        self._left[self._bucket_of[weight]] -= 1
        while self._sent < len(self._buckets) and self._left[self._sent] == 0:
            self._send()

    def flush(self) -> None:
        """The backward pass is over: send what has not been sent, in the order of all ranks, and wait for every sum."""
        while self._sent < len(self._buckets):
            self._send()
        while self._running:
            self._settle()
        self._left, self._sent = None, 0

    def _send(self) -> None:
        """Begin the sum of the next bucket's gradients over the ranks that share them."""
        bucket = self._buckets[self._sent]
        self._sent += 1
        x_NW = bucket.taken()
        if x_NW is None:
            return
        if len(x_NW) == 1:
            bucket.add(x_NW[0])
            return
        out_W = torch.empty_like(x_NW[0])
        self._running.append((bucket, out_W, x_NW, bucket.begin(out_W, x_NW)))
        if len(self._running) > IN_FLIGHT:
            self._settle()

    def _settle(self) -> None:
        """Wait for the oldest sum, and add it."""
        bucket, out_W, _, running = self._running.pop(0)
        running.wait()
        bucket.add(out_W)

    def finish(self) -> None:
        """All micro-batches are through: give every master its gradient, of all ranks."""
        filled = [bucket for bucket in self._buckets if bucket.filled]
        for bucket in filled:
            bucket.begin_down()
        for bucket in filled:
            bucket.begin_over_copies()
        for bucket in filled:
            bucket.give()

    # --- up ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def refresh(self) -> None:
        """The masters have been stepped: bring the weights to them."""
        for bucket in self._buckets:
            bucket.refresh()


class _Bucket:
    """Some parameters whose gradients and weights travel together: weight, master, and where the one lies in the other.

    W: values of a row of what travels, chunk behind chunk; a chunk is a part with its rows filled up.
    """

    def __init__(
        self, members: Sequence[tuple[nn.Parameter, nn.Parameter, Slice]], wire: Wire, fed_back: list[Route]
    ) -> None:
        self.members = members
        self.wire = wire
        self.filled = False
        """Whether a gradient has come since the step began."""
        first = members[0][1]
        self._kind = first.dtype
        self._widths = [lies.gradients.chunk * _row(master) for _, master, lies in members]
        self.sums_W = torch.zeros(sum(self._widths), dtype=self._kind, device=first.device)
        self.begin = chosen(wire, fed_back).sums(self._widths)
        self._down_W = self.sums_W
        self._held: list[Tensor] = []
        self._running: Running | None = None

    def taken(self) -> Tensor | None:
        """The gradients, (N, W): row n for place n of the axis gradients. They are dropped. None: there are none."""
        found = [weight.grad for weight, _, _ in self.members]
        if all(gradient is None for gradient in found) or not self.sums_W.numel():
            return None
        ranks = self.wire.size("gradients")
        parts = []
        for (weight, master, lies), gradient in zip(self.members, found, strict=True):
            own = local(torch.zeros_like(weight) if gradient is None else gradient).detach()
            parts.append(_in_rows(own, ranks, lies.gradients.chunk, _row(master)))
            weight.grad = None
        x_NW = torch.empty(ranks, len(self.sums_W), dtype=self._kind, device=self.sums_W.device)
        return torch.cat(parts, 1, out=x_NW)

    def add(self, sum_W: Tensor) -> None:
        """Add a micro-batch's sums."""
        self.sums_W.add_(sum_W) if self.filled else self.sums_W.copy_(sum_W)
        self.filled = True

    def begin_down(self) -> None:
        """Begin the sum over the ranks that share the optimizer's part."""
        ranks = self.wire.size("optimizer")
        self._down_W = self.sums_W
        if ranks == 1:
            return
        parts = [
            _in_rows(rows[: lies.gradients.length], ranks, lies.optimizer.chunk, _row(master))
            for rows, (_, master, lies) in zip(self._rows(self.sums_W, self._widths), self.members, strict=True)
        ]
        x_NW = torch.cat(parts, 1)
        self._down_W = torch.empty_like(x_NW[0])
        if x_NW.numel():
            self._held = [x_NW]
            self._running = self.wire.begin_scatter_sum(self._down_W, x_NW, "optimizer")

    def begin_over_copies(self) -> None:
        """Begin the sum over the ranks with the same part."""
        self._wait()
        if self.wire.size("copies") > 1 and self._down_W.numel():
            self._running = self.wire.begin_sum(self._down_W, "copies")

    def give(self) -> None:
        """Give the masters what has been summed."""
        self._wait()
        widths = self._widths if self._down_W is self.sums_W else self._fine_widths()
        for rows, (_, master, lies) in zip(self._rows(self._down_W, widths), self.members, strict=True):
            master.grad = rows[: lies.optimizer.length].view(master.shape)
        self._down_W = self.sums_W
        self.filled = False

    def refresh(self) -> None:
        """Bring the weights to their masters, in the type of the weights."""
        kind = self.members[0][0].dtype
        parts = [master.detach().to(kind).view(-1, _row(master)) for _, master, _ in self.members]
        chunks = [lies.optimizer.chunk for _, _, lies in self.members]
        parts = self._up(parts, chunks, [lies.gradients.length for _, _, lies in self.members], "optimizer")
        chunks = [lies.gradients.chunk for _, _, lies in self.members]
        parts = self._up(parts, chunks, [lies.rows for _, _, lies in self.members], "gradients")
        for (weight, _, _), part in zip(self.members, parts, strict=True):
            local(weight).copy_(part.view(local(weight).shape))

    def _up(self, parts: list[Tensor], chunks: Sequence[int], rows: Sequence[int], axis: str) -> list[Tensor]:
        """The coarser parts, of so many rows, which the ranks of an axis have one chunk of each."""
        if self.wire.size(axis) == 1 or not sum(rows):
            return parts
        filled = [_filled(part, chunk) for part, chunk in zip(parts, chunks, strict=True)]
        found_NW = self.wire.gather(torch.cat([x.flatten() for x in filled])[None], axis, 0)
        pieces = torch.split(found_NW, [x.numel() for x in filled], 1)
        joined = zip(pieces, parts, rows, strict=True)
        return [piece.reshape(-1, part.shape[1])[:length] for piece, part, length in joined]

    def _fine_widths(self) -> list[int]:
        return [lies.optimizer.chunk * _row(master) for _, master, lies in self.members]

    def _rows(self, x_W: Tensor, widths: Sequence[int]) -> list[Tensor]:
        """Each parameter's rows of a row of what travels."""
        pieces = torch.split(x_W, list(widths))
        return [piece.view(-1, _row(master)) for piece, (_, master, _) in zip(pieces, self.members, strict=True)]

    def _wait(self) -> None:
        if self._running is not None:
            self._running.wait()
        self._running, self._held = None, []


def _master(weight: nn.Parameter, lies: Slice, kind: torch.dtype) -> nn.Parameter:
    """A parameter for this rank's finest part of a weight."""
    shape = (lies.optimizer.length, *weight.shape[1:])
    return nn.Parameter(torch.empty(shape, dtype=kind, device=local(weight).device))


def _row(x: Tensor) -> int:
    """Values of a row."""
    return math.prod(x.shape[1:])


def _in_rows(x: Tensor, ranks: int, chunk: int, row: int) -> Tensor:
    """x, rows of so many values, as (ranks, chunk x row): each rank's rows behind each other, filled up with zeros."""
    return _filled(x.reshape(-1, row), ranks * chunk).view(ranks, -1) if chunk else x.new_empty(ranks, 0)


def _filled(x: Tensor, rows: int) -> Tensor:
    """x with zeros behind it, so that it has so many rows."""
    return F.pad(x, (0, 0, 0, rows - x.shape[0])) if rows > x.shape[0] else x


def bucketed(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names of weights that travel together, given their bytes, in about the order in which their gradients come."""
    bucket: list[str] = []
    size = 0
    for name in reversed(list(sizes)):
        bucket.append(name)
        size += sizes[name]
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
