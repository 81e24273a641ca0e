"""In what form weights and gradients travel where a layout divides them: the one place that reads it off the state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from lmworks.maths.blockwise import CODES, Runs
from lmworks.parallel.billing import BilledAllGather, BilledReduceScatter
from lmworks.parallel.comms import CodedAllGather, CodedReduceScatter, SecondCopy, runs_of
from lmworks.parallel.quantised import Missed, Route
from lmworks.parallel.state import StatePlacement
from lmworks.parallel.wire import Running, Wire

Begin = Callable[[Tensor, Tensor], Running]
"""(out (W,), x (N, W)): begin to sum x over N ranks; this rank's row of the sum is in `out` after `wait()`."""


@dataclass(frozen=True, kw_only=True)
class Travel:
    """The collectives of one rank."""

    gather: Callable[[FSDPModule, bool], AllGather]
    """FSDP's, in front of a module: over the axis weights (fsdp without a placement of states), or secondary. Given
    whether the backward pass gathers again."""
    scatter: Callable[[FSDPModule], ReduceScatter]
    """FSDP's, behind a module, over the same axis."""
    sums: Callable[[Sequence[int]], Begin]
    """Of a bucket's sums over the axis gradients; given the values of each of its tensors in a row of x, in order."""


def chosen(wire: Wire, fed_back: list[Route]) -> Travel:
    """What the layout asks for. Sums that remember what their codes missed are added to `fed_back`, in the order in
    which they are made: the same every time."""
    state = wire.layout.state
    if state is None:
        return Travel(
            gather=lambda module, again: BilledAllGather(wire, "fsdp"),
            scatter=lambda module: BilledReduceScatter(wire, "fsdp"),
            sums=lambda widths: lambda out_W, x_NW: wire.begin_scatter_sum(out_W, x_NW, "gradients"),
        )
    return Travel(
        gather=lambda module, again: _gather(wire, state, module, again=again),
        scatter=lambda module: _scatter(wire, state, module, fed_back),
        sums=lambda widths: _sums(wire, state, widths, fed_back),
    )


def _gather(wire: Wire, state: StatePlacement, module: FSDPModule, *, again: bool) -> AllGather:
    runs = runs_of(module, state.block)
    code = CODES.get(state.weights_as)
    first: AllGather = BilledAllGather(wire, "weights") if code is None else CodedAllGather(wire, "weights", code, runs)
    copied = CODES.get(state.secondary_as)
    if copied is None or not again:
        return first
    return SecondCopy(wire, first, copied, runs.times(wire.size("weights")))


def _scatter(wire: Wire, state: StatePlacement, module: FSDPModule, fed_back: list[Route]) -> ReduceScatter:
    if state.gradients_as == "plain":
        return BilledReduceScatter(wire, "weights")
    return CodedReduceScatter(_route(wire, state, "weights", runs_of(module, state.block), fed_back))


def _sums(wire: Wire, state: StatePlacement, widths: Sequence[int], fed_back: list[Route]) -> Begin:
    if state.gradients_as == "plain":
        return lambda out_W, x_NW: wire.begin_scatter_sum(out_W, x_NW, "gradients")
    runs = Runs(lengths=tuple(width for width in widths if width), block=state.block)
    return _route(wire, state, "gradients", runs, fed_back).begin


def _route(wire: Wire, state: StatePlacement, axis: str, runs: Runs, fed_back: list[Route]) -> Route:
    hops = state.hops(axis, wire.layout.size("fsdp"))
    missed = Missed(share=state.feedback) if state.feedback else None
    route = Route(hops=hops, code=CODES[state.gradients_as], runs=runs, wire=wire, missed=missed)
    if missed is not None:
        fed_back.append(route)
    return route
