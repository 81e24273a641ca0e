"""First values, by parameter name: every layout, stage or shard of a model starts from the same weights.

| parameter                          | first value                                                        |
|------------------------------------|--------------------------------------------------------------------|
| tables: embed, positions, head     | normal, std 0.02                                                   |
| matrices of a block                | normal, std 1 / sqrt(fan_in)                                       |
| experts, one matrix each           | as above; each expert has draws of its own                         |
| those that write the residual      | as above, divided by sqrt(2 L): o_proj, down_proj                  |
| norm weights                       | 1                                                                  |
| biases, those of routers too       | 0                                                                  |
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmworks.core.seeds import seed_for
from lmworks.model.backbone import Backbone

TABLE_STD = 0.02
"""Standard deviation of the token table, the position table and the head."""
RESIDUAL_WRITERS = ("o_proj", "down_proj")
"""Matrices whose output is added to the residual stream."""


def initialise(model: Backbone, seed: int) -> None:
    """Give every parameter its first value, drawn from hash(seed, parameter name).

    The draw is made in float32 on the CPU, so it is the same on every device and for every stage of a cut model.
    A model built on meta is materialised first: `model.to_empty(device=...)`.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(first_value(name, tuple(parameter.shape), model.config.n_layers, seed))


def first_value(name: str, shape: tuple[int, ...], n_layers: int, seed: int) -> Tensor:
    """The first value of one parameter, float32 on the CPU; see the module's table."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    if len(shape) == 3:
        return torch.stack([first_expert(name, shape[1:], n_layers, seed, expert) for expert in range(shape[0])])
    generator = torch.Generator().manual_seed(seed_for(seed, name))
    return torch.randn(shape, generator=generator).mul_(standard_deviation(name, shape, n_layers))


def first_expert(name: str, shape: tuple[int, ...], n_layers: int, seed: int, expert: int) -> Tensor:
    """The first value of one expert's matrix: the same for whoever holds it, and with whichever others."""
    generator = torch.Generator().manual_seed(seed_for(seed, name, expert))
    return torch.randn(shape, generator=generator).mul_(standard_deviation(name, shape, n_layers))


def standard_deviation(name: str, shape: tuple[int, ...], n_layers: int) -> float:
    """Of the first values of one matrix or table; fan_in is the last dim."""
    if not name.startswith("blocks."):
        return TABLE_STD
    std = 1.0 / math.sqrt(shape[-1])
    return std / math.sqrt(2 * n_layers) if name.removesuffix(".weight").endswith(RESIDUAL_WRITERS) else std
