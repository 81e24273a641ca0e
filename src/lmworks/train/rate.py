"""What the hardware can do: the rate that a model FLOPs utilisation (MFU) is measured against."""

from __future__ import annotations

import platform
import resource
import time

import psutil
import torch

DATASHEET = {
    "H200 NVL": 835e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
"""Dense bf16 FLOP/s by part of the GPU's name, from the makers' datasheets (without sparsity); the first match counts,
so slower boards of a chip stand before the chip."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s of this device in this dtype, and where the number is from.

    A GPU in the table uses its datasheet; everything else is measured: the best of a few square products.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        known = datasheet_name(torch.cuda.get_device_name(device))
        if known is not None:
            return DATASHEET[known], f"datasheet, {known} dense bf16"
    size = 1024 if device.type == "cpu" else 8192
    return _measured(size, device, dtype), f"measured, {size} x {size} x {size} product"


def datasheet_name(device_name: str) -> str | None:
    """The entry of DATASHEET for a GPU that calls itself `device_name`; None when it is not there."""
    return next((known for known in DATASHEET if known in device_name), None)


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


def most_bytes(device: torch.device) -> int:
    """The most memory in use since training began, with what the C library keeps (`memory.py`): no less than now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return memory_bytes(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory the process has had so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if platform.system() == "Darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
