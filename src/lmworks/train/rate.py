"""What the hardware can do: the rate that a model FLOPs utilisation (MFU) is measured against."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import psutil
import torch

DATASHEET = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
"""Dense bf16 FLOP/s by name of the GPU, from the makers' datasheets (without sparsity)."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s of this device in this dtype, and where the number is from.

    A GPU in the table uses its datasheet; everything else is measured: the best of a few square products.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, flops in DATASHEET.items():
            if known in name:
                return flops, f"datasheet, {known} dense bf16"
    size = 1024 if device.type == "cpu" else 8192
    return _measured(size, device, dtype), f"measured, {size} x {size} x {size} product"


def _measured(size: int, device: torch.device, dtype: torch.dtype) -> float:
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(6):  # the first one also pays for start-up
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def memory_bytes(device: torch.device) -> int:
    """Memory in use now: allocated on a GPU, resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory the process has had so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bf16 products have hardware of their own here."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    flags = Path("/proc/cpuinfo")
    return flags.exists() and any(word in flags.read_text() for word in ("avx512_bf16", "amx_bf16"))
