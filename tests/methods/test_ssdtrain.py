"""SSDTrain: both plans against slow oracles, the clock, what the pilot decides and tells, refusals."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from lmworks.core import recipe as recipes
from lmworks.core.errors import MissingExtra, RecipeError
from lmworks.methods.ssdtrain import SSDTrain
from lmworks.methods.ssdtrain.pilot import Flight, Pilot, size
from lmworks.methods.ssdtrain.plan import least_ahead, paper_plan, simulate, strict_plan
from lmworks.parallel.clock import clock_of
from lmworks.train.backends import Host
from lmworks.train.ledger import Ledger
from lmworks.train.moved import Facts, Pass, Visit
from lmworks.train.offload import TensorCache
from tests.oracles import ssdtrain as oracle
from tests.train import toy

TEN = [1.0] * 10


def test_the_example_of_ten_equal_blocks() -> None:
    assert paper_plan(TEN, TEN, 0.45) == 7
    assert strict_plan(TEN, TEN, 0.45, 0.45) == 6
    assert simulate(TEN, TEN, 6, 0.45, 0.45).stalled == 0
    found = simulate(TEN, TEN, 7, 0.45, 0.45)
    assert found.stalled == pytest.approx(37 / 9, abs=1e-9)  # 1 + 14 / 0.45 + 2 - 30
    assert found.seconds == pytest.approx(30 + 37 / 9)
    needs = [(n + 2) / (30 - 2 * n) for n in range(10)]
    assert needs == sorted(needs)
    for n, need in enumerate(needs):
        assert paper_plan(TEN, TEN, need * 1.0001) == n + 1
        assert paper_plan(TEN, TEN, need * 0.9999) == n


@pytest.mark.parametrize("plan", [paper_plan, lambda t, v, rate: strict_plan(t, v, rate, rate)])
def test_a_disk_without_limit_takes_all_and_one_that_stands_takes_none(plan: Any) -> None:
    assert plan(TEN, TEN, math.inf) == 10
    assert plan(TEN, TEN, 0.0) == 0
    assert plan(TEN, [0.0] * 10, 0.0) == 10
    assert plan([], [], 1.0) == 0
    assert plan([0.0, 0.0], [1.0, 1.0], 1.0) == 0


ticks = some.integers(1, 6)
blocks = some.lists(some.tuples(ticks, some.integers(1, 9)), min_size=1, max_size=7)


@given(blocks, some.floats(0.05, 5), some.floats(0, 10), some.sampled_from([2, 3]))
def test_the_papers_plan_is_its_inequality(
    found: list[tuple[int, int]], rate: float, rest: float, backward: int
) -> None:
    seconds, nbytes = [t for t, _ in found], [v for _, v in found]
    got = paper_plan(seconds, nbytes, rate, rest=rest, backward=backward)
    assert got == oracle.paper(seconds, nbytes, rate, rest, backward)


@given(blocks, some.sampled_from([1, 2]), some.integers(0, 12), some.sampled_from([2, 3]))
def test_the_strict_plan_is_the_most_that_never_waits(
    found: list[tuple[int, int]], slower: int, rest: int, backward: int
) -> None:
    seconds, nbytes = [t for t, _ in found], [v for _, v in found]
    got = strict_plan(seconds, nbytes, 1, 1 / slower, rest=rest, backward=backward)
    reads = [slower * v for v in nbytes]
    assert got == oracle.strict(seconds, nbytes, reads, rest, backward, most=len(seconds))
    ahead = least_ahead(seconds, nbytes, got, 1, 1 / slower, rest=rest, backward=backward)
    assert oracle.ticked(seconds, nbytes, reads, got, rest, backward, ahead)[1] == 0
    if ahead > 1:
        assert oracle.ticked(seconds, nbytes, reads, got, rest, backward, ahead - 1)[1] > 0


@given(blocks, some.integers(0, 7), some.integers(0, 5), some.sampled_from([None, 1, 2, 3]), some.booleans())
def test_the_clock_is_a_step_tick_by_tick(
    found: list[tuple[int, int]], out: int, rest: int, ahead: int | None, duplex: bool
) -> None:
    seconds, nbytes = [t for t, _ in found], [v for _, v in found]
    out = min(out, len(seconds))
    got = simulate(seconds, nbytes, out, 1, 1, ahead=ahead, duplex=duplex, rest=rest)
    assert (got.seconds, got.stalled) == oracle.ticked(seconds, nbytes, nbytes, out, rest, 2, ahead, duplex)


# --- the pilot --------------------------------------------------------------------------------------------------------


def flight(**over: Any) -> Flight:
    names = tuple(str(i) for i in range(10))
    plain = {"names": names, "plan": "strict", "bandwidth": 0.45, "again": False, "deeper": True}
    return Flight(**plain | over)


def step(*, micro_batches: int = 1, turns: bool = True, seconds: float = 40.0, **over: Any) -> Facts:
    """A step of ten blocks that take one second and save one byte each, no time between forward and backward."""
    facts = Facts(clock=clock_of(torch.device("cpu")), seconds=seconds, **over)
    for _ in range(micro_batches):
        made = Pass(turns=turns)
        for i in range(10):
            visit = Visit(str(i), out=True)
            visit.begun, visit.ended, visit.nbytes = float(i), i + 1.0, 1
            made.visits.append(visit)
        made.turned = 10.0
        facts.passes.append(made)
    return facts


def piloted(found: Flight) -> Pilot:
    pilot = Pilot(found)
    pilot.cache = TensorCache(Host(), Ledger(), least=0, threads=1, ahead="block", steer=pilot.hear)
    return pilot


@pytest.mark.parametrize(("plan", "out"), [("strict", 6), ("paper", 7), ("all", 9)])
def test_the_second_step_decides(plan: Any, out: int) -> None:
    pilot = piloted(flight(plan=plan, bandwidth="profile" if plan == "all" else 0.45))
    pilot.hear(step())
    assert [name for name in pilot.flight.names if pilot.goes(name)] == list("012345678"), "all but the last at first"
    second = step(micro_batches=2, stored=9, seconds_storing=20.0)
    pilot.hear(second)
    assert [name for name in pilot.flight.names if pilot.goes(name)] == list("0123456789"[:out])
    assert second.notes == [
        f"saved tensors: blocks 0-{out - 1} of 0-9 go out ({plan} plan, 0.45 bytes/s out, 0.45 bytes/s back); "
        f"{2 * out} bytes a step"
    ]


def test_what_is_measured_is_what_is_planned_with() -> None:
    pilot = piloted(flight(bandwidth="profile"))
    pilot.hear(step())
    second = step(stored=9, seconds_storing=20.0, loaded=9, seconds_loading=20.0)
    pilot.hear(second)
    assert pilot.out == set("012345")
    assert pilot.cache is not None
    assert pilot.cache.depth == least_ahead(TEN, TEN, 6, 0.45, 0.45)


def test_a_disk_from_which_nothing_came_in_time_gets_nothing() -> None:
    pilot = piloted(flight(bandwidth="profile"))
    pilot.hear(step())
    second = step()
    pilot.hear(second)
    assert not any(pilot.goes(name) for name in pilot.flight.names)
    assert "no block goes out (strict plan, 0 bytes/s" in second.notes[0]


def test_the_wear_of_the_disk_is_told_and_warned_of(tmp_path: Path) -> None:
    year = 365.25 * 24 * 3600
    for years in (0.5, 3.0):
        pilot = piloted(flight(folders=(tmp_path,), endurance=6 * year * years / 40))
        pilot.hear(step())
        second = step()
        pilot.hear(second)
        assert f"of writing last {years:.2g} years" in second.notes[0]
        assert len(second.notes) == (2 if years < 1 else 1)
        assert all("worn out in 0.5 years" in note for note in second.notes[1:])


def test_waiting_is_told_once_after_the_plan() -> None:
    pilot = piloted(flight())
    for number in range(5):
        facts = step(stalled=5.0)
        pilot.hear(facts)
        assert any("waited 5 s of a step of 40 s" in note for note in facts.notes) == (number == 2)


def test_small_tensors_are_told() -> None:
    pilot = piloted(flight())
    pilot.hear(step())
    second = step()
    for made in second.passes:
        for visit in made.visits:
            visit.nbytes = 0
    pilot.hear(second)
    assert "least_bytes" in second.notes[0]


def test_the_last_block_goes_out_where_another_backward_pass_is_next() -> None:
    pilot = piloted(flight())
    assert pilot.cache is not None
    for turns in (True, False):
        pilot.cache.expect(0, turns=turns)
        pilot.cache.begin()
        assert pilot.goes("9") is not turns


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1234, "1.23 KB"), (3.1e9, "3.1 GB"), (6e14, "600 TB")]
)
def test_bytes_read_well(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved", "over", "said"),
    [
        ({}, {"compile": True}, r"compile: ssdtrain works on blocks that are not compiled"),
        ({"to": "gpudirect"}, {}, r"saved\.to: 'gpudirect' is between a GPU and a disk"),
        ({"to": "host", "folders": ["x"]}, {}, r"saved\.folders: has no effect"),
        ({"to": "host", "endurance_bytes": 1e12}, {}, r"saved\.endurance_bytes: has no effect"),
        ({"plan": "all", "bandwidth": 1e9}, {}, r"saved\.bandwidth: has no effect"),
        ({"bandwidth": -1.0}, {}, r"saved\.bandwidth"),
        ({"bandwidth": "fast"}, {}, r"saved\.bandwidth"),
        ({"plan": "loose"}, {}, r"saved\.plan"),
        (
            {},
            {"model": {"use": "decoder", "n_layers": 1, "hidden_size": 32, "n_heads": 2, "ffn_size": 48}},
            r"the last",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    saved: dict[str, Any], over: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=said):
        recipes.decode(toy.table(tmp_path, tmp_path, saved={"use": "ssdtrain", **saved}, **over))


@pytest.mark.parametrize("bandwidth", ["profile", 2e9, [3e9, 2e9]])
def test_a_recipe_is_written_as_it_was_read(bandwidth: Any, tmp_path: Path) -> None:
    table = toy.table(tmp_path, tmp_path, saved={"use": "ssdtrain", "bandwidth": bandwidth})
    made = recipes.decode(table)
    (tmp_path / "again.toml").write_text(recipes.dump(made))
    assert recipes.load(tmp_path / "again.toml") == made


def test_gpudirect_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvikio", None)
    model = toy.model()
    with pytest.raises(MissingExtra, match="kvikio"):
        SSDTrain(to="gpudirect", folders=(str(tmp_path),)).apply(model)
