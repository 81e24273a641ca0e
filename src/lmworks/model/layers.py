"""The layers every family is made of. Parameters are float32 masters; activations carry the compute precision.

A layer has no value until `initialise` or a checkpoint gives it one: parameters are made as NaN, so that a weight that
was forgotten shows in the first loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lmworks.model import ops

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(..., in), (out, in), (out) or None -> (..., out), in the precision of the first."""


def empty(*shape: int) -> nn.Parameter:
    """A parameter that waits for its value."""
    return nn.Parameter(torch.full(shape, torch.nan))


class Linear(nn.Linear):
    """y = x W^T + b, in the precision of x: the float32 master weight is cast here, in sight."""

    product: Product = staticmethod(ops.linear)
    """How it is computed where a gradient is wanted; `float8.py` puts another one here. Without one: `ops.linear`."""

    def reset_parameters(self) -> None:
        """Leave the values to `initialise`."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(torch.nan)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the precision of `input`."""
        return self.product(input, self.weight, self.bias)


def is_plain(module: nn.Module) -> bool:
    """Whether calling a module is no more than its formula: an unchanged Linear that nobody listens to.

    An adapter or another product in its place, or a hook, must be called; then layers that could be computed together
    are not.
    """
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return type(module) is Linear and module.product is ops.linear and not any(hooks)


class Embedding(nn.Module):
    """A table of rows, looked up and cast to the compute precision."""

    def __init__(self, rows: int, width: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = empty(rows, width)
        self.dtype = dtype

    def forward(self, index: Tensor) -> Tensor:
        """(...) ids -> (..., width) in the compute precision."""
        return nn.functional.embedding(index, self.weight).to(self.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim. Statistics and product in float32, result in the precision of x."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = empty(width)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return ops.rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias over the last dim. Statistics in float32, result in the precision of x."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = empty(width)
        self.bias = empty(width)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, width: int, ffn_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, ffn_size, bias=False)
        self.up_proj = Linear(width, ffn_size, bias=False)
        self.down_proj = Linear(ffn_size, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        result: Tensor = self.down_proj(ops.swiglu(self.gate_proj(x_BTD), self.up_proj(x_BTD)))
        return result


class PlainFFN(nn.Module):
    """down(gelu(up(x))) with biases: the feed-forward layer of GPT-2 (tanh) and GPT-NeoX (exact)."""

    def __init__(self, width: int, ffn_size: int, *, approximate: str) -> None:
        super().__init__()
        self.up_proj = Linear(width, ffn_size)
        self.down_proj = Linear(ffn_size, width)
        self.approximate = approximate

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        hidden_BTF: Tensor = self.up_proj(x_BTD)
        result: Tensor = self.down_proj(nn.functional.gelu(hidden_BTF, approximate=self.approximate))
        return result
