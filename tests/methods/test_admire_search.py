"""ADMIRE-BayesOpt as a search: what it asks for, what it recommends, when it stops, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from lmworks.core.errors import LmworksError, UsageError
from lmworks.methods.admire_bayesopt import AdmireBayesOpt
from lmworks.methods.admire_bayesopt import learn as learning
from lmworks.methods.admire_bayesopt.evidence import gather
from lmworks.methods.admire_bayesopt.posterior import Unfit
from lmworks.methods.admire_bayesopt.rounds import Round
from lmworks.mix.problem import Fidelity, Mixture, MixtureProblem, Source
from lmworks.mix.runs import Run, RunTable, Trial

BEST = np.array([0.5, 0.3, 0.2])
CHEAP = 0.1
GRID = [(i / 20, j / 20, 1 - i / 20 - j / 20) for i in range(21) for j in range(21 - i)]
GRID_POOL = [
    Trial(mixture=(a, b, max(0.0, 1 - a - b)), fidelity=size) for size in ("small", "target") for a, b, c in GRID
]
Landscape = Callable[[np.ndarray, bool], float]


def problem_of(cheap: float = CHEAP, *, times: float = 1.0, sources: int = 3) -> MixtureProblem:
    return MixtureProblem(
        sources=tuple(Source(name=f"s{i}", tokens=1000) for i in range(sources)),
        target={"loss": 1.0},
        fidelities=(Fidelity(name="small", cost=cheap * times), Fidelity(name="target", cost=times)),
    )


def alike(p: np.ndarray, large: bool) -> float:
    """Both sizes have the same best mixture; the small one has a bias and a level of its own."""
    return float(((p - BEST) ** 2).sum()) + (1.0 if large else 3.0 + 0.3 * float(p[0]))


def unlike(seed: int) -> Landscape:
    """What the small size gives has nothing to do with the large one."""

    def value(p: np.ndarray, large: bool) -> float:
        if large:
            return 1.0 + float(((p - BEST) ** 2).sum())
        return 3.0 + float(np.random.default_rng([seed, *(p * 1e4).round().astype(int)]).normal() * 0.3)

    return value


def run_of(trial: Trial, problem: MixtureProblem, landscape: Landscape) -> Run:
    value = landscape(np.array(trial.mixture), trial.fidelity == "target")
    return Run(trial=trial, losses={"loss": value}, cost=problem.fidelity(trial.fidelity).cost)


def searched(
    part: AdmireBayesOpt,
    landscape: Landscape,
    *,
    seed: int = 0,
    problem: MixtureProblem | None = None,
    pool: Sequence[Trial] | None = None,
    steps: int = 200,
) -> RunTable:
    problem = problem or problem_of()
    table = RunTable(problem)
    for _ in range(steps):
        asked = part.ask(problem, table, seed=seed, count=1, pool=pool)
        if not asked:
            break
        table.tell(run_of(asked[0], problem, landscape))
    return table


def regret(mixture: Mixture) -> float:
    return float(((np.array(mixture) - BEST) ** 2).sum())


FEW = AdmireBayesOpt(budget=2.0, candidates=64)


# --- ask and tell ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_same_seed_asks_the_same_and_goes_on_from_a_saved_table() -> None:
    whole = searched(FEW, alike, seed=3)
    again = searched(FEW, alike, seed=3)
    assert [run.trial for run in whole] == [run.trial for run in again]
    assert [run.trial for run in whole] != [run.trial for run in searched(FEW, alike, seed=4)]
    problem, early = problem_of(), searched(FEW, alike, seed=3, steps=6)
    saved = RunTable(problem, [Run.from_json(run.to_json()) for run in early])
    while asked := FEW.ask(problem, saved, seed=3, count=1):
        saved.tell(run_of(asked[0], problem, alike))
    assert [run.to_json() for run in saved] == [run.to_json() for run in whole]
    assert FEW.recommend(problem, saved, seed=3) == FEW.recommend(problem, whole, seed=3)


@pytest.mark.slow
def test_the_order_in_which_runs_came_back_changes_nothing() -> None:
    problem, table = problem_of(), searched(FEW, alike, steps=8)
    runs = list(table)
    turned = RunTable(problem, [runs[i] for i in np.random.default_rng(0).permutation(len(runs))])
    assert FEW.ask(problem, turned, seed=0, count=2) == FEW.ask(problem, table, seed=0, count=2)
    assert FEW.recommend(problem, turned, seed=0) == FEW.recommend(problem, table, seed=0)


@pytest.mark.slow
def test_costs_ten_times_as_high_change_no_choice() -> None:
    ten = problem_of(times=10.0)
    cheap, dear = searched(FEW, alike), searched(FEW, alike, problem=ten)
    assert [run.trial for run in cheap] == [run.trial for run in dear]
    assert dear.spent() == pytest.approx(10 * cheap.spent())


@pytest.mark.slow
def test_runs_that_are_under_way_are_counted_on() -> None:
    problem, table = problem_of(), searched(FEW, alike, steps=8)
    asked = FEW.ask(problem, table, seed=0, count=3)
    assert len({trial.key for trial in asked}) == 3
    assert FEW.ask(problem, table, seed=0, count=2, pending=asked[:1]) == asked[1:]
    apart = [max(abs(a - b) for a, b in zip(asked[0].mixture, other.mixture, strict=True)) for other in asked[1:]]
    assert min(apart) > 0.01 or asked[0].fidelity != asked[1].fidelity
    assert dataclasses.replace(FEW, together=3).at_once() == 3


@pytest.mark.slow
def test_no_run_is_asked_for_twice_and_a_pool_is_kept_to() -> None:
    pool = GRID_POOL[::9]
    part = dataclasses.replace(FEW, budget=1000.0)
    table = searched(part, alike, pool=pool)
    assert len(table) == len(pool)
    assert {run.trial for run in table} == set(pool)


@pytest.mark.slow
def test_the_budget_holds_and_failed_runs_are_paid() -> None:
    problem, table = problem_of(), RunTable(problem_of())
    asked_twice = set()
    while asked := FEW.ask(problem, table, seed=0, count=1):
        (trial,) = asked
        assert trial.key not in asked_twice
        asked_twice.add(trial.key)
        bad = len(table) % 3 == 1
        cost = problem.fidelity(trial.fidelity).cost
        run = run_of(trial, problem, alike)
        table.tell(Run(trial=trial, losses={"loss": math.nan}, cost=cost) if bad else run)
    assert 2.0 - CHEAP < table.spent() <= 2.0 + 1e-9
    told = FEW.recommend(problem, table, seed=0)
    assert any("left out" in warning for warning in told.warnings)
    assert regret(told.mixture) < 0.2


@pytest.mark.slow
def test_a_large_run_is_due_after_so_many_or_so_dear_small_ones() -> None:
    part = dataclasses.replace(FEW, budget=4.0, large_after=5, large_every=None)
    table = searched(part, alike, problem=problem_of(cheap=0.01), steps=18)
    large = sum(run.trial.fidelity == "target" for run in table)
    assert large >= 2
    dear = dataclasses.replace(FEW, budget=4.0, large_after=None, large_every=0.3)
    table = searched(dear, alike, steps=12)
    small = sum(run.cost for run in table if run.trial.fidelity == "small")
    assert small <= 0.3 * (1 + sum(run.trial.fidelity == "target" for run in table)) + CHEAP


@pytest.mark.slow
def test_large_runs_alone_with_expected_improvement() -> None:
    table = searched(dataclasses.replace(FEW, by="improvement", budget=12.0), alike)
    assert {run.trial.fidelity for run in table} == {"target"}
    assert len(table) == 12
    assert regret(FEW.recommend(problem_of(), table, seed=0).mixture) < 0.02


# --- what is recommended -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_recommendation_says_what_is_expected_and_how_sure_that_is() -> None:
    part = dataclasses.replace(FEW, budget=5.0, candidates=300)
    problem, table = problem_of(), searched(dataclasses.replace(FEW, budget=5.0), alike)
    told = part.recommend(problem, table, seed=0)
    assert problem.why_not(told.mixture) is None
    assert told.predicted is not None
    assert told.sd is not None
    assert abs(told.predicted - alike(np.array(told.mixture), True)) < max(0.02, 3 * told.sd)
    assert told.gain is not None
    natural = alike(np.full(3, 1 / 3), True) - alike(np.array(told.mixture), True)
    assert told.gain[0] == pytest.approx(natural, abs=0.03)
    assert all(low <= high for low, high in told.spread)
    assert not told.verified
    assert told.facts["spent"] == pytest.approx(table.spent())
    trial = Trial(mixture=told.mixture, fidelity="target", purpose="verify", label="chosen")
    table.tell(run_of(trial, problem, alike))
    after = part.recommend(problem, table, seed=0)
    if after.mixture == told.mixture:
        assert after.verified


@pytest.mark.slow
def test_bounds_are_kept() -> None:
    problem = dataclasses.replace(problem_of(), bounds={"s0": (0.0, 0.2), "s2": (0.25, 1.0)})
    table = searched(dataclasses.replace(FEW, budget=3.0), alike, problem=problem)
    assert all(problem.why_not(run.trial.mixture) is None for run in table)
    told = FEW.recommend(problem, table, seed=0)
    assert problem.why_not(told.mixture) is None
    assert any("upper bound: s0" in warning for warning in told.warnings)


def test_without_a_large_run_nothing_is_predicted() -> None:
    table = searched(FEW, alike, steps=4)
    assert not any(run.trial.fidelity == "target" for run in table)
    told = FEW.recommend(problem_of(), table, seed=0)
    assert told.predicted is None
    assert any("no run of 'target' at all" in warning for warning in told.warnings)


@pytest.mark.slow
def test_a_size_that_does_not_agree_is_dropped_and_said_so() -> None:
    part = dataclasses.replace(FEW, budget=14.0, candidates=200, least_agreement=0.6)
    problem, table = problem_of(), searched(dataclasses.replace(part, large_after=1), unlike(0), steps=30)
    told = part.recommend(problem, table, seed=0)
    assert any(warning.startswith("drop the size 'small'") for warning in told.warnings)
    assert all(one.fidelity == "target" for one in part.ask(problem, table, seed=0, count=2))


# --- when it stops -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_stops_when_one_more_run_gains_too_little() -> None:
    part = dataclasses.replace(FEW, budget=60.0, by="improvement", least_gain=0.06)
    table = searched(part, alike, steps=30)
    assert 4 <= len(table) < 30
    told = part.recommend(problem_of(), table, seed=0)
    assert "expected to gain" in told.facts["stopped"]
    assert dataclasses.replace(part, least_gain=0.0).ask(problem_of(), table, seed=0, count=1)


def test_mixtures_that_cannot_be_told_apart_end_the_search() -> None:
    def flat(p: np.ndarray, large: bool) -> float:
        return 3.0 + 0.001 * float(np.random.default_rng((p * 1e6).astype(int)).normal())

    part = dataclasses.replace(FEW, by="improvement", budget=50.0, noise=0.01)
    table = searched(part, flat)
    assert len(table) == 4
    told = part.recommend(problem_of(), table, seed=0)
    assert told.rule.startswith("the natural mixture")
    assert "differ by" in told.warnings[0]
    equal = searched(part, lambda p, large: 3.0)
    assert "are equal" in part.recommend(problem_of(), equal, seed=0).warnings[0]


def test_noise_is_told_by_runs_of_one_mixture() -> None:
    problem, table = problem_of(), RunTable(problem_of())
    for seed, value in enumerate((1.0, 1.2, 1.4)):
        trial = Trial(mixture=(0.2, 0.3, 0.5), fidelity="target", seed=seed, purpose="noise")
        table.tell(Run(trial=trial, losses={"loss": value}, cost=1.0))
    table.tell(Run(trial=Trial(mixture=(0.5, 0.3, 0.2), fidelity="target"), losses={"loss": 1.1}, cost=1.0))
    part = dataclasses.replace(FEW, budget=20.0, starts=1)
    assert part.ask(problem, table, seed=0, count=1) == []
    assert "seeds alone by 0.2" in part.recommend(problem, table, seed=0).warnings[0]


# --- bad input ---------------------------------------------------------------------------------------------------


def test_scores_in_two_units_are_refused() -> None:
    problem = problem_of()
    table = RunTable(problem)
    for i, value in enumerate((0.41, 0.52, 0.47, 44.0, 51.0)):
        trial = Trial(mixture=(i / 10, 0.3, 0.7 - i / 10), fidelity="small" if i < 3 else "target")
        table.tell(Run(trial=trial, losses={"loss": value}, cost=0.1))
    with pytest.raises(LmworksError, match="some are fractions, others per cent") as error:
        FEW.ask(problem, table, seed=0, count=1)
    assert error.value.next_step is not None


def test_losses_that_differ_much_are_no_two_units() -> None:
    problem = problem_of()
    table = RunTable(problem)
    for i, value in enumerate((7.1, 6.8, 2.9, 0.9)):
        trial = Trial(mixture=(i / 10, 0.3, 0.7 - i / 10), fidelity="small" if i < 2 else "target")
        table.tell(Run(trial=trial, losses={"loss": value}, cost=0.1))
    assert len(gather(problem, table, inputs="root", standardise="size")) == 4


@pytest.mark.parametrize("costs", [(1.0, 0.1), (0.5, 0.5), (0.0, 1.0), (math.nan, 1.0)])
def test_costs_that_do_not_rise_are_refused(costs: tuple[float, float]) -> None:
    with pytest.raises(UsageError, match="cost"):
        MixtureProblem(
            sources=(Source(name="a"), Source(name="b")),
            target={"loss": 1.0},
            fidelities=tuple(Fidelity(name=str(i), cost=cost) for i, cost in enumerate(costs)),
        )


def test_a_pool_off_the_simplex_or_over_a_bound_is_refused_with_the_nearest() -> None:
    problem = dataclasses.replace(problem_of(), bounds={"s0": (0.0, 0.3)})
    for mixture in ((0.5, 0.3, 0.2), (0.2, 0.2, 0.2)):
        with pytest.raises(UsageError) as error:
            FEW.ask(problem, RunTable(problem), seed=0, count=1, pool=[Trial(mixture=mixture, fidelity="target")])
        assert "the nearest that is" in str(error.value)


def test_nothing_learnt_is_said() -> None:
    with pytest.raises(LmworksError, match="0 runs tell too little"):
        FEW.recommend(problem_of(), RunTable(problem_of()), seed=0)


@pytest.mark.slow
def test_a_failed_fit_falls_back_and_the_search_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_fit(*_: object, **__: object) -> None:
        raise Unfit("planted")

    monkeypatch.setattr(learning, "fit", no_fit)
    part = dataclasses.replace(FEW, by="improvement", budget=8.0, candidates=64)
    problem, table = problem_of(), searched(part, alike)
    assert len(table) == 8
    told = part.recommend(problem, table, seed=0)
    assert "log-linear" in told.rule
    assert any("planted" in warning for warning in told.warnings)
    assert told.predicted is not None
    mixed = searched(FEW, alike)
    assert mixed.spent() > 1.8


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ({"engine": "botorch"}, "engine"),
        ({"standardise": "all"}, "standardise"),
        ({"by": "improvement", "large_after": 3}, "large_after"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, object], path: str) -> None:
    part = dataclasses.replace(FEW, **settings)  # type: ignore[arg-type]
    assert [problem.path for problem in part.check(None)] == [path]
    assert not list(FEW.check(None))


# --- does it pay -------------------------------------------------------------------------------------------------


def first_good(part: AdmireBayesOpt, landscape: Landscape, seed: int, *, below: float = 0.02) -> tuple[float, float]:
    """Cost, and cost of small runs, when the recommendation's regret is below a bound and stays there for a run."""
    problem = problem_of()
    table = RunTable(problem)
    was = False
    for _ in range(120):
        asked = part.ask(problem, table, seed=seed, count=1, pool=GRID_POOL)
        if not asked:
            break
        table.tell(run_of(asked[0], problem, landscape))
        chosen = Round(part, problem, table, seed=seed, pool=GRID_POOL).chosen
        good = chosen is not None and regret(chosen) < below
        if good and was:
            return table.spent(), sum(run.cost for run in table if run.trial.fidelity == "small")
        was = good
    return math.inf, 0.0


@pytest.mark.slow
def test_small_runs_that_agree_save_cost() -> None:
    both = AdmireBayesOpt(budget=14.0, candidates=64)
    large = dataclasses.replace(both, by="improvement")
    wins = sum(first_good(both, alike, seed)[0] < first_good(large, alike, seed)[0] for seed in range(10))
    assert wins >= 8


@pytest.mark.slow
def test_small_runs_that_are_noise_cost_no_more_than_themselves() -> None:
    """Over twenty landscapes, as far as so many tell: a single one may be luckier or less so."""
    both = AdmireBayesOpt(budget=20.0, candidates=64)
    large = dataclasses.replace(both, by="improvement")
    spent = np.array([first_good(both, unlike(seed), seed) for seed in range(20)])
    alone = np.array([first_good(large, unlike(seed), seed)[0] for seed in range(20)])
    assert np.isfinite(spent).all(), "it settles"
    more = spent[:, 0] - spent[:, 1] - alone
    assert more.mean() <= 2 * more.std(ddof=1) / math.sqrt(len(more))
