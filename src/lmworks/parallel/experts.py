"""Expert parallel: the experts of a layer divided among the ranks of ep, tokens sent to where their expert is and back.

The ranks of ep are neighbours on fsdp: they read other rows or hold other tokens. Rank r of n holds experts
r E / n .. of every layer. What travels is the tokens that chose them, by two all-to-alls forward and two backward; how
many is known only then, and asked first. A rank's experts see the tokens of all ranks of its ep, so their gradients
lack only those of other groups (edp) and of dp_replicate: these are summed here, since FSDP leaves experts alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lmworks.model.backbone import Backbone
from lmworks.model.moe import layers_with_experts
from lmworks.parallel import crossing
from lmworks.parallel.shard import Cut
from lmworks.parallel.wire import Wire


def cuts_for(model: Backbone, wire: Wire) -> dict[str, Cut]:
    """Which experts of each layer are here, by parameter name."""
    ranks, place = wire.size("ep"), wire.place("ep")
    if ranks == 1:
        return {}
    found = {}
    for name, parameter in model.named_parameters():
        if ".ffn.experts." in name:
            whole = parameter.shape[0]
            length = whole // ranks
            found[name] = Cut(dim=0, whole=whole, offset=place * length, length=length, axis="ep")
    return found


def connect(model: Backbone, wire: Wire) -> None:
    """Give the layers the exchanges of this layout: tokens over ep, counts of a row's tokens over cp."""
    for layer in layers_with_experts(model):
        if wire.size("ep") > 1:
            layer.exchange = Dispatch(wire)
        if wire.size("cp") > 1:
            layer.over_row = lambda counts_BE: wire.sum(counts_BE, "cp")


class Dispatch:
    """The exchange of a layer whose experts are divided."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    def __call__(self, x_MD: Tensor, counts_E: Tensor, experts: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """(M, D) rows sorted by expert -> (M, D) in the same order, each through its expert."""
        ranks = self.wire.size("ep")
        each = counts_E.shape[0] // ranks
        counts_Re = self.wire.exchange(counts_E, [each] * ranks, [each] * ranks, "ep").view(ranks, each)
        sent, received = counts_E.view(ranks, each).sum(1).tolist(), counts_Re.sum(1).tolist()
        come_XD = crossing.exchange(x_MD, sent, received, self.wire, "ep")
        expert_X = torch.arange(each, device=x_MD.device).repeat(ranks).repeat_interleave(counts_Re.flatten())
        order_X = expert_X.argsort(stable=True)  # they came sorted by rank first
        done_XD = experts(come_XD[order_X], counts_Re.sum(0))
        return crossing.exchange(done_XD[order_X.argsort()], received, sent, self.wire, "ep")
