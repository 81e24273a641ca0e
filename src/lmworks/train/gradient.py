"""What happens to gradients between the backward pass and the update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from lmworks.core.recipe import PositiveFloat
from lmworks.parallel.shard import local
from lmworks.train.slots import Gradient


@final
@dataclass(frozen=True, kw_only=True)
class Clip(Gradient):
    """Scale all gradients so that their global norm is at most `norm`."""

    norm: PositiveFloat = 1.0
    """The largest global L2 norm."""

    def finish(self, parameters: Sequence[nn.Parameter], norm: Tensor) -> dict[str, Tensor]:
        """Multiply by norm / max(norm, global norm); reports the factor."""
        factor = (self.norm / norm).clamp(max=1.0)
        if factor.device.type != "cpu" or factor < 1.0:  # on a CPU looking is free, and most steps need no pass
            torch._foreach_mul_([local(p.grad) for p in parameters if p.grad is not None], factor)
        return {"clip_factor": factor}
