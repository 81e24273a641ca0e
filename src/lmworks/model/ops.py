"""The arithmetic under the layers: one function per formula, exact against `tests/oracles`.

Each formula stands once in plain PyTorch. In eager mode on a CPU, where a pass over memory costs as much as arithmetic,
RMSNorm and float32 products have a second form with a hand-written gradient (benchmarks/log.md). In eager mode on a GPU
RMSNorm, rotation, SwiGLU and the loss (`model.head`) are Triton kernels where Triton is installed (`maths.kernels`).
`torch.compile`, which fuses the plain forms itself, and `plain_forms` get the plain form.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmworks.maths import kernels

ONEDNN: bool = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")  # type: ignore[no-untyped-call]
"""Whether oneDNN's float32 products can be asked for by name."""
_plain: ContextVar[bool] = ContextVar("plain_forms", default=False)


@contextmanager
def plain_forms() -> Iterator[None]:
    """Use the plain forms everywhere: for second derivatives and for `torch.func` transforms.

    The hand-written gradients cannot be differentiated again, and say so.
    """
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def plain_forms_asked() -> bool:
    """Whether somebody asked for `plain_forms`."""
    return _plain.get()


def first_order_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A hand-written gradient that refuses to be differentiated again, instead of leaving terms out in silence."""

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "this gradient cannot be differentiated again: run the forward pass in ops.plain_forms()"
            )
        return backward(ctx, *grads)

    return checked


def on_cpu(x: Tensor) -> bool:
    """Whether the forms for CPUs apply to x."""
    return x.device.type == "cpu" and own_forms()


def on_gpu(x: Tensor) -> bool:
    """Whether the kernels for GPUs apply to x."""
    return x.is_cuda and own_forms() and x.dtype in kernels.DTYPES and kernels.work_on(x.device)


def own_forms() -> bool:
    """Eager mode, and nobody asked for `plain_forms`."""
    return not torch.compiler.is_compiling() and not _plain.get()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., in) x (out, in) -> (..., out), computed in the precision of x.

    Without gradients (evaluation, export, generation) MKL's product is taken: its sums are closer to those of float64
    than oneDNN's, and so the logits to those of other libraries.
    """
    if weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
        bias = bias.to(x.dtype) if bias is not None else None
    if ONEDNN and x.dtype == torch.float32 and on_cpu(x) and torch.is_grad_enabled():
        flat: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)  # type: ignore[no-untyped-call]
        return flat.view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T for two matrices on a CPU, without a graph.

    In float32 oneDNN is asked by name: `x @ weight.t()` goes to MKL, which is slower here (benchmarks/log.md).
    """
    if ONEDNN and x.dtype == torch.float32:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return result
    return x @ weight.t()


class _Linear(torch.autograd.Function):
    """F.linear in float32, with oneDNN's products forward and for the gradient of x, MKL's for that of the weight."""

    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_MI, weight_OI)
        ctx.biased = bias_O is not None
        out_MO = product(x_MI, weight_OI)
        return out_MO if bias_O is None else out_MO.add_(bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_MI, weight_OI = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        return (
            product(grad_MO, weight_OI.t()) if needs_x else None,
            grad_MO.t() @ x_MI if needs_weight else None,
            grad_MO.sum(0) if ctx.biased else None,
        )


def _wide(x: Tensor) -> Tensor:
    """x in at least float32 (float64 stays as it is, for exact tests)."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim."""
    if on_gpu(x) and x.shape[-1] <= kernels.MOST_COLUMNS:
        return kernels.norm.rms_norm(x, weight, eps)
    if on_cpu(x):
        result: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return result
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number per row.

    The gradient is LayerNorm's with the mean set to 0, plus the term that LayerNorm's mean takes away: so PyTorch's
    fused LayerNorm kernel does nearly all of it in one pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        width = x.shape[-1]
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=kind)
        scale = norm.square_().div_(width).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normed: Tensor = (x * scale).mul_(weight)
        return normed.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        grad = grad.contiguous()
        x = x.contiguous()
        wide = weight.to(scale.dtype)  # FSDP gathers weights in bf16; the kernel takes them as wide as the scale
        dx, d_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, (x.shape[-1],), torch.zeros_like(scale), scale, wide, wide, [True, True, False]
        )
        mean = torch.mv(grad.view(-1, x.shape[-1]), weight.to(grad.dtype)).view(scale.shape)
        return dx.add_(mean.mul(scale).div_(x.shape[-1])), d_weight.to(weight.dtype), None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dim."""
    return F.layer_norm(_wide(x), (x.shape[-1],), weight, bias, eps).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    if on_gpu(gate):
        return kernels.gated.swiglu(gate, up)
    return F.silu(gate) * up


def rotate(x_BTNh: Tensor, cos_BTr: Tensor, sin_BTr: Tensor) -> Tensor:
    """Rotary embedding: turns each pair (i, i + r/2) of the first r values of a head by its angle.

    cos, sin: (B or 1, T, r) float32 as `Rotary.tables` gives them, each angle twice and the first sine negated, so that
    the turn is x cos + (x with its halves swapped) sin. Values beyond r pass through (partial rotary of GPT-NeoX).
    """
    if on_gpu(x_BTNh):
        return kernels.rotary.rotate(x_BTNh, cos_BTr, sin_BTr)
    cos, sin = cos_BTr[:, :, None], sin_BTr[:, :, None]
    width = cos.shape[-1]
    turned, rest = (x_BTNh, None) if width == x_BTNh.shape[-1] else (x_BTNh[..., :width], x_BTNh[..., width:])
    wide = _wide(turned)
    out = torch.addcmul(wide * cos, wide.roll(width // 2, -1), sin).to(x_BTNh.dtype)
    return out if rest is None else torch.cat((out, rest), -1)


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bf16 products have hardware of their own here."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    flags = Path("/proc/cpuinfo")
    return flags.exists() and any(word in flags.read_text() for word in ("avx512_bf16", "amx_bf16"))
