"""Attention over a part of the keys, and how parts become the whole, forward and backward.

For scores s = q k^T / sqrt(h) of the keys that a query sees, and any two sets a, b of keys apart from each other:

    lse = log sum exp(s),    out = sum exp(s - lse) v
    lse_ab = log(exp(lse_a) + exp(lse_b)),    out_ab = out_a + sigmoid(lse_b - lse_a) (out_b - out_a)

A query that sees no key of a set has lse = -inf and out = 0 there. With the lse of all keys, each set's part of the
backward pass stands alone (Dao et al. 2022):

    P = exp(s - lse),    delta = sum(dout * out),    dS = P (dout v^T - delta)
    dq = dS k / sqrt(h),    dk = dS^T q / sqrt(h),    dv = P^T dout

Sums are kept in float32, in float64 for tensors of float64. Query head n reads group n // (N / G).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attend_part(q_BNTh: Tensor, k_BGKh: Tensor, v_BGKh: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention over these keys alone: out (B, N, T, h) and lse (B, N, T), in the type of sums.

    `seen`: boolean, (B or 1, 1, T, K), True where a query sees a key; None where all see all.
    """
    scores_BGQK = _scores(q_BNTh, k_BGKh, seen)
    lse_BGQ = scores_BGQK.logsumexp(-1)
    weights_BGQK = scores_BGQK.sub_(_finite(lse_BGQ)[..., None]).exp_()
    out_BGQh = weights_BGQK @ v_BGKh.to(weights_BGQK.dtype)
    return out_BGQh.view(q_BNTh.shape), lse_BGQ.view(q_BNTh.shape[:-1])


def attend_part_backward(
    q_BNTh: Tensor,
    k_BGKh: Tensor,
    v_BGKh: Tensor,
    seen: Tensor | None,
    *,
    lse_BNT: Tensor,
    dout_BNTh: Tensor,
    delta_BNT: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """These keys' part of dq (B, N, T, h), and dk and dv (B, G, K, h) by these queries, in the type of sums.

    `lse_BNT` and `delta_BNT` are those of all keys.
    """
    groups, kind = k_BGKh.shape[1], sums_in(q_BNTh.dtype)
    scale = 1 / math.sqrt(q_BNTh.shape[-1])
    weights_BGQK = _scores(q_BNTh, k_BGKh, seen)
    weights_BGQK.sub_(_finite(_by_group(lse_BNT, groups))[..., None]).exp_()
    dout_BGQh = _by_group(dout_BNTh.to(kind), groups)
    dv_BGKh = weights_BGQK.transpose(-1, -2) @ dout_BGQh
    dscores_BGQK = dout_BGQh @ v_BGKh.to(kind).transpose(-1, -2)
    dscores_BGQK.sub_(_by_group(delta_BNT, groups)[..., None]).mul_(weights_BGQK).mul_(scale)
    dk_BGKh = dscores_BGQK.transpose(-1, -2) @ _by_group(q_BNTh.to(kind), groups)
    return (dscores_BGQK @ k_BGKh.to(kind)).view(q_BNTh.shape), dk_BGKh, dv_BGKh


def merge(out_BNTh: Tensor, lse_BNT: Tensor, part_BNTh: Tensor, part_lse_BNT: Tensor) -> tuple[Tensor, Tensor]:
    """Two sets of keys as one: out and lse. The order in which sets are merged changes roundings only."""
    share_BNT = torch.sigmoid(part_lse_BNT - lse_BNT)  # not a number where neither sees a key
    share_BNT = share_BNT.masked_fill(part_lse_BNT == -math.inf, 0.0)
    return torch.lerp(out_BNTh, part_BNTh.to(out_BNTh.dtype), share_BNT[..., None]), lse_BNT.logaddexp(part_lse_BNT)


def delta(out_BNTh: Tensor, dout_BNTh: Tensor) -> Tensor:
    """What every score's gradient is lowered by, (B, N, T): the sum of dout * out over a head, in the type of sums."""
    kind = sums_in(out_BNTh.dtype)
    return (out_BNTh.to(kind) * dout_BNTh.to(kind)).sum(-1)


def sums_in(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums of that type's values are kept."""
    return torch.promote_types(dtype, torch.float32)


def _scores(q_BNTh: Tensor, k_BGKh: Tensor, seen: Tensor | None) -> Tensor:
    """(B, G, Q, K) for the Q = N / G T queries of a group; -inf where a key is not seen."""
    groups, kind = k_BGKh.shape[1], sums_in(q_BNTh.dtype)
    q_BGQh = _by_group(q_BNTh.to(kind) / math.sqrt(q_BNTh.shape[-1]), groups)
    scores_BGQK = q_BGQh @ k_BGKh.to(kind).transpose(-1, -2)
    if seen is not None:
        by_head_BGnTK = scores_BGQK.unflatten(2, (-1, q_BNTh.shape[2]))  # type: ignore[no-untyped-call]  # torch's
        by_head_BGnTK.masked_fill_(~seen[:, :, None], -math.inf)
    return scores_BGQK


def _by_group(x_BNT: Tensor, groups: int) -> Tensor:
    """All queries of a group behind each other: (B, G, N / G T) and whatever follows."""
    return x_BNT.reshape(x_BNT.shape[0], groups, -1, *x_BNT.shape[3:])


def _finite(lse: Tensor) -> Tensor:
    """0 for a query that sees nothing: its scores, all -inf, then give weights of 0."""
    return lse.masked_fill(lse == -math.inf, 0.0)
