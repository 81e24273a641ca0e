"""The budget of a run, and what was spent, in real runs: ends, resumes, bad settings."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core.errors import RecipeError
from lmworks.methods.green_ai import GreenAI
from lmworks.train.probe import Probe
from lmworks.train.slots import StepRecord
from lmworks.train.spent import Bill
from tests.train import toy

NOBODY = cast(Probe, None)  # the watcher asks it for nothing


def record(step: int, kwh: float | None, loss: float | None = None) -> StepRecord:
    bill = None if kwh is None else Bill(joules=kwh * 3.6e6, measured=0.0, kwh=kwh, kg_co2e=kwh / 2, money=kwh * 0.1)
    found = None if loss is None else {"val_loss": loss}
    return StepRecord(step=step, tokens=0, loss=1.0, grad_norm=1.0, lr=1e-3, seconds=0.1, validation=found, spent=bill)


@pytest.mark.parametrize(("name", "budget", "last"), [("kwh", 3.0, 3), ("kg_co2e", 2.0, 4), ("money", 0.5, 5)])
def test_a_budget_ends_the_run_when_it_is_spent(name: str, budget: float, last: int) -> None:
    watcher = GreenAI(**{name: budget}).start()  # type: ignore[arg-type]
    for step in range(1, last):
        assert watcher.look(record(step, float(step)), NOBODY) is None
    change = watcher.look(record(last, float(last)), NOBODY)
    assert change is not None
    assert change.stop
    assert f"the budget of {budget:g}" in change.reason


def test_nothing_counted_ends_nothing() -> None:
    assert GreenAI(kwh=1e-9).start().look(record(1, None, 1.0), NOBODY) is None


def slow_end(points: list[tuple[float, float]], least: float, patience: int) -> int | None:
    """Which validation ends the run: the first one with so many poor ones in a row."""
    poor = 0
    for i, ((kwh, loss), (later, then)) in enumerate(itertools.pairwise(points), start=1):
        if later > kwh:
            poor = poor + 1 if loss - then < least * (later - kwh) else 0
            if poor >= patience:
                return i
    return None


@given(
    st.lists(st.tuples(st.floats(0, 2), st.floats(0, 5)), max_size=12),
    st.floats(0.01, 3),
    st.integers(1, 3),
    st.integers(0, 11),
)
def test_little_gain_ends_the_run_also_across_a_resume(
    steps: list[tuple[float, float]], least: float, patience: int, cut: int
) -> None:
    settings = GreenAI(least_gain=least, patience=patience)
    kwh, points = 0.0, []
    for more, loss in steps:
        kwh += more
        points.append((kwh, loss))
    watcher, ended = settings.start(), None
    for i, (spent, loss) in enumerate(points):
        if i == cut:
            state = json.loads(json.dumps(watcher.state()))
            watcher = settings.start()
            watcher.load(state)
        assert watcher.look(record(i, spent), NOBODY) is None, "only validations are looked at"
        if watcher.look(record(i, spent, loss), NOBODY) is not None:
            ended = i
            break
    assert ended == slow_end(points, least, patience)


@pytest.mark.parametrize(
    ("watcher", "over", "words"),
    [
        ({}, {}, r"watchers\.0: has no effect: give one of kwh, kg_co2e, money, least_gain"),
        ({"kwh": 1.0}, {"energy": {"on": False}}, r"energy\.on is false"),
        ({"money": 1.0}, {}, r"watchers\.0\.money: needs energy\.price"),
        ({"least_gain": 1.0}, {}, r"watchers\.0\.least_gain: needs validations"),
        ({"kwh": 1.0, "patience": 2}, {}, r"watchers\.0\.patience: has no effect without least_gain"),
        ({"kwh": 0.0}, {}, r"watchers\.0\.kwh.*greater than 0"),
    ],
)
def test_settings_without_sense_are_refused(
    watcher: dict[str, Any], over: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words):
        toy.recipe(tmp_path, tmp_path, watchers=[{"use": "green-ai", **watcher}], **over)


def test_a_run_ends_with_its_budget_and_says_so(text: Path, cache: Path, tmp_path: Path) -> None:
    made = toy.recipe(text, cache, watchers=[{"use": "green-ai", "kwh": 1e-12}], energy={"processor_watts": 50.0})
    folder, _ = toy.train(made, tmp_path / "run")
    summary = json.loads(folder.summary.read_text())
    assert summary["steps"] < 12
    assert summary["stopped"] == "the budget of 1e-12 kWh is spent"


def test_a_budget_that_is_not_spent_changes_nothing(text: Path, cache: Path, tmp_path: Path) -> None:
    plain, _ = toy.train(toy.recipe(text, cache), tmp_path / "plain")
    watched, _ = toy.train(toy.recipe(text, cache, watchers=[{"use": "green-ai", "kwh": 1e3}]), tmp_path / "watched")
    assert toy.learned(watched) == toy.learned(plain)
