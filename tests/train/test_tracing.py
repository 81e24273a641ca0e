"""What a run tells of its own time: spans that nest, sums that fit, clocks, flight records; nothing when it is off."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest

from lmworks.audit import hang, trace
from lmworks.core.journal import rows
from lmworks.core.run import RunFolder
from lmworks.core.spans import Span
from lmworks.parallel import gang
from tests.train import ranked, toy


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.corpus(tmp_path_factory.mktemp("traced") / "text")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def inside(outer: Span, inner: Span) -> bool:
    return outer.start <= inner.start and inner.end <= outer.end


def nest(spans: list[Span]) -> bool:
    """Whether of every two spans one is inside the other, or they are apart."""
    return all(
        inside(a, b) or inside(b, a) or a.end <= b.start or b.end <= a.start for a in spans for b in spans if a is not b
    )


def test_spans_nest_inside_their_step_and_sums_are_theirs(text: Path, cache: Path, tmp_path: Path) -> None:
    made = toy.recipe(text, cache, micro_batch_size=2, trace={"every": 4})
    folder, _ = toy.train(made, tmp_path / "run")
    (rank,) = trace.read(folder.path).ranks
    assert sorted(rank.sums) == list(range(1, 13))
    written = sorted({step for step, span in rank.spans if span.name == "forward"})
    assert written == [3, 4, 8, 12]
    for step in written:
        found = [span for at, span in rank.spans if at == step and span.name not in ("save", "validate")]
        (whole,) = [span for span in found if span.name == "step"]
        assert all(inside(whole, span) for span in found)
        assert nest(found)
        assert [(span.name, span.number) for span in found if span.name in ("forward", "backward")] == [
            (name, micro) for micro in range(2) for name in ("forward", "backward")
        ]
        for name, entry in rank.sums[step].items():
            own = [span.end - span.start for span in found if span.name == name]
            assert entry.calls == len(own)
            assert entry.seconds == pytest.approx(sum(own), abs=1e-6), "one rank: nothing is inside of them"
        assert sum(entry.seconds for entry in rank.sums[step].values()) <= whole.end - whole.start + 1e-6


@pytest.mark.parametrize(("settings", "written"), [({"on": False}, False), ({"every": 0}, True)])
def test_spans_are_left_out_when_they_are_off(
    settings: dict[str, Any], written: bool, text: Path, cache: Path, tmp_path: Path
) -> None:
    folder, _ = toy.train(toy.recipe(text, cache, steps=4, trace=settings), tmp_path / "run")
    names = [event["name"] for event in rows(folder.events)]
    assert ("sums" in names) is written
    assert "forward" not in names


def test_tracing_changes_nothing_that_is_learned(text: Path, cache: Path, tmp_path: Path) -> None:
    kinds = ({"on": False}, {"every": 1, "collect_every": 2})
    on, off = (toy.train(toy.recipe(text, cache, trace=kind), tmp_path / str(i))[0] for i, kind in enumerate(kinds))
    assert toy.learned(on) == toy.learned(off)


def test_garbage_is_collected_in_the_steps_that_are_named(
    text: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect, calls = gc.collect, []

    class Counting(toy.Silent):
        def row(self, row: dict[str, Any]) -> None:
            super().row(row)
            assert not gc.isenabled()

    def counted(*words: Any) -> int:
        calls.append(words)
        return collect(*words)

    monkeypatch.setattr(gc, "collect", counted)
    from lmworks.train.loop import run

    run(toy.recipe(text, cache, trace={"collect_every": 5}), tmp_path / "run", resume="auto", report=Counting())
    assert len(calls) == 3, "at the start, and after steps 5 and 10"
    assert gc.isenabled()


def test_a_run_of_before_goes_on_although_it_had_no_table_of_this(text: Path, cache: Path, tmp_path: Path) -> None:
    made = toy.recipe(text, cache)
    toy.stopped(made, tmp_path / "run", 5)
    path = tmp_path / "run" / "recipe.toml"
    before = path.read_text()
    start = before.index("[trace]")
    end = before.find("\n[", start)
    path.write_text(before[:start] + (before[end + 1 :] if end > 0 else ""))
    folder, _ = toy.train(made, tmp_path / "run")
    assert trace.read(folder.path).steps == list(range(1, 13)), "and the steps of both attempts are read together"


@pytest.mark.ranks
def test_ranks_tell_of_their_exchanges_on_one_clock(text: Path, cache: Path, tmp_path: Path) -> None:
    gang.run(ranked.train, 2, ranked.table(text, cache, trace={"every": 1}), str(tmp_path / "run"))
    found = trace.read(tmp_path / "run")
    assert [dict(rank.axes) for rank in found.ranks] == [{"dp_shard": 0}, {"dp_shard": 1}]
    work, exchanges = found.names
    assert {"data", "forward", "backward", "optimizer"} <= set(work)
    assert {"fsdp all-gather", "fsdp reduce-scatter", "world all-reduce"} <= set(exchanges)
    for rank in found.ranks:
        assert nest([span for step, span in rank.spans if step == 6 and span.stream == "main"])
    ends: list[dict[int | None, Span]] = [
        {span.number: span for step, span in rank.spans if span.name == "world all-reduce"} for rank in found.ranks
    ]
    for number in ends[0].keys() & ends[1].keys():
        a, b = ends[0][number], ends[1][number]
        slack = 2 * found.ranks[1].error + 1e-3
        assert max(a.start, b.start) <= min(a.end, b.end) + slack, "it ends on no rank before all have begun it"
    for folder in (tmp_path / "run", tmp_path / "run" / "ranks" / "00001"):
        clocks = [event for event in rows(RunFolder(folder).events) if event["name"] == "clock"]
        assert len(clocks) == 2, "when it begins and at the end"


@pytest.mark.ranks
def test_stages_tell_their_passes_inside_of_the_pipeline(text: Path, cache: Path, tmp_path: Path) -> None:
    spec = ranked.table(text, cache, layout={"pp": 2}, micro_batch_size=2, trace={"every": 1}, steps=4)
    gang.run(ranked.train, 2, spec, str(tmp_path / "run"))
    found = trace.read(tmp_path / "run")
    for rank in found.ranks:
        spans = [span for step, span in rank.spans if step == 3]
        (pipeline,) = [span for span in spans if span.name == "pipeline"]
        passes = [span for span in spans if span.name in ("forward", "backward")]
        assert len(passes) == 8, "four micro-batches"
        assert all(inside(pipeline, span) for span in passes)
        assert rank.sums[3]["pipeline"].exchange
    assert "loss" in found.ranks[1].sums[3]


@pytest.mark.ranks
def test_an_error_leaves_the_records_of_the_ranks_and_says_where(text: Path, cache: Path, tmp_path: Path) -> None:
    spec = ranked.table(text, cache, steps=6)
    messages = gang.run(ranked.broken, 2, spec, str(tmp_path / "run"), 1, 3)
    assert any("--hang" in message for message in messages)
    folder = hang.newest(tmp_path / "run")
    assert folder is not None
    record = json.loads((folder / "rank-00001.json").read_text())
    assert record["reason"].startswith("RuntimeError")
    assert (record["world"], record["step"]) == (2, 3)
    assert record["axes"]["dp_shard"] == 1
    assert record["groups"]["fsdp"] == [0, 1]
    assert any("loop.py" in frame for frame in record["stacks"]["MainThread"])
    assert hang.read(folder).world == 2
