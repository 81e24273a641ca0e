"""Which tokens may be drawn, and how often."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core.errors import UsageError
from lmworks.generate.sampling import Sampling, candidates, choose

LOGITS = torch.tensor([[0.0, 3.0, 1.0, 2.0, -5.0]])


def allowed(sampling: Sampling, logits_BV: torch.Tensor) -> dict[int, float]:
    weights_BK, tokens_BK = candidates(logits_BV, sampling)
    pairs = zip(tokens_BK[0].tolist(), weights_BK[0].tolist(), strict=True)
    return {token: weight for token, weight in pairs if weight > 0}


def test_temperature_zero_is_argmax() -> None:
    assert choose(LOGITS, Sampling(temperature=0), []) == [1]


def test_top_k_keeps_the_k_likeliest() -> None:
    assert set(allowed(Sampling(temperature=1, top_k=2), LOGITS)) == {1, 3}
    assert len(allowed(Sampling(temperature=1, top_k=99), LOGITS)) == 5


def test_top_p_keeps_the_fewest_that_reach_p() -> None:
    probabilities = LOGITS.softmax(-1)[0]  # .64 .24 .09 .03 0
    assert set(allowed(Sampling(temperature=1, top_p=0.6), LOGITS)) == {1}
    assert set(allowed(Sampling(temperature=1, top_p=0.7), LOGITS)) == {1, 3}
    kept = allowed(Sampling(temperature=1, top_p=0.7), LOGITS)
    assert kept[1] == pytest.approx(float(probabilities[1] / (probabilities[1] + probabilities[3])))


@given(
    st.lists(st.floats(-20, 20), min_size=2, max_size=30),
    st.floats(0.05, 3),
    st.integers(0, 40),
    st.floats(0.05, 1),
)
def test_against_a_slow_reading_of_the_definition(
    logits: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    wide = torch.tensor(logits, dtype=torch.float32) / temperature
    order = sorted(range(len(logits)), key=lambda i: -float(wide[i]))[: top_k or None]
    shares = wide[order].double().softmax(0).tolist()
    found = allowed(Sampling(temperature=temperature, top_k=top_k, top_p=top_p), torch.tensor([logits]))
    kept = shares[: len(found)]
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    assert sorted(found.values(), reverse=True) == pytest.approx([share / sum(kept) for share in kept], abs=1e-5)
    assert sum(kept) >= top_p - 1e-5  # enough
    assert sum(kept[:-1]) < top_p + 1e-5  # and not one more than enough


def test_draws_follow_the_probabilities() -> None:
    generators = Sampling(seed=5).generators(1)
    draws = [choose(LOGITS, Sampling(temperature=1), generators)[0] for _ in range(4000)]
    expected = LOGITS.softmax(-1)[0]
    for token in range(5):
        share = draws.count(token) / len(draws)
        assert abs(share - float(expected[token])) < 4 * (float(expected[token]) / 4000) ** 0.5 + 1e-3


@pytest.mark.parametrize(
    "settings", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"seed": -1}]
)
def test_settings_outside_their_range_are_refused_by_name(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        Sampling(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(temperature: float) -> None:
    bad = torch.full((1, 4), torch.nan)
    sampling = Sampling(temperature=temperature)
    with pytest.raises(UsageError, match="not finite"):
        choose(bad, sampling, sampling.generators(1))
