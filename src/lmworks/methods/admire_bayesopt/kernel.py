"""How results of mixtures at several sizes hang together: covariances, and the belief that their numbers make up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True)
class Points:
    """Mixtures, each at a size."""

    x_NM: Tensor
    """What the kernel sees of each mixture: its weights, or their square roots; float64."""
    size_N: Tensor
    """Which size, from 0 for the smallest."""

    def __len__(self) -> int:
        return len(self.x_NM)

    def __getitem__(self, rows: Tensor | slice) -> Points:
        return Points(self.x_NM[rows], self.size_N[rows])

    def join(self, other: Points) -> Points:
        """These, then the others."""
        return Points(torch.cat([self.x_NM, other.x_NM]), torch.cat([self.size_N, other.size_N]))


@final
@dataclass(frozen=True)
class Belief:
    """What was learnt of the results: everything but the results. S sizes, M sources; results are scaled."""

    lengths_M: Tensor
    """How far a change of each source reaches, in what all sizes share."""
    own_lengths_M: Tensor
    """The same, in what smaller sizes have of their own."""
    shared_SS: Tensor
    """Variance that two sizes share, of the part that the largest one has."""
    own_SS: Tensor
    """Variance that two sizes share, of the part that the largest one does not have: its last row and column are 0."""
    noise_S: Tensor
    """Variance of a result of each size that is measured again."""
    offset: float
    """Standard deviation, before anything is known, of each size's own level; 0: levels are 0."""
    apart: bool = True
    """Whether each size has a level of its own, rather than one for all of them."""

    def covariance(self, a: Points, b: Points) -> Tensor:
        """Between what is learnt at `a` and at `b`, levels and noise apart: (len(a), len(b))."""
        shared_AB = self.shared_SS[a.size_N][:, b.size_N]
        own_AB = self.own_SS[a.size_N][:, b.size_N]
        return shared_AB * matern(a.x_NM, b.x_NM, self.lengths_M) + own_AB * matern(a.x_NM, b.x_NM, self.own_lengths_M)

    def paired(self, a_N: Tensor, b_N: Tensor) -> Tensor:
        """Covariance of the same mixture at two sizes, for each pair of sizes: (N,)."""
        return self.shared_SS[a_N, b_N] + self.own_SS[a_N, b_N]

    def levels(self, a_N: Tensor, b_N: Tensor) -> Tensor:
        """Covariance of the sizes' levels, before anything is known: (len(a), len(b))."""
        same_AB = a_N[:, None] == b_N[None, :]
        return self.offset**2 * (
            same_AB.to(self.shared_SS) if self.apart else torch.ones_like(same_AB).to(self.shared_SS)
        )


def matern(a_AM: Tensor, b_BM: Tensor, lengths_M: Tensor) -> Tensor:
    """The Matern 5/2 kernel with a length for each source, 1 at distance 0: (A, B)."""
    a_AM, b_BM = a_AM / lengths_M, b_BM / lengths_M
    squared_AB = (a_AM * a_AM).sum(1)[:, None] + (b_BM * b_BM).sum(1)[None, :] - 2 * a_AM @ b_BM.T
    far_AB = math.sqrt(5) * squared_AB.clamp(min=1e-30).sqrt()
    return (1 + far_AB + far_AB * far_AB / 3) * torch.exp(-far_AB)


def truncated(fidelity_S: Tensor, power: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """The linear-truncated kernel: what sizes share, and (1 - s)(1 - s')(1 + s s')^w of their own; both (S, S)."""
    left_S = 1 - fidelity_S
    own_SS = torch.outer(left_S, left_S) * (1 + torch.outer(fidelity_S, fidelity_S)) ** power
    return variance * torch.ones_like(own_SS), variance * own_SS


def linked(link_S: Tensor, gain_S: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Sizes that follow the largest one with a correlation of their own, and a spread of their own; both (S, S).

    `link_S` is 1 for the largest: what size i has is gain_i (link_i f + sqrt(1 - link_i^2) b), with one b for all.
    """
    gain_SS = variance * torch.outer(gain_S, gain_S)
    apart_S = (1 - link_S * link_S).clamp(min=0).sqrt()
    return gain_SS * torch.outer(link_S, link_S), gain_SS * torch.outer(apart_S, apart_S)
