"""Which of torch's attention kernels runs: on a GPU never the plain formula, unless second derivatives ask for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from lmworks.model.attention import Reach, _repeated, attend, boolean_mask, reach, takes_groups
from lmworks.train.probe import twice_differentiable
from tests.oracles import formulas

FUSED = {"flash", "cudnn", "efficient"}


def kernels(run: Callable[[], Any]) -> set[str]:
    """The short names of the attention kernels that were called: flash, cudnn, efficient, math."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        run()
    names = {event.key for event in seen.key_averages()}
    told = {
        "flash": ("aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_for_cpu"),
        "cudnn": ("aten::_scaled_dot_product_cudnn_attention",),
        "efficient": ("aten::_scaled_dot_product_efficient_attention",),
        "math": ("aten::_scaled_dot_product_attention_math",),
    }
    return {short for short, of_torch in told.items() if names & set(of_torch)}


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()


def heads(head_dim: int = 64, length: int = 256, **kind: Any) -> tuple[Tensor, Tensor, Tensor]:
    """q of 8 heads, k and v of 2: (B, T, N, h), (B, G, T, h), (B, G, T, h)."""
    q = drawn(2, length, 8, head_dim, seed=0, **kind)
    return q, drawn(2, 2, length, head_dim, seed=1, **kind), drawn(2, 2, length, head_dim, seed=2, **kind)


def exact(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, documents: Tensor | None = None) -> Tensor:
    """In float64 on the CPU with a mask; held against the slow formula below."""
    length, documents = q.shape[1], documents.cpu() if documents is not None else None
    mask = boolean_mask(length, length, window, documents, torch.device("cpu"))
    return attend(*(x.detach().double().cpu() for x in (q, k, v)), Reach(mask=mask))


def error(found: Tensor, want: Tensor) -> float:
    return float((found.detach().double().cpu() - want).norm() / want.norm())


def test_the_names_of_kernels_are_read_off() -> None:
    q, k, v = heads(length=16)
    run = lambda: attend(q, k, v, Reach(causal=True))  # noqa: E731
    assert kernels(run) == {"flash"}
    with sdpa_kernel(SDPBackend.MATH):
        assert kernels(run) == {"math"}


@pytest.mark.parametrize(
    ("dtype", "masked", "head_dim", "taken"),
    [
        (torch.bfloat16, False, 64, True),
        (torch.float16, False, 256, True),
        (torch.float32, False, 64, False),
        (torch.bfloat16, True, 64, False),
        (torch.bfloat16, False, 512, False),
    ],
)
def test_which_kernels_take_groups(dtype: torch.dtype, masked: bool, head_dim: int, taken: bool) -> None:
    assert takes_groups(torch.zeros(1, 1, 1, head_dim, dtype=dtype), masked=masked) == taken


def test_repeated_heads_give_the_same_attention() -> None:
    q, k, v = heads(length=12)
    mask = boolean_mask(12, 12, 5, None, q.device)
    want = formulas.attention(*(x.detach().double() for x in (q, k.transpose(1, 2), v.transpose(1, 2))), 5, None)
    found = attend(q, *_repeated(q.transpose(1, 2), k, v), Reach(mask=mask))
    torch.testing.assert_close(found.double(), want, rtol=0, atol=2e-6)
    torch.testing.assert_close(exact(q, k, v, 5), want, rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_causal_rows_take_a_fused_kernel(dtype: torch.dtype, head_dim: int) -> None:
    q, k, v = heads(head_dim, dtype=dtype, device="cuda")
    chosen = reach(batch=2, new=256, cached=0, window=None, documents_BK=None, device=q.device, dtype=dtype)
    assert chosen.causal
    found: list[Tensor] = []
    run = lambda: found.append(attend(q, k, v, chosen))  # noqa: E731
    ran = kernels(run)
    assert len(ran) == 1
    assert ran <= ({"flash", "cudnn"} if dtype == torch.bfloat16 else {"efficient"})
    found[0].float().sum().backward()
    assert all(x.grad is not None and bool(torch.isfinite(x.grad).all()) for x in (q, k, v))
    assert error(found[0], exact(q, k, v)) < (0.01 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.gpu
def test_tokens_behind_a_cache_take_a_fused_kernel() -> None:
    q, k, v = heads(length=64, dtype=torch.bfloat16, device="cuda")
    several = reach(batch=2, new=8, cached=56, window=None, documents_BK=None, device=q.device, dtype=q.dtype)
    one = reach(batch=2, new=1, cached=63, window=None, documents_BK=None, device=q.device, dtype=q.dtype)
    with torch.no_grad():
        for new, chosen in ((8, several), (1, one)):
            ran = kernels(lambda new=new, chosen=chosen: attend(q[:, -new:], k, v, chosen))
            assert len(ran) == 1
            assert ran <= FUSED


@pytest.mark.gpu
@pytest.mark.parametrize(("window", "packed"), [(None, True), (64, False), (64, True)])
def test_documents_and_windows_take_flex_attention(window: int | None, packed: bool) -> None:
    q, k, v = heads(dtype=torch.bfloat16, device="cuda")
    documents = (torch.arange(256, device="cuda") // 100).expand(2, -1) if packed else None
    chosen = reach(batch=2, new=256, cached=0, window=window, documents_BK=documents, device=q.device, dtype=q.dtype)
    assert chosen.blocks is not None
    found: list[Tensor] = []
    assert kernels(lambda: found.append(attend(q, k, v, chosen))) == set(), "none of SDPA's"
    assert error(found[0], exact(q, k, v, window, documents)) < 0.01
    found[0].float().sum().backward()
    assert q.grad is not None
    assert bool(torch.isfinite(q.grad).all())


@pytest.mark.gpu
def test_second_derivatives_ask_for_the_formula() -> None:
    q, k, v = heads(length=32, dtype=torch.bfloat16, device="cuda")
    with twice_differentiable():
        assert kernels(lambda: attend(q, k, v, Reach(causal=True))) == {"math"}
