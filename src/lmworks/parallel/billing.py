"""FSDP's own collectives, through the counted door. torch calls these in place of its defaults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from lmworks.parallel.wire import Wire, gather_into, reduce_scatter_into


class Billed:
    """Memory as torch allocates it, and the wire that keeps the bill."""

    def __init__(self, wire: Wire, axis: str) -> None:
        self.wire = wire
        self.axis = axis

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A new tensor for a collective's result."""
        return torch.empty(*size, dtype=dtype, device=device)


class BilledAllGather(Billed, AllGather):
    """Weights, gathered in front of a block: from the ranks of the axis, or from fewer that share a second copy."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> dist.Work | None:
        """As torch.distributed.all_gather_into_tensor."""
        n = group.size()
        axis = self.axis if n == self.wire.size(self.axis) else "secondary"
        with self.wire.counted(axis, "all-gather", (n - 1) / n * output_tensor.nbytes):
            work: dist.Work | None = gather_into(output_tensor, input_tensor, group=group, async_op=async_op)
        return work


class BilledReduceScatter(Billed, ReduceScatter):
    """Gradients, summed behind a block."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        """As torch.distributed.reduce_scatter_tensor."""
        n = group.size()
        with self.wire.counted(self.axis, "reduce-scatter", (n - 1) / n * input_tensor.nbytes):
            work: dist.Work | None = reduce_scatter_into(
                output_tensor, input_tensor, op=op, group=group, async_op=async_op
            )
        return work


def billed_all_reduce(wire: Wire) -> Callable[[Tensor], None]:
    """A hook that FSDP calls behind its sum of gradients over dp_replicate."""

    def note(summed: Tensor) -> None:
        copies = wire.size("dp_replicate")
        size = 2 * (copies - 1) / copies * summed.nbytes
        wire.note("dp_replicate", "all-reduce", size)
        wire.flight.leave(wire.flight.enter("dp_replicate", "all-reduce", size))

    return note
