"""COAT's halves of a block on kernels, in the interpreter: as on the plain forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmworks.maths import kernels
from lmworks.methods.coat.halves import FeedForward, NormProducts, Product


def grown(kernels_on: bool, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> list[Tensor]:
    monkeypatch.setattr(kernels, "take", lambda x: kernels_on)
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(kind).requires_grad_()

    x, norm = leaf(32, 48, kind=dtype), torch.ones(48, requires_grad=True)
    q, o, gate, up, down = leaf(32, 48), leaf(48, 32), leaf(64, 48), leaf(64, 48), leaf(48, 64)
    (first,) = NormProducts.apply(x, norm, 1e-5, q)
    second = x + Product.apply(first, o)
    third = second + FeedForward.apply(second, norm, 1e-5, gate, up, down)
    third.backward(torch.randn(third.shape, generator=generator).to(dtype))
    leaves = [x, norm, q, o, gate, up, down]
    return [third.detach(), *(t.grad for t in leaves if t.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_plain_forms(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ours = (grown(on, monkeypatch, dtype) for on in (False, True))
    assert len(plain) == 8
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == b.dtype
        # sums in another order; a value between two codes may fall to the other side
        assert float((a.double() - b.double()).norm() / b.double().norm()) < 3e-3
