"""Learning a belief from results: the kernel's numbers that make them, and what is held before, likeliest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from lmworks.core.need import need
from lmworks.methods.admire_bayesopt.kernel import Belief, Points, linked, truncated
from lmworks.methods.admire_bayesopt.posterior import Unfit, factor

Kernel = Literal["linked", "truncated"]
LENGTH, OWN_LENGTH, POWER, VARIANCE = (3.0, 6.0), (6.0, 2.0), (3.0, 3.0), (2.0, 0.15)
"""Shape and rate of Gamma distributions that are held before: the paper's, and BoTorch's for the variance."""
NOISE, NOISE_BELOW = (-4.0, 1.0), (-2.0, 2.0)
"""Mean and deviation of the log of the noise's variance: of the largest size, or of all where they have one; of smaller
sizes that have their own, which may say nothing: as a rough surface their noise would mislead."""
LINK, GAIN = (0.9, 0.7), (0.0, 0.7)
"""Mean and deviation of the atanh of a link and of the log of a gain. tanh(0.9) is 0.72."""
LEAST_NOISE = 1e-4
STEPS = 100
"""Of L-BFGS at most."""
Unpacked = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def fit(runs: Points, value_N: Tensor, fidelity_S: Tensor, kernel: Kernel, *, offset: float, apart: bool) -> Belief:
    """The likeliest belief, in PyTorch alone. Values are scaled, the larger the better. Raises Unfit.

    `apart`: each size has a level of its own, of deviation `offset` before anything is known; otherwise all have one.
    Linked sizes have a noise each, so that a size that says nothing does not make the others look noisy.
    """
    sources, sizes = runs.x_NM.shape[1], len(fidelity_S)
    unpack = _unpack(sources, fidelity_S, kernel)
    noises = _noises(sizes, kernel)
    lengths = [math.log(LENGTH[0] / LENGTH[1]), math.log(OWN_LENGTH[0] / OWN_LENGTH[1])]
    others = [LINK[0]] * (sizes - 1) + [0.0] * (sizes - 1) if kernel == "linked" else [0.0]
    best: tuple[float, Tensor] | None = None
    for log_noise in (NOISE[0], -1.0):
        start = [lengths[0]] * sources + [lengths[1]] * sources + [0.0, *[log_noise] * noises, *others]
        try:
            found = _climb(
                torch.tensor(start, dtype=torch.float64), lambda raw: _loss(unpack(raw), runs, value_N, offset, apart)
            )
        except Unfit:
            continue
        if best is None or found[0] < best[0]:
            best = found
    if best is None:
        raise Unfit(f"no numbers of the kernel fit {len(runs)} results")
    with torch.no_grad():
        return _belief(unpack(best[1]), offset, apart)


def _unpack(sources: int, fidelity_S: Tensor, kernel: Kernel) -> Callable[[Tensor], tuple[Unpacked, Tensor]]:
    """From one vector to lengths, own lengths, shared and own variances, noises, variance; and the log of the prior."""
    sizes = len(fidelity_S)
    behind = 2 * sources + 1 + _noises(sizes, kernel)

    def unpack(raw: Tensor) -> tuple[Unpacked, Tensor]:
        lengths_M, own_M = raw[:sources].exp(), raw[sources : 2 * sources].exp()
        variance, rest = raw[2 * sources].exp(), raw[behind:]
        noise_S = LEAST_NOISE + raw[2 * sources + 1 : behind].exp()
        prior = _gamma(lengths_M, *LENGTH) + _gamma(own_M, *OWN_LENGTH) + _gamma(variance, *VARIANCE)
        prior = prior + _normal(noise_S[-1].log(), *NOISE) + _normal(noise_S[:-1].log(), *NOISE_BELOW)
        prior = prior - noise_S.log().sum()
        noise_S = noise_S.expand(sizes)
        if kernel == "truncated":
            shared_SS, own_SS = truncated(fidelity_S, rest.exp(), variance)
            return (lengths_M, own_M, shared_SS, own_SS, noise_S, variance), prior + _gamma(rest.exp(), *POWER)
        one = torch.ones(1, dtype=raw.dtype)
        link_S = torch.cat([torch.tanh(rest[: sizes - 1]), one])
        gain_S = torch.cat([rest[sizes - 1 :].exp(), one])
        shared_SS, own_SS = linked(link_S, gain_S, variance)
        prior = prior + _normal(rest[: sizes - 1], *LINK) + _normal(rest[sizes - 1 :], *GAIN)
        return (lengths_M, own_M, shared_SS, own_SS, noise_S, variance), prior

    return unpack


def _noises(sizes: int, kernel: Kernel) -> int:
    """How many noises are learnt: the paper's kernel has one for all sizes."""
    return sizes if kernel == "linked" else 1


def _belief(unpacked: tuple[Unpacked, Tensor], offset: float, apart: bool) -> Belief:
    lengths_M, own_M, shared_SS, own_SS, noise_S, _ = unpacked[0]
    return Belief(lengths_M, own_M, shared_SS, own_SS, noise_S, offset, apart)


def _loss(unpacked: tuple[Unpacked, Tensor], runs: Points, value_N: Tensor, offset: float, apart: bool) -> Tensor:
    """Minus the log of likelihood times prior, per result."""
    (lengths_M, own_M, shared_SS, own_SS, noise_S, _), prior = unpacked
    belief = Belief(lengths_M, own_M, shared_SS, own_SS, noise_S, offset, apart)
    total_NN = belief.covariance(runs, runs) + belief.levels(runs.size_N, runs.size_N)
    lower_NN = factor(total_NN + noise_S[runs.size_N].diag())
    white_N: Tensor = torch.linalg.solve_triangular(lower_NN, value_N[:, None], upper=False)[:, 0]
    log_likelihood = -(white_N * white_N).sum() / 2 - lower_NN.diagonal().log().sum()
    return -(log_likelihood + prior) / len(runs)


def _climb(raw: Tensor, loss_of: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
    """L-BFGS from one start: the least loss that was met, and where. Raises Unfit."""
    raw = raw.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([raw], max_iter=STEPS, line_search_fn="strong_wolfe", tolerance_change=1e-7)
    best: list[tuple[float, Tensor]] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(raw)
        torch.autograd.backward(loss)
        value = float(loss.detach())
        if math.isfinite(value) and (not best or value < best[0][0]):
            best[:] = [(value, raw.detach().clone())]
        return loss

    try:
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    except Unfit:
        if not best:
            raise
    if not best:
        raise Unfit("the likelihood is not finite")
    return best[0]


def _gamma(value: Tensor, shape: float, rate: float) -> Tensor:
    return ((shape - 1) * value.log() - rate * value).sum()


def _normal(value: Tensor, mean: float, deviation: float) -> Tensor:
    return -(((value - mean) / deviation) ** 2).sum() / 2


def fit_botorch(runs: Points, value_N: Tensor, fidelity_S: Tensor, *, offset: float, apart: bool) -> Belief:
    """The same for the truncated kernel, by BoTorch's SingleTaskMultiFidelityGP. Raises Unfit, MissingExtra."""
    models: Any = need("botorch.models", extra="mix", why='engine = "botorch"')
    fitting: Any = need("botorch.fit", extra="mix")
    likelihoods: Any = need("gpytorch.mlls", extra="mix")
    errors: Any = need("botorch.exceptions.errors", extra="mix")
    x_NX = torch.cat([runs.x_NM, fidelity_S[runs.size_N][:, None]], dim=1)
    model = models.SingleTaskMultiFidelityGP(
        x_NX, value_N[:, None], data_fidelities=[x_NX.shape[1] - 1], outcome_transform=None
    )
    try:
        fitting.fit_gpytorch_mll(likelihoods.ExactMarginalLogLikelihood(model.likelihood, model))
    except (errors.ModelFittingError, RuntimeError) as error:
        raise Unfit(f"BoTorch cannot fit {len(runs)} results: {error}") from error
    (base,) = model.covar_module.base_kernel.kernels
    shared_SS, own_SS = truncated(fidelity_S, base.power.detach()[0], model.covar_module.outputscale.detach())
    return Belief(
        base.covar_module_unbiased.lengthscale.detach()[0],
        base.covar_module_biased.lengthscale.detach()[0],
        shared_SS,
        own_SS,
        model.likelihood.noise.detach().reshape(1).expand(len(fidelity_S)),
        offset,
        apart,
    )
