"""The loss over a large vocabulary without a logits tensor for all tokens.

Shapes: N tokens, D hidden, V vocabulary, C tokens in a chunk.

The logits of one chunk exist at a time. Their gradient is known as soon as they are, so the backward products are made
in the same visit and nothing is computed twice: forward and backward together cost the three products [N, D] x [D, V]
that the whole-tensor form costs, and hold [C, V] instead of [N, V].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmworks.maths import kernels
from lmworks.model import ops

IGNORE = -100
"""A target that does not count, as in torch.nn.functional.cross_entropy."""

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
"""float32 logits held at a time. Every chunk also adds to a gradient as large as the head, so chunks are not small."""
LEAST_ROWS = 512
"""Tokens of a chunk, however large the vocabulary."""


class Vocabulary:
    """What is done with the head's matrix. A layout that divides the vocabulary puts another one into the model."""

    def cross_entropy_sum(
        self, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, shares_N: Tensor | None = None
    ) -> Tensor:
        """As the function below."""
        return cross_entropy_sum(hidden_ND, weight_VD, targets_N, shares_N=shares_N)

    def cross_entropy_each(self, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        """As the function below."""
        return cross_entropy_each(hidden_ND, weight_VD, targets_N)

    def sampled_targets(self, hidden_ND: Tensor, weight_VD: Tensor, generator: torch.Generator) -> Tensor:
        """As the function below."""
        return sampled_targets(hidden_ND, weight_VD, generator)

    def logits(self, hidden: Tensor, weight_VD: Tensor) -> Tensor:
        """(..., D) -> (..., V) float32 logits (float64 stays); the product runs in the precision of `hidden`."""
        product = ops.linear(hidden, weight_VD, None)
        return product if product.dtype == torch.float64 else product.float()


def cross_entropy_sum(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    shares_N: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Sum over valid tokens of -log softmax(hidden @ weight.T)[target]; a float32 (or float64) scalar.

    Targets equal to IGNORE do not count. `shares_N`: a factor for each token's term, without gradient. `chunk` is the
    number of tokens whose logits exist at a time (default: by CHUNK_BYTES). Exact in value and gradient: the same as
    the whole-tensor form up to the order of float additions.
    """
    rows = chunk or chunk_rows(weight_VD.shape[0], hidden_ND.device.type)
    if not ops.own_forms():
        return _plain_sum(hidden_ND, weight_VD, targets_N, shares_N, rows)
    result: Tensor = _CrossEntropySum.apply(hidden_ND, weight_VD, targets_N, shares_N, rows)  # type: ignore[no-untyped-call]
    return result


def _plain_sum(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, shares_N: Tensor | None, rows: int) -> Tensor:
    """The same sum in plain PyTorch, which can be differentiated again."""
    total = torch.zeros((), dtype=accumulate_dtype(hidden_ND), device=hidden_ND.device)
    for at in chunks(targets_N.shape[0], rows):
        logits_CV = ops.linear(hidden_ND[at], weight_VD, None).to(total.dtype)
        if shares_N is None:
            total = total + F.cross_entropy(logits_CV, targets_N[at], ignore_index=IGNORE, reduction="sum")
        else:
            loss_C = F.cross_entropy(logits_CV, targets_N[at], ignore_index=IGNORE, reduction="none")
            total = total + (loss_C * shares_N[at]).sum()
    return total


def cross_entropy_each(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, chunk: int | None = None) -> Tensor:
    """-log softmax(hidden @ weight.T)[target] of each token, no gradient; [N] float32, 0 where the target is IGNORE."""
    losses_N = torch.zeros(targets_N.shape, dtype=accumulate_dtype(hidden_ND), device=hidden_ND.device)
    with torch.no_grad():
        weight_VD = weight_VD.to(hidden_ND.dtype)
        for at in chunks(targets_N.shape[0], chunk or chunk_rows(weight_VD.shape[0], hidden_ND.device.type)):
            losses_N[at], _ = _visit(_logits(hidden_ND[at], weight_VD), targets_N[at], None, gradient=False)
    return losses_N


@torch.no_grad()
def sampled_targets(hidden_ND: Tensor, weight_VD: Tensor, generator: torch.Generator) -> Tensor:
    """One token drawn from softmax(hidden @ weight.T) for each hidden state; [N] int64."""
    found_N = torch.empty(hidden_ND.shape[0], dtype=torch.int64, device=hidden_ND.device)
    weight_VD = weight_VD.to(hidden_ND.dtype)
    for at in chunks(hidden_ND.shape[0], chunk_rows(weight_VD.shape[0], hidden_ND.device.type)):
        probs_CV = torch.softmax(_logits(hidden_ND[at], weight_VD), dim=-1, dtype=accumulate_dtype(hidden_ND))
        found_N[at] = torch.multinomial(probs_CV, 1, generator=generator)[:, 0]
    return found_N


class _CrossEntropySum(torch.autograd.Function):
    """Gradients are made in the forward pass and only scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, shares_N: Tensor | None, rows: int
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        weight = weight_VD.to(hidden_ND.dtype)
        total = torch.zeros((), dtype=accumulate_dtype(hidden_ND), device=hidden_ND.device)
        grad_hidden = torch.empty_like(hidden_ND) if need_hidden else None
        grad_weight = torch.zeros_like(weight_VD) if need_weight else None
        for at in chunks(targets_N.shape[0], rows):
            shares_C = None if shares_N is None else shares_N[at]
            logits_CV = _logits(hidden_ND[at], weight)
            loss_C, grad_CV = _visit(logits_CV, targets_N[at], shares_C, gradient=need_hidden or need_weight)
            total += loss_C.sum() if shares_C is None else (loss_C * shares_C).sum()
            if grad_CV is None:
                continue
            if grad_hidden is not None:
                torch.mm(grad_CV, weight, out=grad_hidden[at])
            if grad_weight is not None:
                add_product(grad_weight, grad_CV, hidden_ND[at])
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    @ops.first_order_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        (grad,) = grads
        hidden = None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype)
        weight = None if grad_weight is None else grad_weight * grad.to(grad_weight.dtype)
        return hidden, weight, None, None, None


def _visit(
    logits_CV: Tensor, targets_C: Tensor, shares_C: Tensor | None, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses [C]; with `gradient`, that of their sum times the shares, [C, V] in the dtype of the logits."""
    if ops.on_gpu(logits_CV):
        losses_C = kernels.cross_entropy.losses_in_place(
            logits_CV, targets_C, ignore=IGNORE, shares_C=shares_C, gradient=gradient
        )
        return losses_C, logits_CV if gradient else None
    losses_C, log_probs_CV = _chunk_loss(logits_CV, targets_C)
    if not gradient:
        return losses_C, None
    grad_CV = _gradient_in_place(log_probs_CV, targets_C)
    if shares_C is not None:
        grad_CV.mul_(shares_C[:, None])
    return losses_C, grad_CV.to(logits_CV.dtype)


def _chunk_loss(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [C] in float32 and the log-probabilities' input: logits minus their log-sum-exp, float32 [C, V]."""
    log_probs_CV = torch.log_softmax(logits_CV, dim=-1, dtype=accumulate_dtype(logits_CV))
    valid_C = targets_C != IGNORE
    picked_C = log_probs_CV.gather(1, torch.where(valid_C, targets_C, 0)[:, None])[:, 0]
    return torch.where(valid_C, -picked_C, 0.0), log_probs_CV


def _gradient_in_place(log_probs_CV: Tensor, targets_C: Tensor) -> Tensor:
    """d loss / d logits = softmax - one_hot, zero for ignored tokens; overwrites its input."""
    valid_C = targets_C != IGNORE
    grad_CV = log_probs_CV.exp_()
    grad_CV.scatter_add_(1, torch.where(valid_C, targets_C, 0)[:, None], -torch.ones_like(grad_CV[:, :1]))
    if grad_CV.device.type == "cpu":  # few rows are ignored: no pass over all of them
        return grad_CV.index_fill_(0, (~valid_C).nonzero()[:, 0], 0.0)
    return grad_CV.masked_fill_(~valid_C[:, None], 0.0)


def _logits(hidden_CD: Tensor, weight_VD: Tensor) -> Tensor:
    """[C, V] in the precision of the hidden states."""
    if hidden_CD.device.type == "cpu":
        return ops.product(hidden_CD, weight_VD)
    return hidden_CD @ weight_VD.t()


def add_product(sum_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor) -> None:
    """sum += grad.T @ hidden, accumulated in the dtype of the sum (float32 when the weights are)."""
    if sum_VD.dtype == grad_CV.dtype:
        sum_VD.addmm_(grad_CV.t(), hidden_CD)
    else:
        sum_VD += grad_CV.t() @ hidden_CD


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """Of sums over tokens or ids: float32, or float64 for exact tests."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def chunk_rows(vocab: int, device: str) -> int:
    """Tokens whose logits exist at a time."""
    return max(LEAST_ROWS, CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (4 * vocab))


def chunks(total: int, rows: int) -> list[slice]:
    """`total` tokens in runs of at most `rows`."""
    return [slice(start, min(start + rows, total)) for start in range(0, total, rows)]
