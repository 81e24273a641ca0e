"""Loss on held-out documents: per token, and per byte so that tokenizers can be compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from lmworks.data.load import Batch
from lmworks.model.backbone import Backbone
from lmworks.model.head import IGNORE, cross_entropy_each


@torch.no_grad()
def validate(
    model: Backbone, batches: Iterable[Batch], device: torch.device, sources: Sequence[str] = ()
) -> dict[str, float]:
    """val_loss (nats per target token) and val_bits_per_byte over the batches; every target counts once.

    With more than one name in `sources`: val_loss/NAME over the targets of each source as well, and val_loss/mean, the
    mean of these over the sources.
    """
    total, tokens, size = 0.0, 0, 0
    apart = torch.zeros(2, max(1, len(sources)), dtype=torch.float64, device=device)  # loss, targets
    was_training = model.training
    model.eval()
    for host in batches:
        batch = host.to(device)
        hidden_BTD = model(batch.tokens_BT, positions_BT=batch.positions_BT, documents_BT=batch.documents_BT)
        losses_N = cross_entropy_each(hidden_BTD.flatten(0, 1), model.head_weight(), batch.targets_BT.flatten())
        valid_N = batch.targets_BT.flatten() != IGNORE
        total += float(losses_N.double().sum())
        tokens += int(valid_N.sum())
        if len(sources) > 1:
            both = torch.stack([losses_N.double(), valid_N.double()])
            apart.index_add_(1, batch.sources_BT.flatten(), both)
        size += batch.n_bytes
    model.train(was_training)
    if tokens == 0:
        return {}
    found = {"val_loss": total / tokens, "val_tokens": float(tokens)}
    if size:
        found["val_bits_per_byte"] = total / math.log(2) / size
    if len(sources) > 1:
        each = {f"val_loss/{name}": float(a / n) for name, a, n in zip(sources, *apart, strict=True) if n > 0}
        found |= each | {"val_loss/mean": sum(each.values()) / len(each)}
    return found
