"""Gradients of weights that every rank of an axis holds alike, summed while the backward pass goes on.

Gradients come in about the reverse order of the parameters. They are put together in buckets, as DDP does it, so that
few exchanges are made, and the first of them run beside the rest of the backward pass. Where FSDP divides weights it
sums over dp_replicate by itself, and this is not used; over the copies of a placement of states it is, and the
gradients are then those of FSDP's parts.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lmworks.parallel.shard import local
from lmworks.parallel.wire import Running, Wire

BUCKET_BYTES = 25 << 20
"""Gradients that travel together, as in DDP: large enough for the link, small enough to begin early."""


class Replicas:
    """The gradients of one rank's model."""

    def __init__(self, parameters: Iterable[nn.Parameter], wire: Wire, axis: str = "dp_replicate") -> None:
        self._wire = wire
        self._axis = axis
        self._buckets: list[list[nn.Parameter]] = []
        self._bucket_of: dict[nn.Parameter, int] = {}
        size = BUCKET_BYTES
        for parameter in reversed([p for p in parameters if p.requires_grad]):
            if size >= BUCKET_BYTES:
                self._buckets.append([])
                size = 0
            self._buckets[-1].append(parameter)
            self._bucket_of[parameter] = len(self._buckets) - 1
            size += local(parameter).nbytes
            parameter.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]
        self._left: list[int] | None = None
        self._running: list[tuple[list[Tensor], Tensor, Running]] = []

    def begin(self) -> None:
        """The backward pass that comes is the last one of the step: send what arrives."""
        self._left = [len(bucket) for bucket in self._buckets]

    def finish(self) -> None:
        """Send what has not been sent, in the order in which all ranks send it, and wait for every sum."""
        while len(self._running) < len(self._buckets):
            self._send()
        for gradients, flat, running in self._running:
            running.wait()
            for gradient, summed in zip(gradients, torch.split(flat, [x.numel() for x in gradients]), strict=True):
                gradient.copy_(summed.view_as(gradient))
        self._running.clear()
        self._left = None

    def _arrived(self, parameter: Tensor) -> None:
        """torch calls it when a parameter's gradient is complete."""
        if self._left is None:
            return
        self._left[self._bucket_of[parameter]] -= 1  # type: ignore[index]  # the parameter that it was registered on
        while len(self._running) < len(self._buckets) and self._left[len(self._running)] == 0:
            self._send()

    def _send(self) -> None:
        """Begin the sum of the next bucket."""
        gradients = [local(p.grad) for p in self._buckets[len(self._running)] if p.grad is not None]
        flat = torch.cat([x.flatten() for x in gradients]) if gradients else torch.zeros(0)
        self._running.append((gradients, flat, self._wire.begin_sum(flat, self._axis)))
