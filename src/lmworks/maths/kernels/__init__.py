"""Kernels for GPUs in Triton, one file for each family; every one has an equal in plain PyTorch.

    norm            RMSNorm
    rotary          rotary embedding
    gated           silu(gate) * up
    cross_entropy   losses of rows of logits, and their gradient in place
    quantise        eight-bit codes by group and by tensor, transposed copies
    norm8, gated8   RMSNorm and SwiGLU that read and write eight-bit codes
    expansion       codes of optimizer moments, stretched by group
    blocks          whole-number codes by blocks, which travel between ranks
    codes, grid     what kernels share: eight-bit numbers by their bits; rows and tiles

A family is imported, and Triton with it, when it is first asked for: `from lmworks.maths import kernels` costs nothing.
Kernels run compiled on CUDA tensors. Where TRITON_INTERPRET=1 was set before Triton was imported, they run on CPU
tensors in Triton's interpreter, program by program: that is how they are tested without a GPU.

`work_on` tells whether the kernels can be had on a device; `model.ops` and the modules of `maths` with an equal decide.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import subprocess
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lmworks.maths.kernels import blocks, cross_entropy, expansion, gated, gated8, norm, norm8, quantise, rotary

FAMILIES = ("blocks", "cross_entropy", "expansion", "gated", "gated8", "norm", "norm8", "quantise", "rotary")
DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
"""What the kernels that are not about eight bits take; they compute in float32."""
MOST_COLUMNS = 16384
"""The widest row that RMSNorm's kernels take, and the widest block of `blocks`: a program holds a whole one."""

__all__ = [
    "DTYPES",
    "MOST_COLUMNS",
    "blocks",
    "builds",
    "cross_entropy",
    "expansion",
    "gated",
    "gated8",
    "norm",
    "norm8",
    "quantise",
    "rotary",
    "take",
    "there",
    "work_on",
]


def __getattr__(name: str) -> Any:
    """A family, imported when it is first asked for."""
    if name in FAMILIES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def there() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def work_on(device: torch.device) -> bool:
    """Whether the kernels run compiled on this device; the first call compiles one of them to see.

    Triton builds its launcher with the machine's C compiler: where that fails, one warning says why. bfloat16 asks for
    compute capability 8.0.
    """
    if device.type != "cuda" or not there() or not torch.cuda.is_available():
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return builds(device)


def builds(device: torch.device) -> bool:
    """Whether a kernel of this process is compiled for the device, and right; warns where Triton cannot build it."""
    try:
        names = (f"{__name__}.grid", f"{__name__}.norm", "triton.errors")
        grid, norm, errors = (importlib.import_module(name) for name in names)
        x = torch.ones(1, 16, device=device)
        try:
            y = norm.rms_norm(x, x[0], 1e-6)
        except errors.TritonError as error:
            raise RuntimeError(str(error)) from error
        return not grid.INTERPRETED and bool((y - 1).abs().max() < 1e-5)
    except (RuntimeError, OSError, ImportError, subprocess.CalledProcessError) as error:
        text = f"Triton cannot build kernels for {device}, so the plain forms run: {error}"
        warnings.warn(text, stacklevel=3)
        return False


def take(x: Tensor) -> bool:
    """Whether to run kernels on x: in eager mode, on a device they work on. A compiler fuses plain forms itself."""
    return not torch.compiler.is_compiling() and work_on(x.device)
