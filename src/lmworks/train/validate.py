"""Loss on held-out documents: per token, and per byte so that tokenizers can be compared."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from lmworks.data.load import Batch
from lmworks.model.backbone import Backbone
from lmworks.model.head import IGNORE, cross_entropy_each


@torch.no_grad()
def validate(model: Backbone, batches: Iterable[Batch], device: torch.device) -> dict[str, float]:
    """val_loss (nats per target token) and val_bits_per_byte over the batches; every target counts once."""
    total, tokens, size = 0.0, 0, 0
    was_training = model.training
    model.eval()
    for host in batches:
        batch = host.to(device)
        hidden_BTD = model(batch.tokens_BT, positions_BT=batch.positions_BT, documents_BT=batch.documents_BT)
        losses_N = cross_entropy_each(hidden_BTD.flatten(0, 1), model.head_weight(), batch.targets_BT.flatten())
        total += float(losses_N.double().sum())
        tokens += int((batch.targets_BT != IGNORE).sum())
        size += batch.n_bytes
    model.train(was_training)
    if tokens == 0:
        return {}
    found = {"val_loss": total / tokens, "val_tokens": float(tokens)}
    if size:
        found["val_bits_per_byte"] = total / math.log(2) / size
    return found
