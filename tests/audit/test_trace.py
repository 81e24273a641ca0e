"""The heat map names a slow rank and nobody else; clocks come together; a step made twice counts once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.audit import trace, trace_page
from lmworks.audit.trace import Rank, Trace
from lmworks.core.errors import DataError, UsageError
from lmworks.core.events import Events
from lmworks.core.run import RunFolder
from lmworks.core.spans import Span
from tests.audit import traced


@pytest.mark.parametrize("seed", range(10))
def test_a_rank_of_one_and_a_half_times_is_found_in_thirty_steps(seed: int, tmp_path: Path) -> None:
    who = seed % 4
    found = trace.slow_ranks(trace.read(traced.write(tmp_path / "run", ranks=4, steps=30, seed=seed, slow=who)))
    assert [slow.rank for slow in found] == [who]
    assert found[0].ratio == pytest.approx(1.5, abs=0.15)
    assert found[0].waits < found[0].others_wait
    assert found[0].segment in ("forward", "backward")
    assert f"rank {who} is slow" in found[0].text()


@pytest.mark.parametrize("seed", range(10))
def test_ranks_alike_are_not_called_slow(seed: int, tmp_path: Path) -> None:
    assert trace.slow_ranks(trace.read(traced.write(tmp_path / "run", ranks=4, steps=30, seed=seed, noise=0.3))) == []


def test_stages_of_a_pipeline_are_held_against_their_own(tmp_path: Path) -> None:
    """The second stage works twice as long by its nature; one rank of it is slow."""
    path = traced.write(tmp_path / "run", ranks=8, steps=30, pp=2, slow=6)
    assert [slow.rank for slow in trace.slow_ranks(trace.read(path))] == [6]
    cells = trace.grid(trace.read(path))
    assert [(cell["pp"], cell["dp"]) for cell in cells] == [(rank // 4, rank % 4) for rank in range(8)]
    assert cells[6]["ratio"] > 1.3 > cells[5]["ratio"]


def test_two_ranks_need_more_steps_and_one_has_no_peers(tmp_path: Path) -> None:
    few = trace.read(traced.write(tmp_path / "few", ranks=2, steps=5, slow=1))
    assert trace.slow_ranks(few) == [], "five of five happen by chance once in 32"
    many = trace.read(traced.write(tmp_path / "many", ranks=2, steps=30, slow=1))
    assert [slow.rank for slow in trace.slow_ranks(many)] == [1]
    assert trace.slow_ranks(trace.read(traced.write(tmp_path / "one", ranks=1, steps=30))) == []


@settings(max_examples=40)
@given(st.integers(1, 40), st.floats(0.05, 0.95), st.data())
def test_chance_is_the_binomial_tail(tries: int, chance: float, data: st.DataObject) -> None:
    from scipy.stats import binom

    hits = data.draw(st.integers(0, tries))
    assert trace.by_chance(hits, tries, chance) == pytest.approx(float(binom.sf(hits - 1, tries, chance)), abs=1e-9)


def test_clocks_a_second_apart_come_together(tmp_path: Path) -> None:
    found = trace.read(traced.write(tmp_path / "run", ranks=3, steps=20, skew=1.0))
    ends = [[span.end for _, span in rank.spans if span.name == "fsdp reduce-scatter"] for rank in found.ranks]
    for others in ends[1:]:
        assert others == pytest.approx(ends[0], abs=5e-3)
    assert found.ranks[2].error == 1e-4


def test_a_drifting_clock_is_followed_between_two_measurements(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    events = Events(run.events, run="run", clock=lambda: 0.0)
    for at, offset in ((100.0, 1.0), (200.0, 3.0)):
        events.write("clock", start=at, end=at, offset=offset, error=0.0)
    events.step = 1
    events.write("sums", start=1.0, end=2.0, spans={"work": [1, 1.0, 0, 0]})
    events.spans([Span("work", "main", t, t + 1e-6) for t in (50.0, 150.0, 250.0)], step=1)
    events.flush()
    (rank,) = trace.read(run.path).ranks
    assert [span.start for _, span in rank.spans] == pytest.approx([51.0, 152.0, 253.0])


def test_a_step_that_was_made_again_counts_as_it_was_made_last(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    events = Events(run.events, run="run")
    for attempt, (at, steps) in enumerate(((0, range(1, 8)), (4, range(5, 7)))):
        events.step = at
        events.write("start", resumed_from=None)
        for step in steps:
            events.step = step
            events.write("sums", start=1.0, end=2.0, spans={"work": [1, float(attempt), 0, 0]})
            events.spans([Span("work", "main", step, step + 0.5)], step=step)
    events.flush()
    found = trace.read(run.path)
    assert found.steps == [1, 2, 3, 4, 5, 6], "step 7 was thrown away"
    assert [found.ranks[0].sums[step]["work"].seconds for step in found.steps] == [0, 0, 0, 0, 1, 1]
    assert [step for step, _ in found.ranks[0].spans] == found.steps


def test_steps_can_be_chosen(tmp_path: Path) -> None:
    path = traced.write(tmp_path / "run", ranks=2, steps=20)
    assert trace.read(path, first=5, last=9).steps == [5, 6, 7, 8, 9]
    with pytest.raises(DataError, match="no step was traced between"):
        trace.read(path, first=50)


def test_a_folder_without_a_run_and_a_run_without_spans_are_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run is here"):
        trace.read(tmp_path)
    events = Events(tmp_path / "events.jsonl", run="x")
    events.write("step")
    events.flush()
    with pytest.raises(DataError, match=r"trace\.on = true"):
        trace.read(tmp_path)


def nests(rows: list[tuple[float, float]]) -> bool:
    """Whether of each two intervals one contains the other or they are apart."""
    rows = sorted(rows, key=lambda row: (row[0], -row[1]))
    stack: list[float] = []
    for start, end in rows:
        while stack and stack[-1] <= start + 1e-3:
            stack.pop()
        if stack and end > stack[-1] + 2e-3:
            return False
        stack.append(end)
    return True


def test_perfetto_has_a_process_a_rank_and_threads_that_nest(tmp_path: Path) -> None:
    path = traced.write(tmp_path / "run", ranks=2, steps=20)
    trace_page.perfetto(trace.read(path), tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {"rank 0 (dp_shard 0)", "rank 1 (dp_shard 1)"}
    threads: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "X":
            threads.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    assert len(threads) == 4, "two streams a rank"
    assert all(nests(rows) for rows in threads.values())
    assert min(start for rows in threads.values() for start, _ in rows) == 0


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0.01, 5)), min_size=1, max_size=30))
def test_spans_that_overlap_lie_beside_each_other(found: list[tuple[float, float]]) -> None:
    rank = Rank(number=0, axes={}, spans=[(1, Span("sum", "beside", at, at + long)) for at, long in found])
    ((stream, height, placed),) = trace.lanes(rank)
    assert stream == "beside"
    assert {row for _, _, row in placed} == set(range(height))
    for _, a, row in placed:
        assert not any(b is not a and row == other and a.start < b.end and b.start < a.end for _, b, other in placed), (
            "two at a time in one row"
        )


def test_the_page_holds_everything_and_links_to_nothing(tmp_path: Path) -> None:
    path = traced.write(tmp_path / "<run>", ranks=4, steps=30, slow=2)
    trace_page.page(trace.read(path), tmp_path / "trace.html")
    text = (tmp_path / "trace.html").read_text(encoding="utf-8")
    assert "rank 2 is slow" in text
    assert "<run>" not in text, "names are escaped"
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", text)
    content = json.loads(re.search(r"const content = (.*);\n", text)[1])  # type: ignore[index]
    assert content["slow_ranks"] == [2]
    assert len(content["timeline"]["spans"]) == 4 * 3 * 6 + 4 * 30, "three steps one by one, and every step as a whole"
    assert content["timeline"]["left_out"] == 0


def test_places_are_counted_without_gaps() -> None:
    axes = [{"pp": 1, "dp_replicate": r, "dp_shard": 2 * s} for r in range(2) for s in range(2)]
    assert trace.places(axes) == [(0, 1, 0), (1, 1, 0), (2, 1, 0), (3, 1, 0)]
    assert trace.places([{}]) == [(0, 0, 0)]
    assert Trace(run="x", ranks=[Rank(number=0, axes={})]).steps == []
