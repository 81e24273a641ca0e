"""Rules with healthy bands: what is out of order is said once, with its batch; what is healthy is left alone."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.core import recipe as recipes
from lmworks.core.errors import RecipeError
from lmworks.core.journal import rows
from lmworks.data.load import Origin
from lmworks.data.pack import Piece
from lmworks.train import health
from lmworks.train.health import Health, Rule, band, drift, shipped
from lmworks.train.objective import CrossEntropy
from lmworks.train.probe import Probe
from lmworks.train.slots import Change, StepRecord, Watcher
from lmworks.train.step import Step
from tests.train import toy

LOSS = Rule(name="spike", metric="loss", window=32, deviations=6.0, share=0.05, after=16, quiet=10, keep_batch=True)


def probe() -> Probe:
    found = Probe(toy.model(), CrossEntropy(), seed=0)
    found.batch = toy.batch(2, 8, 61)
    return found


ORIGINS = [
    Origin("stdlib", 41, [Piece("00ff", 3, 5), Piece("0abc", 0, 3)]),
    Origin("stdlib", 42, [Piece("0abc", 3, 8)]),
]


def step(number: int, **row: float) -> StepRecord:
    told = {"loss": row.get("loss", 1.0), "grad_norm": 1.0, "lr": 1e-3, "seconds": 0.1}
    return StepRecord(step=number, tokens=0, row=row, origins=lambda: ORIGINS, **told)


def alone(*rules: Rule, **over: Any) -> Watcher:
    """A watcher with these rules and no others."""
    return Health(rules=rules, without=tuple(rule.name for rule in shipped()), **over).start()


def heard(watcher: Watcher, values: list[float], name: str = "loss") -> list[int]:
    """At which places of a metric's values there was an alert."""
    found = probe()
    changes = [watcher.look(step(i, **{name: value}), found) for i, value in enumerate(values)]
    return [i for i, change in enumerate(changes) if change is not None and change.alerts]


def falling(steps: int, seed: int) -> list[float]:
    """A loss as it is: it falls, with noise."""
    random = np.random.default_rng(seed)
    return [float(2 + 6 * math.exp(-i / 40) + 0.05 * random.standard_normal()) for i in range(steps)]


@pytest.mark.parametrize("seed", range(5))
def test_a_spike_is_told_once_and_a_falling_loss_is_healthy(seed: int) -> None:
    values = falling(200, seed)
    assert heard(alone(LOSS), values) == []
    values[120] += 3.0
    assert heard(alone(LOSS), values) == [120]
    values[121] += 3.0
    assert heard(alone(LOSS), values) == [120], "then it is quiet for a while"


def test_an_alert_names_value_band_and_documents() -> None:
    watcher, found = alone(LOSS), probe()
    for i, value in enumerate(falling(100, 0)):
        watcher.look(step(i, loss=value), found)
    change = watcher.look(step(100, loss=9.0), found)
    assert isinstance(change, Change)
    (alert,) = change.alerts
    assert not change.stop
    assert (alert["rule"], alert["value"]) == ("spike", 9.0)
    assert alert["low"] < alert["baseline"] < alert["high"] < 9.0
    assert "spike at step 100: loss is 9, healthy is up to" in change.reason
    assert alert["batch"]["drawn"] == alert["batch"]["chosen"] == 2
    assert alert["batch"]["rows"][0] == {"source": "stdlib", "row": 41, "documents": [["00ff", 3, 5], ["0abc", 0, 3]]}
    json.dumps(alert)


@given(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=40), st.floats(0, 10), st.floats(0, 1))
def test_the_band_is_that_of_median_and_median_deviation(values: list[float], deviations: float, share: float) -> None:
    found = band(dataclasses.replace(LOSS, deviations=deviations, share=share), values)
    assert found is not None
    centre = float(np.median(values))
    spread = 1.4826 * float(np.median(np.abs(np.array(values) - centre)))
    room = max(deviations * spread, share * abs(centre))
    assert found.low == pytest.approx(centre - room)
    assert found.high == pytest.approx(centre + room)


@settings(max_examples=30)
@given(st.integers(0, 1000))
def test_a_resumed_watcher_goes_on_as_the_unbroken_one(at: int) -> None:
    values = falling(80, at)
    values[60] += 4.0
    whole, first = alone(LOSS), alone(LOSS)
    cut = at % 80
    want = heard(whole, values)
    found = heard(first, values[:cut])
    second = alone(LOSS)
    second.load(json.loads(json.dumps(first.state())))
    found += [cut + i for i in heard(second, values[cut:])]
    assert found == want


def test_slower_steps_need_patience(tmp_path: Path) -> None:
    rule = next(rule for rule in shipped() if rule.name == "slower")
    random = np.random.default_rng(0)
    steady = [float(1000 * math.exp(0.05 * random.standard_normal())) for _ in range(300)]
    assert heard(alone(rule, webhook="http://localhost:9/"), steady, rule.metric) == []
    hiccup = [*steady[:100], *(400.0,) * 5, *steady[100:]]
    assert heard(alone(rule, webhook="http://localhost:9/"), hiccup, rule.metric) == []


def test_memory_that_grows_is_told_and_memory_that_jumps_about_is_not() -> None:
    rule = next(rule for rule in shipped() if rule.name == "memory-growth")
    random = np.random.default_rng(0)
    level = [1e9 * (1 + 0.1 * float(random.random())) for _ in range(900)]
    assert heard(alone(rule), level, rule.metric) == []
    leak = [value + 5e5 * i for i, value in enumerate(level)]
    found = heard(alone(rule), leak, rule.metric)
    assert found
    assert found[0] < 400
    assert all(b - a >= rule.quiet for a, b in pairwise(found))


def test_limits_both_sides_and_what_is_no_number() -> None:
    rule = Rule(name="x", metric="m", side="both", baseline="limits", low=-1.0, high=1.0, after=0, quiet=1)
    assert heard(alone(rule), [0.0, 1.0, 1.5, -1.5, 0.0, math.nan, math.inf], "m") == [2, 3, 5, 6]


def test_the_first_values_stay_the_baseline() -> None:
    first = Rule(name="x", metric="m", baseline="first", window=10, after=10, share=0.1, deviations=0.0, quiet=1)
    values = [1.0 + 0.02 * i for i in range(60)]
    assert heard(alone(first), values, "m")[0] < 20
    recent = dataclasses.replace(first, baseline="recent")
    assert 30 not in heard(alone(recent), values, "m"), "what moves slowly takes its baseline along"


def test_a_stop_ends_the_run() -> None:
    rule = dataclasses.replace(LOSS, action="stop")
    watcher, found = alone(rule), probe()
    changes = [watcher.look(step(i, loss=value), found) for i, value in enumerate([*falling(60, 0), 20.0])]
    assert changes[-1] is not None
    assert changes[-1].stop


def test_a_metric_that_never_comes_is_told_for_a_recipes_own_rule() -> None:
    watcher, found = alone(dataclasses.replace(LOSS, metric="lss")), probe()
    changes = [watcher.look(step(i, loss=1.0), found) for i in range(health.UNSEEN)]
    assert changes[-1] is not None
    assert "no step has told a 'lss'" in changes[-1].reason
    assert all(change is None for change in changes[:-1])


@given(st.lists(st.tuples(st.floats(-50, 0), st.floats(-50, 0)), max_size=20))
def test_drift_is_the_mean_distance_of_log_probabilities(pairs: list[tuple[float, float]]) -> None:
    sampler, trainer = (torch.tensor([pair[i] for pair in pairs], dtype=torch.float64) for i in range(2))
    want = sum(abs(a - b) for a, b in pairs) / len(pairs) if pairs else 0.0
    assert float(drift(sampler, trainer)) == pytest.approx(want)


def test_what_is_noted_as_sampler_drift_is_held_against_its_rule() -> None:
    watcher = Health().start()
    assert heard(watcher, [0.01] * 20 + [0.5] * 4, "sampler_drift") == [22], "the third in a row"


@pytest.mark.parametrize(
    ("over", "path", "text"),
    [
        ({"rules": [{"name": "a", "metric": "loss", "baseline": "limits"}]}, "rules.0.baseline", "needs low, high"),
        (
            {"rules": [{"name": "a", "metric": "loss", "high": 2.0}]},
            "rules.0.high",
            "no effect with baseline = 'recent'",
        ),
        (
            {"rules": [{"name": "a", "metric": "loss", "baseline": "limits", "low": 2.0}]},
            "rules.0.side",
            "'above' needs high",
        ),
        (
            {"rules": [{"name": "a", "metric": "m", "side": "both", "baseline": "limits", "low": 2.0, "high": 1.0}]},
            "rules.0.low",
            "not below high",
        ),
        ({"rules": [{"name": "a", "metric": "loss", "after": 2}]}, "rules.0.after", "needs 3 values"),
        (
            {"rules": [{"name": "a", "metric": "tokens_per_second", "action": "stop"}]},
            "rules.0.action",
            "metrics that all ranks know alike",
        ),
        ({"rules": [{"name": "a", "metric": "loss"}] * 2}, "rules.1.name", "2 rules are called 'a'"),
        ({"rules": [{"name": "a", "metric": "loss", "action": "webhook"}]}, "webhook", "is left out"),
        ({"without": ["los-spike"]}, "without", "no shipped rule is called 'los-spike'"),
        ({"webhook": "ftp://here/x"}, "webhook", "is no address"),
        ({"webhook": "$not a name"}, "webhook", "is no address"),
    ],
)
def test_settings_that_make_no_sense_are_refused(over: dict[str, Any], path: str, text: str, tmp_path: Path) -> None:
    table = toy.table(tmp_path, tmp_path, watchers=[{"use": "health", **over}])
    with pytest.raises(RecipeError) as caught:
        recipes.decode(table)
    found = [problem for problem in caught.value.problems if problem.path == f"watchers.0.{path}"]
    assert found, [str(problem) for problem in caught.value.problems]
    assert any(text in problem.text for problem in found)


def test_a_rule_of_the_same_name_replaces_a_shipped_one() -> None:
    mine = Rule(name="loss-spike", metric="loss", deviations=3.0)
    rules = Health(rules=(mine,), without=("slower",)).all_rules()
    assert mine in rules
    assert [rule.name for rule in rules].count("loss-spike") == 1
    assert "slower" not in [rule.name for rule in rules]


def test_a_run_tells_of_a_spike_with_the_rows_that_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of one step is made larger; the alert names the rows that the loader gave in that step."""
    plain, calls, drawn = Step.__call__, 0, []

    def larger(self: Step) -> Any:
        nonlocal calls
        calls += 1
        found = plain(self)
        drawn.append(self.source.origins())
        return dataclasses.replace(found, loss=found.loss + (40.0 if calls == 10 else 0.0))

    monkeypatch.setattr(Step, "__call__", larger)
    rule = {"name": "spike", "metric": "loss", "after": 4, "share": 1.0, "keep_batch": True}
    watcher = {"use": "health", "rules": [rule], "update_every": 2}
    made = toy.recipe(toy.corpus(tmp_path / "text"), tmp_path / "cache", watchers=[watcher])
    folder, report = toy.train(made, tmp_path / "run")
    (alert,) = [event for event in rows(folder.events) if event["name"] == "alert"]
    assert (alert["step"], alert["attrs"]["rule"]) == (10, "spike")
    want = [{"source": o.source, "row": o.row, "documents": [list(piece) for piece in o.documents]} for o in drawn[9]]
    assert alert["attrs"]["batch"]["rows"] == want
    assert sum(piece[2] for row in want for piece in row["documents"]) == 4 * 32, "every input is in a document"
    assert any("spike at step 10" in note for note in report.notes)
    measured = [row["step"] for row in rows(folder.metrics) if "update_ratio" in row]
    assert measured == [2, 4, 6, 8, 10, 12]
