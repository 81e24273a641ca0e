"""FSDP's collectives whose tensors travel as block codes. torch calls these in place of its defaults.

torch hands over flat buffers, in which the parts of a module's parameters lie behind each other: everything in them is
coded, vectors and odd lengths as well, each parameter in blocks of its own. All work is done on the stream on which
torch calls, and is in that stream's order when the call returns: a second copy cannot be read before it is whole.
That much is shown on CPUs only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from lmworks.maths.blockwise import Blocks, Code, Runs, quantise, unpacked
from lmworks.parallel.billing import Billed, BilledAllGather
from lmworks.parallel.parcels import in_parts
from lmworks.parallel.quantised import Route, gather, gather_packets
from lmworks.parallel.wire import Wire


def runs_of(module: FSDPModule, block: int) -> Runs:
    """How the flat buffer of one rank's parts of a module is cut: by the parameters that FSDP divides there."""
    group = module._get_fsdp_state()._fsdp_param_group
    divided = [] if group is None else group.fsdp_params
    return Runs(lengths=tuple(p.padded_sharded_param_size.numel() for p in divided), block=block)


class CodedAllGather(Billed, AllGather):
    """Weights, gathered in front of a block. The part that a rank steps stays as it is, so no error adds up.

    From fewer ranks, which share a plain second copy of what the codes told, they are gathered as they are.
    """

    def __init__(self, wire: Wire, axis: str, code: Code, runs: Runs) -> None:
        super().__init__(wire, axis)
        self.code, self.runs = code, runs
        self.second = BilledAllGather(wire, axis)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
        """As torch.distributed.all_gather_into_tensor, of what the codes tell."""
        if group.size() < self.wire.size(self.axis):
            self.second(output_tensor, input_tensor, group)
        else:
            gather(output_tensor, input_tensor, self.axis, self.code, self.runs, self.wire)


class SecondCopy(Billed, AllGather):
    """The same, and a second copy of what was gathered: each rank of the axis `secondary` keeps a part of it as codes,
    from which the backward pass gathers.

    Every forward pass makes it anew, so it is never older than the weights that the pass went through. A pass that is
    run again in the backward pass reads the copy.
    """

    def __init__(self, wire: Wire, first: AllGather, code: Code, runs: Runs) -> None:
        super().__init__(wire, "secondary")
        self.first, self.code = first, code
        self.parts = in_parts(runs, wire.size("secondary"))
        """Of each place. `runs`: of all that is gathered."""
        self.start = sum(part.values for part in self.parts[: wire.place("secondary")])
        self.kept: Blocks | None = None

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
        """As torch.distributed.all_gather_into_tensor, from where this pass reads."""
        if _in_backward() and self.kept is not None:
            self._read(output_tensor)
            return
        self.first(output_tensor, input_tensor, group, False)
        own = self.parts[self.wire.place("secondary")]
        self.kept = quantise(output_tensor[None, self.start : self.start + own.values], self.code, own)

    def _read(self, out_N: Tensor) -> None:
        """Packets are as long as the longest: parts of uneven cuts have uneven numbers of scales."""
        assert self.kept is not None
        packet_S = self.kept.packet(self.code)[0]
        longest = max(part.nbytes(self.code) for part in self.parts)
        sent_S = torch.nn.functional.pad(packet_S, (0, longest - packet_S.numel()))
        found_RS = gather_packets(sent_S, self.axis, self.code, self.wire)
        at = 0
        for part, packet in zip(self.parts, found_RS, strict=True):
            if part.values:
                told = unpacked(packet[None, : part.nbytes(self.code)], self.code, part)
                out_N[at : at + part.values] = told.decode(out_N.dtype)[0]
            at += part.values


class CodedReduceScatter(Billed, ReduceScatter):
    """Gradients, summed behind a block by all-to-all, in one hop or two."""

    def __init__(self, route: Route) -> None:
        super().__init__(route.wire, route.hops[0])
        self.route = route

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """As torch.distributed.reduce_scatter_tensor, of what the codes tell."""
        assert op == dist.ReduceOp.SUM, "losses are sums of shares"
        self.route.begin(output_tensor, input_tensor).wait()


def _in_backward() -> bool:
    """Whether autograd runs a backward pass on this thread: there FSDP gathers for it, in time and ahead of it."""
    return torch._C._current_graph_task_id() != -1
