"""Runs of causal attention against a softmax that is written out, run by run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lmworks.maths import causal
from lmworks.maths.causal import Run, attend_runs, attend_runs_backward

HEAD = 8
SHAPES = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 12)), min_size=1, max_size=4)
"""Queries of a run, and keys before them."""


def runs_of(shapes: list[tuple[int, int]]) -> list[Run]:
    """Runs behind each other; the second one begins at the first key of the first one, as two tasks of a document."""
    runs: list[Run] = []
    query = key = 0
    for i, (queries, before) in enumerate(shapes):
        runs.append(Run(query, 0 if i == 1 else key, queries, queries + before))
        query, key = query + queries, max(key, runs[-1].key + runs[-1].keys)
    return runs


def drawn(runs: list[Run], groups: int, times: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    queries, keys = runs[-1].query + runs[-1].queries, max(run.key + run.keys for run in runs)
    shapes = ((queries, groups * times), (keys, groups), (keys, groups), (queries, groups * times))
    return [torch.randn(*shape, HEAD, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def dense(runs: list[Run], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse in float64, one query and one head at a time."""
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2])
    each = q.shape[1] // k.shape[1]
    rows = []
    for run in runs:
        for i in range(run.queries):
            seen = slice(run.key, run.key + run.keys - run.queries + i + 1)
            for head in range(q.shape[1]):
                scores = k[seen, head // each] @ q[run.query + i, head] / HEAD**0.5
                rows.append((scores.softmax(0) @ v[seen, head // each], scores.logsumexp(0)))
    out, lse = (torch.stack([row[i] for row in rows]) for i in (0, 1))
    return out.view(q.shape), lse.view(q.shape[:2])


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@given(shapes=SHAPES, groups=st.integers(1, 2), times=st.integers(1, 3), seed=st.integers(0, 99))
def test_runs_are_the_softmax_written_out(
    fused: bool, shapes: list[tuple[int, int]], groups: int, times: int, seed: int
) -> None:
    runs = runs_of(shapes)
    q, k, v, dout = drawn(runs, groups, times, torch.float64, seed)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    want, want_lse = dense(runs, *leaves)
    gradients = torch.autograd.grad(want, leaves, dout)
    with torch.no_grad():
        out, lse = attend_runs(q, k, v, runs, fused=fused)
        found = attend_runs_backward(q, k, v, runs, out_MNh=out, lse_MN=lse, dout_MNh=dout, fused=fused)
    close(out, want, 1e-12)
    close(lse, want_lse, 1e-12)
    for own, gradient in zip(found, gradients, strict=True):
        close(own, gradient, 1e-12)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_lower_precisions_keep_sums_in_float32(dtype: torch.dtype, bound: float) -> None:
    runs = runs_of([(40, 90), (17, 0), (1, 33), (30, 3)])
    tensors = drawn(runs, 2, 2, dtype, 5)
    leaves = [x.double().requires_grad_() for x in tensors[:3]]
    want, want_lse = dense(runs, *leaves)
    gradients = torch.autograd.grad(want, leaves, tensors[3].double())
    out, lse = attend_runs(*tensors[:3], runs)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    found = attend_runs_backward(*tensors[:3], runs, out_MNh=out, lse_MN=lse, dout_MNh=tensors[3])
    for own, whole in zip((out, lse, *found), (want, want_lse, *gradients), strict=True):
        close(own, whole, bound)
    assert all(x.dtype == torch.float32 for x in found)


def test_the_plain_form_takes_some_queries_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "SCORES", 4 * 2 * 17)  # 4 queries of the first run at a time
    runs = runs_of([(11, 6), (9, 0)])
    q, k, v, dout = drawn(runs, 1, 2, torch.float64, 1)
    out, lse = attend_runs(q, k, v, runs, fused=False)
    want, want_lse = attend_runs(q, k, v, runs)
    close(out, want, 1e-12)
    close(lse, want_lse, 1e-12)
    rest = {"out_MNh": out, "lse_MN": lse, "dout_MNh": dout}
    plain, fused = (attend_runs_backward(q, k, v, runs, **rest, fused=which) for which in (False, True))
    for own, whole in zip(plain, fused, strict=True):
        close(own, whole, 1e-12)


def close(found: Tensor, want: Tensor, bound: float) -> None:
    worst = np.abs(found.detach().double().numpy() - want.detach().numpy()).max()
    assert worst <= bound * max(1.0, float(want.detach().abs().max()))
