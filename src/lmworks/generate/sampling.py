"""How the next token is chosen from logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from lmworks.core.errors import UsageError
from lmworks.core.seeds import seed_for


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of one generation. The same settings, prompt and seed give the same tokens."""

    temperature: Annotated[float, Ge(0)] = 0.0
    """0 takes the likeliest token; above, logits are divided by it before they become probabilities."""
    top_k: Annotated[int, Ge(0)] = 0
    """Draw among the k likeliest tokens; 0 = all."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Draw among the fewest tokens whose probabilities add up to p."""
    seed: Annotated[int, Ge(0)] = 0
    """Row i of a batch draws from hash(seed, i): its tokens do not depend on the rows beside it."""

    def __post_init__(self) -> None:
        legal = {
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "seed": (self.seed >= 0, "0 or more"),
        }
        for name, (holds, words) in legal.items():
            if not holds:
                raise UsageError(f"{name} is {getattr(self, name)}", legal=words)

    def generators(self, rows: int) -> list[torch.Generator]:
        """One generator for each row of a batch, on the CPU: the same draws on every device."""
        return [torch.Generator().manual_seed(seed_for(self.seed, "sample", row)) for row in range(rows)]


def choose(logits_BV: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> list[int]:
    """The next token of each row. Raises UsageError when the logits are not finite."""
    if sampling.temperature == 0:
        chosen_B = logits_BV.argmax(-1)
        best_B = logits_BV.gather(1, chosen_B[:, None])[:, 0]
        _must_be_finite(best_B)
        return [int(token) for token in chosen_B]
    weights_BK, tokens_BK = candidates(logits_BV, sampling)
    _must_be_finite(weights_BK.sum(-1))
    weights_BK = weights_BK.cpu()
    picks = [int(torch.multinomial(row_K, 1, generator=g)) for row_K, g in zip(weights_BK, generators, strict=True)]
    return [int(row_K[pick]) for row_K, pick in zip(tokens_BK, picks, strict=True)]


def candidates(logits_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Probabilities and ids of the tokens that may be drawn: two (B, K), the likeliest first where they were sorted."""
    vocab = logits_BV.shape[-1]
    wide_BV = logits_BV.float() / sampling.temperature
    if 0 < sampling.top_k < vocab:
        wide_BK, tokens_BK = wide_BV.topk(sampling.top_k, dim=-1)
    elif sampling.top_p < 1:
        wide_BK, tokens_BK = wide_BV.sort(dim=-1, descending=True, stable=True)
    else:
        wide_BK, tokens_BK = wide_BV, torch.arange(vocab, device=logits_BV.device).expand_as(wide_BV)
    weights_BK = wide_BK.softmax(-1)
    if sampling.top_p < 1:
        before_BK = weights_BK.cumsum(-1) - weights_BK
        weights_BK = weights_BK.masked_fill(before_BK >= sampling.top_p, 0.0)
        weights_BK = weights_BK / weights_BK.sum(-1, keepdim=True)
    return weights_BK, tokens_BK


def _must_be_finite(values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise UsageError(
            "the model's logits are not finite",
            next_step="take another precision (--precision fp32); if that does not help, the weights are damaged",
        )
