"""What each block keeps for its backward pass."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import final

from torch.utils.checkpoint import checkpoint

from lmworks.core.recipe import PositiveInt
from lmworks.model.backbone import Backbone
from lmworks.train.slots import Saved


@final
@dataclass(frozen=True, kw_only=True)
class Keep(Saved):
    """Keep every tensor that autograd saves: fastest, most memory."""

    def apply(self, model: Backbone) -> None:
        """Nothing to arrange."""


@final
@dataclass(frozen=True, kw_only=True)
class Recompute(Saved):
    """Keep a block's input and run the block again in the backward pass: about a third more work, far less memory."""

    every: PositiveInt = 1
    """Recompute blocks 0, every, 2 * every, ...; the others keep their tensors."""

    def apply(self, model: Backbone) -> None:
        """Wrap the chosen blocks' forward. Names of parameters stay as they are."""
        for name, block in model.get_submodule("blocks").named_children():
            if int(name) % self.every == 0:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
