"""A thread's own way between the memory of a device and the memory that files are written from.

A lane has a buffer that starts at a page, as files that go past the page cache want it, and is pinned beside a GPU; and
on a GPU a stream of its own. A copy waits for the moment at which its memory is ready, in that stream: the stream that
computes never waits for it. The thread does wait, so whoever hears that a copy is over may use it from any stream, and
memory goes back to torch's allocator after its last use: no `record_stream` is needed.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

PAGE = 4096
CHUNK = 8 << 20
"""Bytes of a buffer: a multiple of PAGE, and enough for a disk to run at its full rate."""


class Lane(threading.local):
    """Every thread that looks at it sees its own."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @property
    def buffer(self) -> Tensor:
        """(CHUNK) bytes of host memory that start at a page, made when they are first asked for."""
        if self._buffer is None:
            bare = torch.empty(CHUNK + PAGE, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
            start = -bare.data_ptr() % PAGE
            self._buffer = bare[start : start + CHUNK]
        return self._buffer

    def copy(self, source: Tensor, out: Tensor, ready: Any) -> None:
        """Copy flat bytes; they have arrived when this returns. `ready`: a moment of `moment`."""
        device = next((x.device for x in (source, out) if x.device.type == "cuda"), None)
        if device is None:  # NumPy's copy starts no threads beside those that compute, and lets others run
            np.copyto(out.numpy(), source.numpy())
            return
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        with torch.cuda.stream(stream):
            if ready is not None:
                stream.wait_event(ready)
            out.copy_(source, non_blocking=True)
            stream.synchronize()


def on(device: torch.device) -> AbstractContextManager[object]:
    """In a thread: what is made without a device is made for this one. Else pinned memory would belong to GPU 0."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def moment(device: torch.device) -> Any:
    """This moment in the work of the stream that computes; None on a CPU, where work is over when it is asked for."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
