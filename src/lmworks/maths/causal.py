"""Causal attention of many runs of tokens: each run's queries are the last ones of its keys.

Queries [a, b) of a document see its keys [0, b): all of [0, a), and of [a, b) those up to themselves. So a run is a
full rectangle and a causal square, and no kernel needs to know how queries shorter than their keys are aligned: they
differ on it. Both parts become one by their lse, and backward each stands alone with lse and out of both, as
`softmax.py` says.

On a CPU parts are computed by torch's fused kernel, elsewhere by the plain form, some queries at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmworks.maths.softmax import attend_part, attend_part_backward, delta, merge, sums_in

SCORES = 1 << 26
"""Of the plain form at a time: it writes one for each pair and head, in the type of sums."""


class Run(NamedTuple):
    """Queries and keys of one run, by their places among those of all runs."""

    query: int
    """Its first query."""
    key: int
    """Its first key."""
    queries: int
    keys: int
    """At least as many as queries."""


def attend_runs(
    q_MNh: Tensor, k_KGh: Tensor, v_KGh: Tensor, runs: Sequence[Run], *, fused: bool | None = None
) -> tuple[Tensor, Tensor]:
    """out (M, N, h) in q's type and lse (M, N) in the type of sums. Runs cover all queries; they may share keys.

    `fused`: by torch's kernel for CPUs; None: on a CPU.
    """
    attend = _attend_fused if (q_MNh.is_cpu if fused is None else fused) else _attend_plain
    out_MNh = torch.empty_like(q_MNh)
    lse_MN = q_MNh.new_empty(q_MNh.shape[:2], dtype=sums_in(q_MNh.dtype))
    for run in runs:
        own, keys = slice(run.query, run.query + run.queries), slice(run.key, run.key + run.keys)
        out_MNh[own], lse_MN[own] = attend(q_MNh[own], k_KGh[keys], v_KGh[keys])
    return out_MNh, lse_MN


def attend_runs_backward(
    q_MNh: Tensor,
    k_KGh: Tensor,
    v_KGh: Tensor,
    runs: Sequence[Run],
    *,
    out_MNh: Tensor,
    lse_MN: Tensor,
    dout_MNh: Tensor,
    fused: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (M, N, h), dk and dv (K, G, h), in the type of sums. `fused` as in `attend_runs`."""
    backward = _backward_fused if (q_MNh.is_cpu if fused is None else fused) else _backward_plain
    kind = sums_in(q_MNh.dtype)
    dq_MNh = torch.zeros_like(q_MNh, dtype=kind)
    dk_KGh, dv_KGh = torch.zeros_like(k_KGh, dtype=kind), torch.zeros_like(v_KGh, dtype=kind)
    for run in runs:
        own, keys = slice(run.query, run.query + run.queries), slice(run.key, run.key + run.keys)
        given = (x[own] for x in (q_MNh, out_MNh, lse_MN, dout_MNh))
        backward(*given, k_KGh[keys], v_KGh[keys], into=(dq_MNh[own], dk_KGh[keys], dv_KGh[keys]))
    return dq_MNh, dk_KGh, dv_KGh


def _attend_fused(q_MNh: Tensor, k_KGh: Tensor, v_KGh: Tensor) -> tuple[Tensor, Tensor]:
    """One run: the square, then the rectangle in front of it."""
    before = k_KGh.shape[0] - q_MNh.shape[0]
    q, k, v = _as_row(q_MNh), _as_row(k_KGh), _as_row(v_KGh)
    out, lse = _fused(q, k[:, :, before:], v[:, :, before:], is_causal=True)
    if before:
        full = _fused(q, k[:, :, :before], v[:, :, :before], is_causal=False)
        out, lse = merge(out.to(lse.dtype), lse, *full)
    return _as_tokens(out), _as_tokens(lse)


def _attend_plain(q_MNh: Tensor, k_KGh: Tensor, v_KGh: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = _as_row(q_MNh), _as_row(k_KGh), _as_row(v_KGh)
    parts = [attend_part(q[:, :, own], k[:, :, :seen], v[:, :, :seen], mask) for own, seen, mask in _some(q, k)]
    out, lse = (torch.cat(each, 2) for each in zip(*parts, strict=True))
    return _as_tokens(out), _as_tokens(lse)


def _backward_fused(*given: Tensor, into: Sequence[Tensor]) -> None:
    """`given`: q, out, lse, dout of the queries, k and v; what one run adds to dq, dk and dv goes `into` these."""
    q, out, lse, dout, k, v = (_as_row(x) for x in given)
    dq, dk, dv = (_as_row(x) for x in into)
    before = k.shape[2] - q.shape[2]
    for keys, causal in ((slice(before, None), True), (slice(0, before), False)):
        if causal or before:
            parts = _fused_backward(dout, q, k[:, :, keys], v[:, :, keys], out, lse, 0.0, causal)
            _add((dq, dk[:, :, keys], dv[:, :, keys]), parts)


def _backward_plain(*given: Tensor, into: Sequence[Tensor]) -> None:
    q, out, lse, dout, k, v = (_as_row(x) for x in given)
    dq, dk, dv = (_as_row(x) for x in into)
    lowered = delta(out, dout)
    for own, seen, mask in _some(q, k):
        rest = {"lse_BNT": lse[:, :, own], "dout_BNTh": dout[:, :, own], "delta_BNT": lowered[:, :, own]}
        parts = attend_part_backward(q[:, :, own], k[:, :, :seen], v[:, :, :seen], mask, **rest)
        _add((dq[:, :, own], dk[:, :, :seen], dv[:, :, :seen]), parts)


def _add(wholes: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    for whole, part in zip(wholes, parts, strict=True):
        whole.add_(part)


_fused: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _some(q_1NMh: Tensor, k_1GKh: Tensor) -> Iterator[tuple[slice, int, Tensor]]:
    """Some queries at a time, how many keys the last of them sees, and which of these each one sees."""
    (_, heads, queries, _), keys = q_1NMh.shape, k_1GKh.shape[2]
    most = max(1, SCORES // (heads * keys))
    for start in range(0, queries, most):
        stop = min(start + most, queries)
        last = torch.arange(keys - queries + start, keys - queries + stop, device=q_1NMh.device)
        seen = keys - queries + stop
        yield slice(start, stop), seen, (torch.arange(seen, device=last.device) <= last[:, None])[None, None]


def _as_row(x_MN: Tensor) -> Tensor:
    """(1, N, M) and whatever follows."""
    return x_MN.transpose(0, 1)[None]


def _as_tokens(x_1NM: Tensor) -> Tensor:
    return x_1NM[0].transpose(0, 1)
