"""Where time went, which rank is slow, what the timeline holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmworks.board.system import System
from tests.board import folders


def looked(path: Path) -> System:
    """The events of a folder."""
    system = System(path)
    system.look()
    return system


def test_time_of_an_unbroken_run(tmp_path: Path) -> None:
    folders.events(tmp_path / "events.jsonl", range(1, 101))
    time = looked(tmp_path).time()
    assert time["wall"] == pytest.approx(1 + 10 + 0.5)
    assert time["spent"]["steps"] == pytest.approx(10)
    assert time["spent"]["save"] == pytest.approx(0.5)
    assert time["spent"]["other"] == pytest.approx(1)
    assert time["effective"] == pytest.approx(10 / 11.5)


def test_steps_that_are_made_again_count_once(tmp_path: Path) -> None:
    folders.events(tmp_path / "events.jsonl", range(1, 101))
    folders.events(tmp_path / "events.jsonl", range(81, 151), began=folders.BEGAN + 100)
    time = looked(tmp_path).time()
    assert time["spent"]["steps"] == pytest.approx(15)
    assert time["spent"]["again"] == pytest.approx(2)
    assert time["spent"]["down"] == pytest.approx(100 - 11.5)
    assert sum(time["spent"].values()) == pytest.approx(time["wall"])
    assert [(one["step"], one["steps"]) for one in time["attempts"]] == [(0, 100), (80, 70)]


def test_a_slow_rank_is_found(tmp_path: Path) -> None:
    folders.events(tmp_path / "events.jsonl", range(1, 31))
    for rank in (1, 2, 3):
        place = tmp_path / "ranks" / f"{rank:05d}"
        place.mkdir(parents=True)
        folders.events(place / "events.jsonl", range(1, 31), rank=rank, slow=1.5 if rank == 2 else 1.0)
    system = looked(tmp_path)
    heat = system.heat("step")
    assert heat["ranks"] == [0, 1, 2, 3]
    assert heat["excess"] == pytest.approx([1.0, 1.0, 1.5, 1.0], rel=1e-3)
    assert len(heat["cells"]) == 4 * 30
    assert system.timeline(5)["lanes"] == [f"rank {i}" for i in range(4)]
    assert len(system.timeline(5)["spans"]) == 4 * (5 + 1)
    assert system.names()[0] == "step"


def test_a_long_run_is_put_into_buckets(tmp_path: Path) -> None:
    folders.events(tmp_path / "events.jsonl", range(1, 1051))
    heat = looked(tmp_path).heat("step")
    assert heat["steps_a_bucket"] == 11
    assert heat["buckets"] == list(range(1, 1051, 11))
    assert {round(cell[2], 4) for cell in heat["cells"]} == {0.1}


def test_events_are_read_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    system = looked(tmp_path)
    assert system.time() == {}
    assert system.timeline(5)["spans"] == []
    events = folders.events(path, range(1, 11))
    system.look()
    events.write("note", text="the rate was lowered")
    events.write("sample failed", reason="no memory")
    events.flush()
    system.look()
    assert system.time()["spent"]["steps"] == pytest.approx(1.0)
    assert [one["text"] for one in system.told][-2:] == ["the rate was lowered", "no memory"]


def test_spans_of_other_files_and_streams_are_lanes(tmp_path: Path) -> None:
    folders.events(tmp_path / "events.jsonl", range(1, 4))
    other = folders.Events(tmp_path / "events-traced.jsonl", run="toy")
    other.step = 3
    other.write("all-reduce", start=folders.BEGAN + 1.2, end=folders.BEGAN + 1.3, stream="network")
    other.flush()
    found = looked(tmp_path).timeline(5)
    assert found["lanes"] == ["rank 0", "rank 0, network"]
    assert found["spans"][-2][3:] == pytest.approx([0.2, 0.3, 0], abs=1e-5)


def test_spans_nest_and_clocks_are_brought_together(tmp_path: Path) -> None:
    at = folders.BEGAN
    for rank, skew in ((0, 0.0), (1, 7.0)):
        place = tmp_path / "ranks" / f"{rank:05d}"
        place.mkdir(parents=True)
        events = folders.Events(place / "events.jsonl", run="toy", rank=rank)
        events.write("clock", start=at, end=at, offset=-skew, error=1e-4)
        for name, start, end in (("loss", 1.2, 1.3), ("forward", 1.0, 1.5), ("step", 1.0, 2.0), ("backward", 1.5, 1.9)):
            events.write(name, start=at + skew + start, end=at + skew + end)
        events.flush()
    found = looked(tmp_path).timeline(5)
    shown = {(lane, found["names"][name]): (start, end, depth) for lane, name, _, start, end, depth in found["spans"]}
    for lane in (0, 1):
        assert shown[lane, "step"] == pytest.approx((0.0, 1.0, 0))
        assert shown[lane, "forward"] == pytest.approx((0.0, 0.5, 1))
        assert shown[lane, "loss"] == pytest.approx((0.2, 0.3, 2))
        assert shown[lane, "backward"] == pytest.approx((0.5, 0.9, 1))


def test_sums_of_steps_are_taken_where_they_are_told(tmp_path: Path) -> None:
    events = folders.events(tmp_path / "events.jsonl", range(1, 4))
    for step in range(1, 4):
        events.step = step
        told = {"forward": [4, 0.25 * step, 0, False], "bad": ["x"], "worse": None, "worst": [1, "x"]}
        events.write("sums", start=folders.BEGAN, end=folders.BEGAN + 1, stream="sums", spans=told)
    events.step = 3
    events.write("forward", start=folders.BEGAN + 1, end=folders.BEGAN + 9)
    events.flush()
    system = looked(tmp_path)
    assert [cell[2] for cell in system.heat("forward")["cells"]] == [0.25, 0.5, 0.75]
    assert set(system.names()) == {"step", "save", "forward"}
    assert system.timeline(5)["lanes"] == ["rank 0"]


def test_names_without_end_do_no_harm(tmp_path: Path) -> None:
    events = folders.events(tmp_path / "events.jsonl", range(1, 4))
    for i in range(200):
        events.write(f"name {i}", start=folders.BEGAN, end=folders.BEGAN + 1)
    events.flush()
    system = looked(tmp_path)
    assert len(system.names()) == 64
    assert len(system.timeline(5)["names"]) == 202


@pytest.mark.parametrize(
    "line",
    [
        '{"name": "step", "start": "x", "end": 1, "step": 1, "rank": 0}',
        '{"name": "step", "start": 0, "end": 1, "step": 1e300, "rank": 0}',
        '{"name": "step", "start": 0, "end": 1, "step": 1, "rank": -5}',
        '{"name": ["a"], "start": 0, "end": 1, "step": 1, "rank": 0, "attrs": 3, "stream": {}}',
        '{"name": "memory", "start": 0, "end": 0, "step": 1, "rank": 0, "attrs": {"measured": 3}}',
    ],
)
def test_events_of_nobody_do_no_harm(tmp_path: Path, line: str) -> None:
    (tmp_path / "events.jsonl").write_text(line + "\n")
    system = looked(tmp_path)
    assert system.heat("step")["ranks"] in ([], [0])
    system.timeline(5)
    system.time()
