"""What a run uses of its machine, as far as making it cost the climate: whole machines, or a process's share of one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch

from lmworks.core.energy import embodied
from lmworks.core.energy.devices import this_cpu
from lmworks.core.energy.embodied import Piece
from lmworks.core.energy.footprint import Range
from lmworks.train.sensors import boards, process_busy, share_of_time


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Parts of a machine that a run has to itself, and parts that it shares."""

    own: Sequence[Piece]
    """For as long as it runs."""
    shared: Sequence[Piece] = ()
    """By the share of the processors' time that its process takes."""
    share: Callable[[float], float] = lambda seconds: 0.0
    """That share, over the last so many seconds."""

    def made(self, seconds: float) -> Range:
        """Kg of CO2e of making it, as falls on the last so many seconds of its life."""
        whole = embodied.kg_of(self.own).plus(embodied.kg_of(self.shared).times(self.share(seconds)))
        return embodied.share_of_life(whole, seconds / 3600)

    def told(self, share: Range) -> dict[str, Any]:
        """Facts for a record. `share`: what fell on the run, all its machines and attempts together."""
        return embodied.told([*self.own, *self.shared], share)


def hardware_of(device: torch.device, counts: Literal["machine", "process"]) -> Hardware:
    """This machine with the GPUs that the meter answers for, or a process's share of it and its own GPU."""
    _, sockets, threads = this_cpu()
    gibibytes = psutil.virtual_memory().total / 2**30
    host = embodied.host(gibibytes=gibibytes, sockets=sockets, threads=threads)
    names = [torch.cuda.get_device_name(i) for i in boards(device, counts)] if device.type == "cuda" else []
    gpus = [embodied.gpu(name) for name in names]
    if counts == "machine":
        return Hardware(own=[*host, *gpus])
    return Hardware(own=gpus, shared=host, share=share_of_time(process_busy, os.cpu_count() or 1))
