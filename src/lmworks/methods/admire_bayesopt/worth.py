"""What a run is worth before it is made: information on the best result, and expected improvement."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NODES = 96
"""Points of the sum over possible results."""
REACH = 9.0
"""Standard deviations to which that sum goes."""
SHARPEST = 1e-7
"""Below this share of noise a result counts as exact."""


def information(gap_N: Tensor, link_N: Tensor) -> Tensor:
    """Nats that a result says of the best value f*, once f* is fixed: the entropy of the result less what is left.

    `gap_N`: (f* - u) / sd of the mixture at the largest size. `link_N`: correlation of that value with the result, the
    result's noise included. With z the result in its own standard deviations, r(z) its density given f* over that
    without it, and h = phi/Phi at the gap,

        I = E[r log r] + link^2 gap h / 2,      r = Phi((gap - link z) / sqrt(1 - link^2)) / Phi(gap)

    The sum over z has its nodes where r bends. At |link| = 1 it is gap h / 2 - log Phi(gap).
    """
    link_N = link_N.abs().clamp(max=1)
    log_Phi_N = torch.special.log_ndtr(gap_N)
    hazard_N = torch.exp(-gap_N * gap_N / 2 - log_Phi_N) / math.sqrt(2 * math.pi)
    rest_N = (1 - link_N * link_N).clamp(min=0).sqrt()
    exact_N = rest_N <= SHARPEST
    safe_N = torch.where(link_N > SHARPEST, link_N, torch.ones_like(link_N))
    bend_N, width_N = gap_N / safe_N, rest_N.clamp(min=SHARPEST) / safe_N
    low_N, high_N = torch.asinh((-REACH - bend_N) / width_N), torch.asinh((REACH - bend_N) / width_N)
    step_N = (high_N - low_N) / (NODES - 1)
    u_NK = low_N[:, None] + step_N[:, None] * torch.arange(NODES, dtype=gap_N.dtype)
    z_NK = bend_N[:, None] + width_N[:, None] * torch.sinh(u_NK)
    density_NK = torch.exp(-z_NK * z_NK / 2) * torch.cosh(u_NK) * (step_N * width_N)[:, None] / math.sqrt(2 * math.pi)
    log_r_NK = torch.special.log_ndtr(-torch.sinh(u_NK)) - log_Phi_N[:, None]
    summed_N = (density_NK * torch.exp(log_r_NK) * log_r_NK).sum(1)
    first_N = torch.where(exact_N, -log_Phi_N, summed_N)
    found_N = first_N + link_N**2 * gap_N * hazard_N / 2
    return torch.where(link_N > SHARPEST, found_N, torch.zeros_like(found_N)).clamp(min=0)


def maxima(mean_N: Tensor, sd_N: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Draws of the best value among candidates, by a Gumbel distribution through three quantiles: (draws,).

    The candidates count as independent: P(f* < y) = product of Phi((y - mean) / sd).
    """
    low, high = float((mean_N - 6 * sd_N).max()), float((mean_N + 8 * sd_N).max())
    quantile = {share: _crossing(mean_N, sd_N, share, low, high) for share in (0.25, 0.5, 0.75)}
    scale = (quantile[0.75] - quantile[0.25]) / (math.log(math.log(4)) - math.log(math.log(4 / 3)))
    centre = quantile[0.5] + scale * math.log(math.log(2))
    uniform_K = torch.rand(draws, generator=generator, dtype=mean_N.dtype).clamp(min=1e-12, max=1 - 1e-12)
    return torch.clamp(centre - scale * torch.log(-torch.log(uniform_K)), min=float(mean_N.max()))


def _crossing(mean_N: Tensor, sd_N: Tensor, share: float, low: float, high: float) -> float:
    """Where the distribution of the best value has this share below, by halving."""
    sd_N = sd_N.clamp(min=1e-12)
    for _ in range(60):
        middle = (low + high) / 2
        below = float(torch.special.log_ndtr((middle - mean_N) / sd_N).sum())
        low, high = (middle, high) if below < math.log(share) else (low, middle)
    return (low + high) / 2


def log_improvement(mean_N: Tensor, sd_N: Tensor, best: float) -> Tensor:
    """log of E[max(0, f - best)] for f normal, without underflow: (N,)."""
    sd_N = sd_N.clamp(min=1e-12)
    z_N = (mean_N - best) / sd_N
    return torch.log(sd_N) + _log_h(z_N)


def _log_h(z_N: Tensor) -> Tensor:
    """log(phi(z) + z Phi(z)): by erfcx where the two nearly cancel, by its series where that cancels too."""
    near_N = z_N.clamp(min=-1)
    plain_N = torch.log(torch.exp(-near_N * near_N / 2) / math.sqrt(2 * math.pi) + near_N * torch.special.ndtr(near_N))
    mid_N = z_N.clamp(min=-1e4, max=-1)
    ratio_N = math.sqrt(math.pi / 2) * torch.special.erfcx(-mid_N / math.sqrt(2)) * -mid_N
    log_phi_N = -z_N * z_N / 2 - math.log(2 * math.pi) / 2
    mid_log_N = log_phi_N + torch.log1p(-ratio_N.clamp(max=1 - 1e-12))
    far_log_N = log_phi_N - 2 * torch.log(z_N.clamp(max=-1).abs())
    return torch.where(z_N > -1, plain_N, torch.where(z_N > -1e3, mid_log_N, far_log_N))
