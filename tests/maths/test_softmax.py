"""Attention part by part against its definition, and its backward pass against autograd's."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmworks.maths.softmax import attend_part, attend_part_backward, delta, merge
from tests.oracles.attention import attention

HEADS = st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3)])


def drawn(seed: int, *, heads: int, groups: int, queries: int, keys: int, dtype: torch.dtype = torch.float64) -> list:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, heads, queries, 4), (2, groups, keys, 4), (2, groups, keys, 4)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def mask(seed: int, queries: int, keys: int, share: float) -> Tensor:
    """Some pairs; at a low share, some queries see nothing."""
    return torch.rand(2, 1, queries, keys, generator=torch.Generator().manual_seed(seed)) < share


@given(HEADS, st.integers(0, 99), st.integers(1, 5), st.integers(1, 6), st.sampled_from([0.0, 0.3, 0.8, 1.0]))
@settings(max_examples=60, deadline=None)
def test_a_part_is_attention_by_its_definition(
    heads: tuple[int, int], seed: int, queries: int, keys: int, share: float
) -> None:
    q, k, v = drawn(seed, heads=heads[0], groups=heads[1], queries=queries, keys=keys)
    seen = mask(seed, queries, keys, share)
    out, lse = attend_part(q, k, v, seen)
    for row, head in itertools.product(range(2), range(heads[0])):
        group = head // (heads[0] // heads[1])
        want, sums = attention(
            q[row, head].tolist(), k[row, group].tolist(), v[row, group].tolist(), seen[row, 0].tolist()
        )
        assert out[row, head].tolist() == [pytest.approx(line, rel=1e-12, abs=1e-12) for line in want]
        assert lse[row, head].tolist() == pytest.approx(sums, rel=1e-12, abs=1e-12)


@given(HEADS, st.integers(0, 99), st.permutations(range(4)), st.sampled_from([0.1, 0.4, 1.0]))
@settings(max_examples=60, deadline=None)
def test_parts_make_the_whole_in_any_order(heads: tuple[int, int], seed: int, order: list[int], share: float) -> None:
    """Forward and backward, over four sets of keys of which some queries see nothing, in one or in all."""
    q, k, v = drawn(seed, heads=heads[0], groups=heads[1], queries=5, keys=8)
    seen = mask(seed, 5, 8, share)
    parts = [slice(2 * i, 2 * i + 2) for i in order]
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -math.inf, dtype=q.dtype)
    for part in parts:
        out, lse = merge(out, lse, *attend_part(q, k[:, :, part], v[:, :, part], seen[..., part]))
    want, want_lse = attend_part(q, k, v, seen)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(seed), dtype=q.dtype)
    found = [torch.zeros_like(x) for x in (q, k, v)]
    for part in parts:
        dq, dk, dv = attend_part_backward(
            q,
            k[:, :, part],
            v[:, :, part],
            seen[..., part],
            lse_BNT=lse,
            dout_BNTh=dout,
            delta_BNT=delta(out, dout),
        )
        found[0] += dq
        found[1][:, :, part] += dk
        found[2][:, :, part] += dv
    for own, theirs in zip(found, gradients(q, k, v, seen, dout), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-10, atol=1e-12)


def gradients(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """By autograd, of torch's own attention. Queries that see nothing are told to see all and weigh nothing."""
    blind = ~seen.any(-1, keepdim=True)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*leaves, attn_mask=seen | blind, enable_gqa=True)
    return torch.autograd.grad(out, leaves, dout.masked_fill(blind, 0.0))


def test_without_a_mask_all_see_all() -> None:
    q, k, v = drawn(1, heads=4, groups=2, queries=3, keys=5)
    everything = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    for own, theirs in zip(attend_part(q, k, v, None), attend_part(q, k, v, everything), strict=True):
        assert torch.equal(own, theirs)


def test_sums_of_half_precision_are_kept_in_float32() -> None:
    """Scores of 80 000 would be infinite in float16, and 300 parts of bfloat16 would lose the sum."""
    q, k, v = drawn(2, heads=2, groups=2, queries=3, keys=300, dtype=torch.bfloat16)
    out, lse = torch.zeros(q.shape), torch.full(q.shape[:3], -math.inf)
    for i in range(300):
        out, lse = merge(out, lse, *attend_part(q, k[:, :, i : i + 1], v[:, :, i : i + 1], None))
    assert out.dtype == lse.dtype == torch.float32
    want, want_lse = attend_part(q.double(), k.double(), v.double(), None)
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    large = torch.full((1, 1, 1, 4), 200.0, dtype=torch.float16)
    out, lse = attend_part(large, large, large, None)
    assert lse.item() == 80_000.0
    assert out.unique().item() == 200.0
