"""The table of runs: order, hold-out, failures, the ledger."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from lmworks.core.errors import UsageError
from lmworks.mix.learn import learn
from lmworks.mix.runs import Run, RunTable, Trial
from tests.mix.planted import SIZE, problem, table


def test_the_order_of_telling_changes_nothing() -> None:
    runs = list(table(problem(3), 12, unseen=3))
    again = [*itertools.islice(runs, 1, None, 2), *itertools.islice(runs, 0, None, 2)]
    assert again != runs
    assert list(RunTable(problem(3), again)) == runs
    a, b = (learn(RunTable(problem(3), told), SIZE, surrogate="ols") for told in (runs, again))
    assert (a.mixtures == b.mixtures).all()


def test_a_second_run_of_a_trial_replaces_the_first() -> None:
    of = problem(2)
    trial = Trial(mixture=(0.5, 0.5), fidelity=SIZE)
    found = RunTable(of, [Run(trial=trial, failed="lost"), Run(trial=trial, losses={"s0": 1.0})])
    assert len(found) == 1
    assert found.excluded() == {}
    assert found.has(trial)


def test_held_out_runs_are_not_learnt_from() -> None:
    runs = table(problem(3), 12, unseen=4)
    assert len(runs.to_learn(SIZE)) == 12
    judge = runs.to_judge(SIZE)
    assert judge.held_out
    assert len(judge) == 4
    verify = Trial(mixture=(1.0, 0.0, 0.0), fidelity=SIZE, purpose="verify")
    runs.tell(Run(trial=verify, losses={"s0": 0.0}))
    assert len(runs.to_learn(SIZE)) == 12


def test_failed_and_missing_runs_are_counted_and_paid_for() -> None:
    runs = table(problem(3), 12)
    one = Trial(mixture=(0.2, 0.3, 0.5), fidelity=SIZE)
    runs.tell(Run(trial=one, failed="loss is nan", cost=0.1))
    runs.tell(Run(trial=dataclasses.replace(one, seed=7), losses={"s1": 1.0}, cost=0.1))
    runs.tell(Run(trial=dataclasses.replace(one, seed=8), losses={"s0": float("nan")}, cost=0.1))
    assert runs.excluded() == {"loss is nan": 1, "no loss of the target": 2}
    assert len(runs.to_learn(SIZE)) == 12
    assert runs.spent() == pytest.approx(1.5)
    assert runs.ledger() == [
        {"fidelity": SIZE, "purpose": "proxy", "runs": 15, "failed": 1, "cost": pytest.approx(1.5), "seconds": 12.0}
    ]


def test_what_is_no_run_of_the_problem_is_refused() -> None:
    runs = RunTable(problem(2))
    with pytest.raises(UsageError, match=r"2 shares that sum to 1\.5"):
        runs.tell(Run(trial=Trial(mixture=(1.0, 0.5), fidelity=SIZE)))
    with pytest.raises(UsageError, match="did you mean 'proxy'"):
        runs.tell(Run(trial=Trial(mixture=(0.5, 0.5), fidelity="proxi")))


def test_two_tokenizers_do_not_mix() -> None:
    runs = RunTable(problem(2), [Run(trial=Trial(mixture=(0.5, 0.5), fidelity=SIZE), tokenizer="aaaa")])
    with pytest.raises(UsageError, match="tokenizers bbbb and aaaa"):
        runs.tell(Run(trial=Trial(mixture=(0.1, 0.9), fidelity="target"), tokenizer="bbbb"))


def test_json_and_back() -> None:
    for run in table(problem(3), 2, unseen=1):
        assert Run.from_json(run.to_json()) == run
