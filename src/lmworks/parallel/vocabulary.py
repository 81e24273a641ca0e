"""The token table and the loss, with the vocabulary divided among the ranks of tp.

Shapes: N tokens, D hidden, V vocabulary, U this rank's part of it, C tokens in a chunk. A rank looks up the ids that it
holds and gives zeros for the others; the ranks' sum is the row. In the loss each rank makes the logits of its own part;
what it hears from the others is two numbers per token: their log-sum-exp, and the target's logit where they hold it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmworks.core.errors import UsageError
from lmworks.model import ops
from lmworks.model.head import IGNORE, Vocabulary, accumulate_dtype, add_product, chunk_rows, chunks
from lmworks.model.layers import Embedding
from lmworks.parallel import crossing
from lmworks.parallel.wire import Wire


class DividedEmbedding(Embedding):
    """Rows `start` .. of a token table; the others are looked up elsewhere."""

    def __init__(self, table: Embedding, start: int, wire: Wire, *, tokens_divided: bool) -> None:
        super(Embedding, self).__init__()
        self.weight = table.weight
        self.dtype = table.dtype
        self.start = start
        self.wire = wire
        self.tokens_divided = tokens_divided

    def forward(self, index: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, D) in the compute precision; (B, T / tp, D) where tokens are divided."""
        place = index - self.start
        held = (place >= 0) & (place < self.weight.shape[0])
        rows = torch.nn.functional.embedding(torch.where(held, place, 0), self.weight)
        rows = rows.masked_fill(~held[..., None], 0.0).to(self.dtype)
        if self.tokens_divided:
            return crossing.scatter_sum(rows, self.wire, "tp", 1)
        return crossing.sum_over(rows, self.wire, "tp")


class DividedVocabulary(Vocabulary):
    """The head's products over this rank's part of the vocabulary: `length` of `whole` ids, from `start` on."""

    def __init__(self, wire: Wire, start: int, length: int, whole: int) -> None:
        self.wire = wire
        self.start, self.length = start, length
        self.largest = -(-whole // wire.size("tp"))
        """Ids of the rank that holds most: all ranks make chunks of the same size."""

    def cross_entropy_sum(
        self, hidden_ND: Tensor, weight_UD: Tensor, targets_N: Tensor, *, shares_N: Tensor | None = None
    ) -> Tensor:
        """As `model.head.cross_entropy_sum`, the same value on every rank."""
        rows = chunk_rows(self.largest, hidden_ND.device.type)
        hidden_ND = crossing.copy(hidden_ND, self.wire, "tp")
        result: Tensor = _DividedSum.apply(hidden_ND, weight_UD, targets_N, shares_N, self, rows)  # type: ignore[no-untyped-call]
        return result

    @torch.no_grad()
    def cross_entropy_each(self, hidden_ND: Tensor, weight_UD: Tensor, targets_N: Tensor) -> Tensor:
        """As `model.head.cross_entropy_each`, the same values on every rank."""
        losses_N = torch.zeros(targets_N.shape, dtype=accumulate_dtype(hidden_ND), device=hidden_ND.device)
        for at in chunks(targets_N.shape[0], chunk_rows(self.largest, hidden_ND.device.type)):
            losses_N[at] = self.losses(hidden_ND[at], weight_UD.to(hidden_ND.dtype), targets_N[at])[0]
        return losses_N

    def sampled_targets(self, hidden_ND: Tensor, weight_UD: Tensor, generator: torch.Generator) -> Tensor:
        """Refused: a draw needs the whole distribution on one rank."""
        raise UsageError("targets cannot be drawn while tp divides the vocabulary", legal="tp = 1")

    def logits(self, hidden: Tensor, weight_UD: Tensor) -> Tensor:
        """Refused: no rank holds all logits."""
        raise UsageError("logits are not on one rank while tp divides the vocabulary", legal="tp = 1")

    def losses(self, hidden_CD: Tensor, weight_UD: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [C], and this rank's log-probabilities [C, U]."""
        logits_CU = ops.linear(hidden_CD, weight_UD, None).to(accumulate_dtype(hidden_CD))
        place_C, held_C = self.places(targets_C)
        picked_C = torch.where(held_C, logits_CU.gather(1, place_C[:, None])[:, 0], 0.0)
        heard_2RC = self.wire.gather(torch.stack([logits_CU.logsumexp(1), picked_C])[:, None], "tp", 1)
        norm_C = heard_2RC[0].logsumexp(0)
        losses_C = torch.where(targets_C != IGNORE, norm_C - heard_2RC[1].sum(0), 0.0)
        return losses_C, logits_CU.sub_(norm_C[:, None])

    def places(self, targets_C: Tensor) -> tuple[Tensor, Tensor]:
        """Where each target lies in this rank's part (0 where it does not), and whether it does."""
        place_C = targets_C - self.start
        held_C = (place_C >= 0) & (place_C < self.length) & (targets_C != IGNORE)
        return torch.where(held_C, place_C, 0), held_C


class _DividedSum(torch.autograd.Function):
    """Gradients are made in the forward pass and only scaled in the backward pass, as in `model.head`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_UD: Tensor,
        targets_N: Tensor,
        shares_N: Tensor | None,
        vocabulary: DividedVocabulary,
        rows: int,
    ) -> Tensor:
        dtype = hidden_ND.dtype
        weight = weight_UD.to(dtype)
        total = torch.zeros((), dtype=accumulate_dtype(hidden_ND), device=hidden_ND.device)
        grad_hidden, grad_weight = torch.empty_like(hidden_ND), torch.zeros_like(weight_UD)
        for at in chunks(targets_N.shape[0], rows):
            losses_C, log_probs_CU = vocabulary.losses(hidden_ND[at], weight, targets_N[at])
            total += losses_C.sum() if shares_N is None else (losses_C * shares_N[at]).sum()
            place_C, held_C = vocabulary.places(targets_N[at])
            grad_CU = log_probs_CU.exp_()
            grad_CU.scatter_add_(1, place_C[:, None], -held_C[:, None].to(grad_CU.dtype))
            grad_CU.masked_fill_((targets_N[at] == IGNORE)[:, None], 0.0)
            grad_CU = (grad_CU if shares_N is None else grad_CU.mul_(shares_N[at, None])).to(dtype)
            torch.mm(grad_CU, weight, out=grad_hidden[at])
            add_product(grad_weight, grad_CU, hidden_ND[at])
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            grad_hidden * grad.to(grad_hidden.dtype),
            grad_weight * grad.to(grad_weight.dtype),
            None,
            None,
            None,
            None,
        )
