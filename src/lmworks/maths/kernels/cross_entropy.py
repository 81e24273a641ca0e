"""Cross-entropy of rows of logits: two readings of a row, the second of which leaves its gradient in place.

C rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmworks.maths.kernels.grid import launch, rounded, warps

BLOCK = 8192
"""Most logits that a program holds at a time."""


def losses_in_place(
    logits_CV: Tensor, targets_C: Tensor, *, ignore: int, shares_C: Tensor | None = None, gradient: bool = True
) -> Tensor:
    """-log softmax(logits)[target] of each row, (C,) float32; 0 where the target is `ignore`.

    With `gradient`, the logits become the gradient of the sum of losses times shares (1 where there are none), rounded
    once to their own dtype; rows to ignore become 0. logits: (C, V) with neighbours along V. A target that is neither
    `ignore` nor in 0 .. V-1 makes its loss and its row NaN.
    """
    rows, vocab = logits_CV.shape
    if logits_CV.stride(1) != 1:
        raise ValueError("the logits of a row must be neighbours in memory, as they are overwritten")
    losses_C = torch.empty(rows, dtype=torch.float32, device=logits_CV.device)
    size = min(BLOCK, int(triton.next_power_of_2(vocab)))
    launch(
        _losses,
        rows,
        logits_CV,
        targets_C.contiguous(),
        losses_C if shares_C is None else shares_C.contiguous(),
        losses_C,
        vocab,
        logits_CV.stride(0),
        IGNORE=ignore,
        SHARES=shares_C is not None,
        GRADIENT=gradient,
        BLOCK=size,
        num_warps=warps(size),
    )
    return losses_C


@triton.jit
def _losses(
    logits_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    shares_ptr: tl.tensor,
    losses_ptr: tl.tensor,
    vocab: tl.tensor,
    stride: tl.tensor,
    IGNORE: tl.constexpr,
    SHARES: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row. The sum of exponentials is over that of the largest logit so far, and scaled down when that grows."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(targets_ptr + row)
    if target == IGNORE:
        tl.store(losses_ptr + row, 0.0)
        if GRADIENT:
            first = 0
            while first < vocab:
                column = first + tl.arange(0, BLOCK)
                zeros = tl.zeros((BLOCK,), dtype=tl.float32)
                tl.store(logits_ptr + column, zeros.to(logits_ptr.dtype.element_ty), mask=column < vocab)
                first += BLOCK
    else:
        top = -float("inf")
        total = 0.0
        first = 0
        while first < vocab:
            column = first + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + column, mask=column < vocab, other=-float("inf")).to(tl.float32)
            higher = tl.maximum(top, tl.max(x, axis=0))
            base = tl.where(higher == -float("inf"), 0.0, higher)  # nothing but -inf so far: no inf - inf
            total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base), axis=0)
            top = higher
            first += BLOCK
        legal = (target >= 0) & (target < vocab)
        picked = tl.load(logits_ptr + target, mask=legal, other=float("nan")).to(tl.float32)
        normaliser = top + tl.log(total)
        tl.store(losses_ptr + row, normaliser - picked)
        if GRADIENT:
            share = 1.0
            if SHARES:
                share = tl.load(shares_ptr + row).to(tl.float32)
            share = tl.where(legal, share, float("nan"))
            tl.debug_barrier()  # the target's logit is read by every thread before one of them overwrites it
            first = 0
            while first < vocab:
                column = first + tl.arange(0, BLOCK)
                x = tl.load(logits_ptr + column, mask=column < vocab, other=0.0).to(tl.float32)
                grad = (tl.exp(x - normaliser) - tl.where(column == target, 1.0, 0.0)) * share
                tl.store(logits_ptr + column, rounded(grad, logits_ptr), mask=column < vocab)
                first += BLOCK
