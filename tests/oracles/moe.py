"""A mixture of experts by its formulas: token by token, in float64, with the gradients of autograd."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lmworks.model.moe import Experts


def scores(x_D: Tensor, weights: Mapping[str, Tensor], settings: Experts) -> Tensor:
    """(E,): the router's scores of one token."""
    logits_E = torch.stack([(row_D * x_D).sum() for row_D in weights["router.weight"]])
    if settings.scoring == "sigmoid":
        return 1 / (1 + (-logits_E).exp())
    return logits_E.exp() / logits_E.exp().sum()


def chosen(scores_E: Tensor, weights: Mapping[str, Tensor], settings: Experts) -> list[int]:
    """The experts of one token, best first."""
    scores_E = scores_E.detach()
    bias_E = weights.get("router.expert_bias", torch.zeros_like(scores_E))
    wanted = (scores_E + bias_E).tolist()
    return sorted(range(len(wanted)), key=lambda e: -wanted[e])[: settings.top_k]


def mlp(x_D: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """down(silu(gate x) * up x)."""
    gate_F = gate_FD @ x_D
    return down_DF @ (gate_F / (1 + (-gate_F).exp()) * (up_FD @ x_D))


def layer(x_BTD: Tensor, weights: Mapping[str, Tensor], settings: Experts) -> Tensor:
    """(B, T, D) -> (B, T, D)."""
    rows = []
    for row_TD in x_BTD:
        tokens = []
        for x_D in row_TD:
            scores_E = scores(x_D, weights, settings)
            best = chosen(scores_E, weights, settings)
            total = sum(scores_E[e] for e in best) if settings.normalise_top_k else 1.0
            y_D = torch.zeros_like(x_D)
            for e in best:
                parts = (weights[f"experts.{name}_proj"][e] for name in ("gate", "up", "down"))
                y_D = y_D + settings.scale * scores_E[e] / total * mlp(x_D, *parts)
            if settings.shared_size:
                y_D = y_D + mlp(x_D, *(weights[f"shared.{name}_proj.weight"] for name in ("gate", "up", "down")))
            tokens.append(y_D)
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


def load(x_BTD: Tensor, weights: Mapping[str, Tensor], settings: Experts) -> Tensor:
    """(B, E) int64: how many tokens of each row chose each expert."""
    counts_BE = torch.zeros(x_BTD.shape[0], settings.count, dtype=torch.int64)
    for row, row_TD in enumerate(x_BTD):
        for x_D in row_TD:
            for e in chosen(scores(x_D, weights, settings), weights, settings):
                counts_BE[row, e] += 1
    return counts_BE


def aux_loss(x_BTD: Tensor, weights: Mapping[str, Tensor], settings: Experts) -> Tensor:
    """The mean over rows of sum over e of f_e P_e (DeepSeek-V3, arXiv 2412.19437, eq. 17 to 20)."""
    length, counts_BE = x_BTD.shape[1], load(x_BTD, weights, settings)
    total = torch.zeros((), dtype=torch.float64)
    for row_TD, counts_E in zip(x_BTD, counts_BE, strict=True):
        shares = [s_E / s_E.sum() for s_E in (scores(x_D, weights, settings) for x_D in row_TD)]
        for e in range(settings.count):
            f = settings.count / (settings.top_k * length) * int(counts_E[e])
            total = total + f * torch.stack([share_E[e] for share_E in shares]).sum() / length
    return total / x_BTD.shape[0]
