"""Loss on held-out documents: per token, and per byte so that tokenizers can be compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from lmworks.data.load import Batch
from lmworks.model.head import IGNORE
from lmworks.parallel.apply import Placement


@torch.no_grad()
def validate(placement: Placement, batches: Iterable[Batch], sources: Sequence[str] = ()) -> dict[str, float]:
    """val_loss (nats per target token) and val_bits_per_byte over the batches; every target counts once.

    Each rank is given its share of every batch, all of one shape. With more than one name in `sources`: val_loss/NAME
    over the targets of each source as well, and val_loss/mean, the mean of these over the sources.
    """
    device, several = placement.device, len(sources) > 1
    losses = torch.zeros(1 + several * len(sources), dtype=torch.float64, device=device)  # of all, then of each source
    counts = torch.zeros(2 + several * len(sources), dtype=torch.float64, device=device)  # bytes first
    was_training = [chunk.training for chunk in placement.chunks]
    for chunk in placement.chunks:
        chunk.eval()
    for host in batches:
        batch = host.to(device)
        valid_N, sources_N = (batch.targets_BT != IGNORE).flatten().double(), batch.sources_BT.flatten()
        counts[0] += batch.n_bytes
        counts[1] += valid_N.sum()
        if several:
            counts[2:].index_add_(0, sources_N, valid_N)
        own = placement.own(batch)
        hidden_BTD, model = placement.hidden(own), placement.with_head
        if hidden_BTD is None or model is None:
            continue
        losses_N = model.cross_entropy_each(hidden_BTD, own.targets_BT).flatten().double()
        losses[0] += losses_N.sum()
        if several:
            losses[1:].index_add_(0, own.sources_BT.flatten(), losses_N)
    for chunk, training in zip(placement.chunks, was_training, strict=True):
        chunk.train(training)
    total, *apart = placement.total_of_tokens(losses).tolist()
    size, tokens, *targets = placement.total_of_rows(counts).tolist()
    if tokens == 0:
        return {}
    found = {"val_loss": total / tokens, "val_tokens": tokens}
    if size:
        found["val_bits_per_byte"] = total / math.log(2) / size
    if several:
        each = {f"val_loss/{name}": a / n for name, a, n in zip(sources, apart, targets, strict=True) if n > 0}
        found |= each | {"val_loss/mean": sum(each.values()) / len(each)}
    return found
