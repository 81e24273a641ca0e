"""What is minimised. Components are summed here; the step divides each by its global count."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from lmworks.data.load import Batch
from lmworks.model.backbone import Backbone
from lmworks.model.head import IGNORE
from lmworks.train.slots import Component, Objective


@final
@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Objective):
    """Next-token cross-entropy over every target that is not IGNORE."""

    predicts: ClassVar[bool] = True
    """Targets can be drawn from the model's softmax."""

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Valid targets, each times its row's weight."""
        valid_BT = batch.targets_BT != IGNORE
        if batch.weights_B is None:
            return {"cross_entropy": valid_BT.sum()}
        return {"cross_entropy": (valid_BT.sum(1) * batch.weights_B).sum()}

    def loss(self, model: Backbone, batch: Batch, hidden_BTD: Tensor | None = None) -> dict[str, Component]:
        """The sum of -log p(target), in nats, each times its row's weight."""
        hidden_BTD = hidden_states(model, batch) if hidden_BTD is None else hidden_BTD
        total = model.cross_entropy_sum(hidden_BTD, batch.targets_BT, batch.weights_B)
        return {"cross_entropy": Component(total=total)}

    @torch.no_grad()
    def each(self, model: Backbone, batch: Batch, hidden_BTD: Tensor | None = None) -> Tensor:
        """Mean of -log p(target) over each row's valid targets (B), float32; nan for a row without any."""
        hidden_BTD = hidden_states(model, batch) if hidden_BTD is None else hidden_BTD
        losses_BT = model.cross_entropy_each(hidden_BTD, batch.targets_BT)
        return losses_BT.sum(1) / (batch.targets_BT != IGNORE).sum(1)

    @torch.no_grad()
    def sampled(self, model: Backbone, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with every valid target drawn from softmax(logits); ignored targets stay ignored."""
        hidden_BTD = hidden_states(model, batch)
        drawn_BT = model.sampled_targets(hidden_BTD, generator)
        targets_BT = torch.where(batch.targets_BT == IGNORE, IGNORE, drawn_BT)
        return dataclasses.replace(batch, targets_BT=targets_BT)


def hidden_states(model: Backbone, batch: Batch) -> Tensor:
    """The model's hidden states of a batch (B, T, D)."""
    result: Tensor = model(batch.tokens_BT, positions_BT=batch.positions_BT, documents_BT=batch.documents_BT)
    return result
