"""Products in eight-bit floats: every linear layer of the blocks, forward and both of its gradients.

Inputs and weights are rounded to E4M3. `tensorwise` takes one scale for a tensor and rounds gradients to E5M2;
`rowwise` takes one scale, a power of two, for each row of either factor, and rounds gradients to E4M3. Scales are those
of the values at hand (dynamic). What is computed comes out in the precision of the input.

Only what trains is computed so. Without a gradient (validation, samples) and in `ops.plain_forms` a layer has its plain
product, so that a loss on held-out documents is that of the weights which are exported. The embedding, the head, norms,
attention, routers and experts are no `Linear` of a block, and stay as they are.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lmworks.core.need import need
from lmworks.maths.float8 import E4M3
from lmworks.model import ops
from lmworks.model.backbone import Backbone
from lmworks.model.layers import Linear, Product

MULTIPLE = 16
"""Rows, columns and tokens of a product on the matrix units come in sixteens."""
Scales = Literal["tensorwise", "rowwise"]


def use_float8(model: Backbone, scales: Scales) -> list[str]:
    """Float8 products in the blocks' linear layers; the names of those whose sizes do not fit, which stay as they are.

    To be called when matrices have the sizes of this rank, before blocks are compiled. Raises MissingExtra.
    """
    product, left = float8_product(scales), []
    for name, module in model.get_submodule("blocks").named_modules(prefix="blocks"):
        if isinstance(module, Linear):
            if fits(module.weight):
                module.product = product
            else:
                left.append(name)
    return left


def fits(weight_OI: Tensor) -> bool:
    """Whether both sizes of a matrix are multiples of 16."""
    return not any(size % MULTIPLE for size in weight_OI.shape)


def float8_product(scales: Scales) -> Product:
    """(x, weight, bias) -> x W^T + b with a gradient in float8, by torchao. Raises MissingExtra."""
    with _without_log():
        library = need("torchao.float8", extra="gpu", why="a product in float8")
        on_gpu, on_cpu = (_layer(library, scales, emulate=emulate) for emulate in (False, not _cpu_takes(scales)))

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        tokens = x.shape[:-1].numel()
        if not _trains() or tokens % MULTIPLE:
            return ops.linear(x, weight, bias)
        layer = on_cpu if x.device.type == "cpu" else on_gpu
        out: Tensor = torch.func.functional_call(layer, {"weight": weight}, (x,))
        return out if bias is None else out + bias.to(out.dtype)

    return product


def _layer(library: Any, scales: Scales, *, emulate: bool) -> nn.Module:
    """torchao's linear layer without values of its own. `emulate`: codes are multiplied in float32."""
    config = dataclasses.replace(library.Float8LinearConfig.from_recipe_name(scales), emulate=emulate)
    with torch.device("meta"):
        bare = nn.Linear(MULTIPLE, MULTIPLE, bias=False)
    layer: nn.Module = library.convert_to_float8_training(bare, config=config)
    return layer


def _cpu_takes(scales: Scales) -> bool:
    """Whether this torch multiplies codes with such scales on a CPU; 2.11 has no product for a scale a row."""
    codes = torch.zeros(MULTIPLE, MULTIPLE, dtype=E4M3.dtype)
    one = torch.ones(()) if scales == "tensorwise" else torch.ones(MULTIPLE, 1)
    try:
        torch._scaled_mm(codes, codes.t(), scale_a=one, scale_b=one.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


def _trains() -> bool:
    """Whether a gradient is wanted, and only once."""
    return torch.is_grad_enabled() and (torch.compiler.is_compiling() or ops.own_forms())


@contextmanager
def _without_log() -> Iterator[None]:
    """No warnings of kernels that torchao could not load while it is imported: float8 training uses none of them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
