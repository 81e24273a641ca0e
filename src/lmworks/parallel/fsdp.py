"""FSDP2 over one stage of a model, with collectives that keep the bill."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lmworks.model.backbone import Backbone
from lmworks.parallel.billing import billed_all_reduce
from lmworks.parallel.layout import Layout
from lmworks.parallel.quantised import Route
from lmworks.parallel.travel import chosen
from lmworks.parallel.wire import Wire


def shard(
    chunk: Backbone,
    wire: Wire,
    device: torch.device,
    dtype: torch.dtype,
    apart: Collection[str],
    fed_back: list[Route],
) -> None:
    """FSDP2 over each block and over the rest, all but the parameters `apart` and those that are not trained.

    Losses are sums of shares, so gradients are summed, not averaged. `fed_back`: as in `travel.chosen`.
    """
    layout, travel = wire.layout, chosen(wire, fed_back)
    over = _mesh(layout, device)
    alone = {p for name, p in chunk.named_parameters() if name in apart or not p.requires_grad}
    reshard: bool | int = layout.reshard if layout.reshard is not None else layout.pp == 1
    if layout.state is not None and layout.state.secondary is not None and layout.state.secondary_as == "plain":
        reshard = layout.state.secondary  # each forward pass leaves its parts among so many neighbours
    gathered = dtype if dtype.itemsize < 4 else None  # weights travel in the precision they are used in
    precision = MixedPrecisionPolicy(
        param_dtype=gathered, reduce_dtype=torch.float32 if gathered is not None else None, cast_forward_inputs=False
    )
    for block in chunk.blocks.values():
        fully_shard(block, mesh=over, mp_policy=precision, reshard_after_forward=reshard, ignored_params=alone)
    fully_shard(chunk, mesh=over, mp_policy=precision, reshard_after_forward=False, ignored_params=alone)
    back = set() if reshard is False else set(chunk.blocks.values())  # what the backward pass gathers again
    for module in chunk.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            module.set_custom_all_gather(travel.gather(module, module in back))
            module.set_custom_reduce_scatter(travel.scatter(module))
            if layout.dp_replicate > 1:
                module.set_all_reduce_hook(billed_all_reduce(wire))


def _mesh(layout: Layout, device: torch.device) -> DeviceMesh:
    """The ranks that share this rank's weights; with dp_replicate, those of every replica as well."""
    if layout.state is not None:
        shared = layout.size("weights")
        sizes = (layout.pp, layout.size("fsdp") // shared, shared, layout.tp)
        return init_device_mesh(device.type, sizes, mesh_dim_names=("pp", "others", "weights", "tp"))["weights"]
    sizes = (layout.pp, layout.dp_replicate, layout.size("fsdp"), layout.tp)
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"))
    return mesh["dp_replicate", "fsdp"] if layout.dp_replicate > 1 else mesh["fsdp"]
