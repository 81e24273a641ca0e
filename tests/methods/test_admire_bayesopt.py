"""The kernel, the posterior and what runs are worth, against slow formulas."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmworks.methods.admire_bayesopt.fit import LEAST_NOISE, fit, fit_botorch
from lmworks.methods.admire_bayesopt.kernel import Belief, Points, linked, truncated
from lmworks.methods.admire_bayesopt.posterior import Posterior, Unfit, agreement, factor
from lmworks.methods.admire_bayesopt.worth import information, log_improvement, maxima
from tests.oracles import admire as oracle

SIZES = torch.tensor([0.001, 0.06, 1.0], dtype=torch.float64)


def simplex(rows: int, sources: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(sources), size=rows))


def of(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


def belief_of(sources: int, seed: int = 0, *, power: float = 1.3, variance: float = 0.7, noise: float = 0.01) -> Belief:
    rng = np.random.default_rng(seed)
    lengths = [torch.from_numpy(rng.uniform(0.1, 2.0, sources)) for _ in range(2)]
    shared, own = truncated(
        SIZES, torch.tensor(power, dtype=torch.float64), torch.tensor(variance, dtype=torch.float64)
    )
    return Belief(lengths[0], lengths[1], shared, own, torch.full((len(shared),), noise, dtype=torch.float64), 0.0)


def link_belief(links: list[float], sources: int, *, noise: float = 0.01, offset: float = 0.0) -> Belief:
    link = torch.tensor([*links, 1.0], dtype=torch.float64)
    shared, own = linked(link, torch.ones_like(link), torch.tensor(1.0, dtype=torch.float64))
    lengths = torch.full((sources,), 0.5, dtype=torch.float64)
    return Belief(lengths, lengths, shared, own, torch.full((len(shared),), noise, dtype=torch.float64), offset)


# --- the kernel --------------------------------------------------------------------------------------------------


@given(st.integers(2, 17), st.integers(0, 1000), st.floats(0.1, 4.0))
def test_the_kernel_is_the_formula(sources: int, seed: int, power: float) -> None:
    belief = belief_of(sources, seed, power=power)
    x = simplex(5, sources, seed)
    size = torch.from_numpy(np.random.default_rng(seed).integers(0, 3, 5))
    points = Points(x, size)
    found = belief.covariance(points, points).numpy()
    lengths, own = belief.lengths_M.numpy(), belief.own_lengths_M.numpy()
    want = oracle.truncated(list(x.numpy()), SIZES[size].tolist(), lengths, own, power, 0.7)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-10)
    assert np.linalg.eigvalsh(found).min() > -1e-10


def test_the_largest_size_has_the_unbiased_kernel_alone() -> None:
    belief = belief_of(4)
    x = simplex(5, 4, 1)
    top = Points(x, torch.full((5,), 2))
    want = [[0.7 * oracle.matern(a, b, belief.lengths_M.numpy()) for b in x.numpy()] for a in x.numpy()]
    np.testing.assert_allclose(belief.covariance(top, top).numpy(), want, atol=1e-12)


@given(st.floats(-1, 1), st.floats(-1, 1), st.floats(0.2, 5.0), st.integers(0, 100))
def test_linked_sizes_correlate_as_their_links_say(one: float, two: float, gain: float, seed: int) -> None:
    link = torch.tensor([one, two, 1.0], dtype=torch.float64)
    shared, own = linked(link, torch.tensor([gain, 1.0, 1.0], dtype=torch.float64), torch.tensor(2.0).double())
    belief = Belief(torch.ones(3).double(), torch.ones(3).double(), shared, own, 0.0, 0.0)
    x = simplex(4, 3, seed)
    points = Points(x.repeat(3, 1), torch.arange(3).repeat_interleave(4))
    matrix = belief.covariance(points, points).numpy()
    assert np.linalg.eigvalsh(matrix).min() > -1e-9
    for size, want in enumerate((one, two)):
        low, top = matrix[4 * size, 4 * size], matrix[8, 8]
        assert matrix[4 * size, 8] / math.sqrt(low * top) == pytest.approx(want, abs=1e-9)
    assert matrix[0, 0] == pytest.approx(2 * gain**2)


def test_the_kernel_is_botorchs() -> None:
    pytest.importorskip("botorch", reason="needs the extra mix")
    x, size, value = simplex(14, 3, 5), torch.arange(14) % 3, torch.from_numpy(np.random.default_rng(5).normal(size=14))
    runs = Points(x, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BoTorch warns of inputs that are not scaled to the unit cube
        belief = fit_botorch(runs, value, SIZES, offset=0.0, apart=False)
        from botorch.models.kernels import LinearTruncatedFidelityKernel

        kernel = LinearTruncatedFidelityKernel(fidelity_dims=[3], dimension=4, nu=2.5).double()
        kernel.covar_module_unbiased.lengthscale = belief.lengths_M
        kernel.covar_module_biased.lengthscale = belief.own_lengths_M
        variance = float(belief.shared_SS[0, 0])
        ratio = float(belief.own_SS[1, 1] / variance) / (1 - 0.06) ** 2
        kernel.power = torch.tensor(math.log(ratio) / math.log(1 + 0.06**2)).double()
        want = variance * kernel(torch.cat([x, SIZES[size][:, None]], 1)).to_dense().detach()
    np.testing.assert_allclose(belief.covariance(runs, runs).numpy(), want.numpy(), atol=1e-8)


# --- the posterior -----------------------------------------------------------------------------------------------


def test_the_posterior_is_that_of_the_whole_matrix() -> None:
    belief = belief_of(4, 3)
    runs = Points(simplex(12, 4, 2), torch.arange(12) % 3)
    value = torch.from_numpy(np.random.default_rng(2).normal(size=12))
    at = Points(simplex(6, 4, 9), torch.full((6,), 1))
    posterior = Posterior(belief, runs, value)
    top = Points(at.x_NM, torch.full((6,), 2))
    both = at.join(top)
    mean, cov = oracle.posterior(
        belief.covariance(runs, runs).numpy(),
        belief.covariance(both, runs).numpy(),
        belief.covariance(both, both).numpy(),
        value.numpy(),
        float(belief.noise_S[0]),
    )
    np.testing.assert_allclose(posterior.mean(both).numpy(), mean, atol=1e-10)
    np.testing.assert_allclose(posterior.spread(both, both).numpy(), cov, atol=1e-10)
    own, above, shared = posterior.pairs(at, 2)
    np.testing.assert_allclose(own.numpy(), np.diag(cov)[:6], atol=1e-10)
    np.testing.assert_allclose(above.numpy(), np.diag(cov)[6:], atol=1e-10)
    np.testing.assert_allclose(shared.numpy(), np.diag(cov[:6, 6:]), atol=1e-10)
    np.testing.assert_allclose(posterior.variance(at).numpy(), own.numpy(), atol=1e-12)


def test_levels_of_sizes_are_learnt_and_do_not_widen_the_spread() -> None:
    runs = Points(simplex(20, 3, 1), torch.arange(20) % 2)
    value = torch.where(runs.size_N == 0, 4.0, -3.0).double()
    belief = link_belief([0.8], 3, offset=10.0)
    posterior = Posterior(belief, runs, value)
    at = simplex(5, 3, 8)
    for size, level in ((0, 4.0), (1, -3.0)):
        points = Points(at, torch.full((5,), size))
        np.testing.assert_allclose(posterior.mean(points).numpy(), level, atol=0.1)
        assert float(posterior.variance(points).max()) <= 1 + 1e-9


def test_a_pending_run_keeps_means_and_shrinks_the_spread() -> None:
    belief = belief_of(3, 4)
    posterior = Posterior(belief, Points(simplex(8, 3, 0), torch.full((8,), 0)), torch.randn(8).double())
    pending, at = Points(simplex(2, 3, 5), torch.full((2,), 2)), Points(simplex(30, 3, 6), torch.full((30,), 2))
    after = posterior.expecting(pending)
    np.testing.assert_allclose(after.mean(at).numpy(), posterior.mean(at).numpy(), atol=1e-8)
    assert bool((after.variance(at) <= posterior.variance(at) + 1e-10).all())
    assert float(after.variance(pending).max()) < float(belief.noise_S.min())
    assert posterior.expecting(Points(pending.x_NM[:0], pending.size_N[:0])) is posterior


def test_duplicates_do_not_break_the_factor() -> None:
    belief = belief_of(3, noise=0.0)
    x = simplex(3, 3, 0).repeat(5, 1)
    runs = Points(x, torch.full((15,), 2))
    matrix = belief.covariance(runs, runs)
    assert torch.linalg.cholesky_ex(matrix)[1] > 0
    lower = factor(matrix)
    np.testing.assert_allclose((lower @ lower.T).numpy(), matrix.numpy(), atol=1e-3)
    posterior = Posterior(belief, runs, torch.tensor([0.3, -1.0, 0.5]).double().repeat(5))
    np.testing.assert_allclose(posterior.mean(runs).numpy()[:3], [0.3, -1.0, 0.5], atol=1e-2)


def test_a_matrix_that_is_no_covariance_is_refused() -> None:
    with pytest.raises(Unfit, match="not positive"):
        factor(-torch.eye(3, dtype=torch.float64))
    with pytest.raises(Unfit):
        factor(torch.full((2, 2), math.nan, dtype=torch.float64))


@pytest.mark.parametrize(("link", "low", "high"), [(1.0, 0.99, 1.0), (0.0, -0.2, 0.2), (-1.0, -1.0, -0.99)])
def test_agreement_is_the_link_before_anything_is_known(link: float, low: float, high: float) -> None:
    belief = link_belief([link], 3, noise=1e-6)
    far = Points(simplex(1, 3, 0) * 1e6, torch.tensor([1]))
    found, _ = agreement(Posterior(belief, far, of(0.0)), simplex(60, 3, 1), 0, 1, seed=0)
    assert low <= found <= high


@pytest.mark.parametrize("noise", [0.1, 1.0, 30.0])
def test_noise_takes_from_agreement_what_it_takes_from_a_correlation(noise: float) -> None:
    belief = link_belief([1.0], 3, noise=noise)
    far = Points(simplex(1, 3, 0) * 1e6, torch.tensor([1]))
    x = simplex(200, 3, 1)
    posterior = Posterior(belief, far, of(0.0))
    draws = posterior.draws(Points(x, torch.ones(200, dtype=torch.long)), 400, torch.Generator().manual_seed(1))
    signal = float(draws.var(1).mean())
    found, _ = agreement(posterior, x, 0, 1, seed=0)
    assert found == pytest.approx((signal / (signal + noise)) ** 0.5, abs=0.05)


# --- what a run is worth -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [-1.0, 0.0, 0.7, 2.0])
def test_an_exact_result_at_the_largest_size_is_the_classic_entropy_search(gap: float) -> None:
    found = float(information(of(gap), of(1.0)))
    density = math.exp(-gap * gap / 2) / math.sqrt(2 * math.pi)
    below = 0.5 * math.erfc(-gap / math.sqrt(2))
    assert found == pytest.approx(0.5 * gap * density / below - math.log(below), rel=1e-9)
    sampled = oracle.entropy_of_normal() - oracle.left_by_sampling(gap, 100_000, np.random.default_rng(0))
    assert sampled == pytest.approx(found, rel=0.02)


@given(st.floats(-3, 4), st.floats(0.05, 0.98))
@pytest.mark.slow
def test_information_is_the_entropy_that_goes(gap: float, link: float) -> None:
    want = oracle.entropy_of_normal() - oracle.left_by_summing(gap, link)
    assert float(information(of(gap), of(link))) == pytest.approx(want, abs=2e-5, rel=2e-3)


@pytest.mark.parametrize(("gap", "link"), [(0.5, 0.9), (-2.0, 0.5), (3.0, 0.97)])
def test_information_at_some_places(gap: float, link: float) -> None:
    want = oracle.entropy_of_normal() - oracle.left_by_summing(gap, link, nodes=1001)
    assert float(information(of(gap), of(link))) == pytest.approx(want, abs=2e-5, rel=2e-3)


@given(st.floats(-30, 30), st.floats(-1, 1))
def test_information_is_never_negative_and_grows_with_the_link(gap: float, link: float) -> None:
    found = float(information(of(gap), of(link)))
    assert math.isfinite(found)
    assert 0 <= found <= float(information(of(gap), of(1.0))) + 1e-6 * (1 + found)


def test_a_size_that_does_not_correlate_says_nothing() -> None:
    belief = link_belief([0.0], 3)
    posterior = Posterior(belief, Points(simplex(6, 3, 0), torch.arange(6) % 2), torch.randn(6).double())
    own, above, both = posterior.pairs(Points(simplex(10, 3, 3), torch.zeros(10, dtype=torch.long)), 1)
    link = both / (above * (own + belief.noise_S[0])).sqrt()
    assert float(information(torch.full((10,), 1.0).double(), link).max()) < 1e-12


def test_the_best_value_of_one_candidate_is_normal_and_of_many_is_above_all_means() -> None:
    rng = torch.Generator().manual_seed(0)
    mean, sd = torch.linspace(-1, 1, 200).double(), torch.full((200,), 0.3).double()
    found = maxima(mean, sd, 4000, rng)
    assert float(found.min()) >= 1.0
    drawn = (mean + sd * torch.randn(4000, 200, generator=rng).double()).max(1).values
    assert float(found.median()) == pytest.approx(float(drawn.median()), abs=0.03)
    assert float(found.std()) == pytest.approx(float(drawn.std()), rel=0.15)


@pytest.mark.parametrize("z", [-8.0, -3.0, -1.0, -0.3, 0.0, 2.0])
def test_the_log_of_expected_improvement(z: float) -> None:
    want = oracle.improvement(mean=1.0 + 0.5 * z, sd=0.5, best=1.0)
    assert float(log_improvement(of(1.0 + 0.5 * z), of(0.5), 1.0)) == pytest.approx(math.log(want), abs=1e-5)


def test_the_log_of_expected_improvement_falls_without_a_jump_where_it_would_underflow() -> None:
    z = torch.linspace(-2000, -1, 200_001, dtype=torch.float64)
    steps = log_improvement(z, torch.ones_like(z), 0.0).diff()
    slope = -z[1:] * 0.009995
    assert bool((steps > 0).all())
    assert float((steps - slope).abs().max()) < 0.02


def test_expected_improvement_is_botorchs() -> None:
    pytest.importorskip("botorch", reason="needs the extra mix")
    from botorch.acquisition.analytic import _log_ei_helper

    z = torch.tensor([-900.0, -30.0, -2.0, -1.0, 0.0, 3.0], dtype=torch.float64)
    np.testing.assert_allclose(
        log_improvement(z, torch.ones_like(z), 0.0).numpy(), _log_ei_helper(z).numpy(), rtol=1e-6
    )


# --- learning ----------------------------------------------------------------------------------------------------


def two_sizes(rows: int, link: float, seed: int) -> tuple[Points, torch.Tensor]:
    """Draws of the linked kernel itself."""
    runs = Points(simplex(rows, 3, seed).sqrt(), torch.arange(rows) % 2)
    belief = link_belief([link], 3, noise=1e-3)
    lower = factor(belief.covariance(runs, runs) + 1e-3 * torch.eye(rows).double())
    return runs, lower @ torch.randn(rows, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize(("link", "low", "high"), [(0.97, 0.6, 1.0), (0.0, -0.2, 0.2), (-0.9, -1.0, -0.3)])
def test_a_link_is_learnt(link: float, low: float, high: float) -> None:
    """The mean over four draws: 80 runs tell it within 0.4 or so."""
    found = []
    for seed in (3, 4, 5, 6):
        runs, value = two_sizes(80, link, seed)
        belief = fit(runs, value, torch.tensor([0.1, 1.0]).double(), "linked", offset=1.0, apart=True)
        small = belief.paired(torch.tensor([0]), torch.tensor([0]))[0]
        found.append(float(belief.shared_SS[0, 1] / (belief.shared_SS[1, 1] * small).sqrt()))
    assert low < float(np.mean(found)) < high


@pytest.mark.parametrize("kernel", ["linked", "truncated"])
def test_a_fit_predicts_what_it_has_not_seen(kernel: str) -> None:
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.dirichlet(np.ones(3), size=40))
    value = -((x - torch.tensor([0.5, 0.3, 0.2])) ** 2).sum(1) * 8
    runs = Points(x.sqrt(), torch.arange(40) % 2)
    belief = fit(runs[:30], value[:30], torch.tensor([0.1, 1.0]).double(), kernel, offset=1.0, apart=True)  # type: ignore[arg-type]
    assert float(belief.noise_S.min()) >= LEAST_NOISE
    top = Points(runs.x_NM[30:], torch.ones(10, dtype=torch.long))
    error = Posterior(belief, runs[:30], value[:30]).mean(top) - value[30:]
    assert float(error.abs().max()) < 0.3


def test_our_fit_and_botorchs_predict_alike() -> None:
    pytest.importorskip("botorch", reason="needs the extra mix")
    x = simplex(30, 3, 2)
    value = torch.sin(4 * x[:, 0]) - x[:, 1] ** 2
    value = (value - value.mean()) / value.std()
    runs, sizes = Points(x, torch.arange(30) % 2), torch.tensor([0.1, 1.0]).double()
    at = Points(simplex(20, 3, 7), torch.ones(20, dtype=torch.long))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = Posterior(fit_botorch(runs, value, sizes, offset=1.0, apart=False), runs, value).mean(at)
    ours = Posterior(fit(runs, value, sizes, "truncated", offset=1.0, apart=False), runs, value).mean(at)
    assert float((ours - theirs).abs().max()) < 0.1


def test_results_that_are_not_finite_are_refused() -> None:
    runs = Points(simplex(6, 3, 0), torch.zeros(6, dtype=torch.long))
    with pytest.raises(Unfit):
        fit(runs, torch.full((6,), math.nan).double(), torch.tensor([1.0]).double(), "linked", offset=1.0, apart=True)
