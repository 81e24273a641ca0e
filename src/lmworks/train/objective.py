"""What is minimised. Components are summed here; the step divides each by its global count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from lmworks.data.load import Batch
from lmworks.model.backbone import Backbone
from lmworks.model.head import IGNORE, cross_entropy_sum
from lmworks.train.slots import Component, Objective


@final
@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Objective):
    """Next-token cross-entropy over every target that is not IGNORE."""

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Valid targets."""
        return {"cross_entropy": (batch.targets_BT != IGNORE).sum()}

    def loss(self, model: Backbone, batch: Batch) -> dict[str, Component]:
        """The sum of -log p(target), in nats."""
        hidden_BTD = model(batch.tokens_BT, positions_BT=batch.positions_BT, documents_BT=batch.documents_BT)
        total = cross_entropy_sum(hidden_BTD.flatten(0, 1), model.head_weight(), batch.targets_BT.flatten())
        return {"cross_entropy": Component(total=total)}
