"""The whole model on the first rank: for what needs all of it at once, such as writing samples."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from lmworks.model.backbone import Backbone
from lmworks.model.pieces import Box
from lmworks.parallel.apply import Placement
from lmworks.parallel.shard import local


def gather(placement: Placement) -> Backbone | None:
    """The model with all its values, on the CPU of the first rank; None on the others. All ranks call it together.

    A single rank gets the model it trains, not a copy. The tensors travel one by one, so the first rank needs room for
    one whole model and nothing more.
    """
    wire, chunk = placement.wire, placement.chunks[0]
    if wire.layout.ranks == 1:
        return chunk
    mine, where = placement.saved(placement.values())
    order = sorted(mine)
    lists: list[list[tuple[str, Box, torch.dtype]]] | None = [[]] * wire.layout.ranks if wire.rank == 0 else None
    group = wire.group("patient")
    dist.gather_object([(name, where[name], mine[name].dtype) for name in order], lists, group=group, group_dst=0)
    cpu = torch.device("cpu")
    if lists is None:
        for name in order:
            wire.send(local(mine[name]).detach().to(cpu), 0, "patient")
        return None
    shape: Any = chunk.config
    whole: Backbone = shape.build(dtype=chunk.dtype, device=cpu, param_dtype=next(placement.model.parameters()).dtype)
    values = whole.state_dict()
    with torch.no_grad():
        for rank, pieces in enumerate(lists):
            for name, box, dtype in pieces:
                part = mine[name] if rank == 0 else wire.receive(box.lengths, dtype, cpu, rank, "patient")
                values[name][box.index] = part
    whole.train(chunk.training)
    return whole
