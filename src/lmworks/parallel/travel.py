"""In what form weights and gradients travel where a layout divides them: the one place that reads it off the state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from lmworks.parallel.billing import BilledAllGather, BilledReduceScatter
from lmworks.parallel.wire import Running, Wire

Begin = Callable[[Tensor, Tensor], Running]
"""(out (W,), x (N, W)): begin to sum x over N ranks; this rank's row of the sum is in `out` after `wait()`."""


@dataclass(frozen=True, kw_only=True)
class Travel:
    """The collectives of one rank."""

    gather: AllGather
    """FSDP's, in front of a block: over the axis weights (fsdp without a placement of states), or secondary."""
    scatter: ReduceScatter
    """FSDP's, behind a block, over the same axis."""
    sums: Callable[[Sequence[int]], Begin]
    """Of a bucket's sums over the axis gradients; given the values of each of its tensors in a row of x, in order."""


def chosen(wire: Wire) -> Travel:
    """What the layout asks for."""
    axis = "fsdp" if wire.layout.state is None else "weights"
    return Travel(
        gather=BilledAllGather(wire, axis),
        scatter=BilledReduceScatter(wire, axis),
        sums=lambda widths: lambda out_W, x_NW: wire.begin_scatter_sum(out_W, x_NW, "gradients"),
    )
