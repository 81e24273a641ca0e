"""Closed forms against the event simulator, which is the slow oracle here."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from lmworks.parallel.layout import Layout
from lmworks.parallel.schedule import order
from lmworks.parallel.timeline import Link, simulate
from lmworks.plan import time
from lmworks.plan.choice import Choice
from lmworks.plan.cluster import Cluster
from lmworks.plan.rounds import FORWARD, Calls, Links, backward, forward
from lmworks.plan.shape import Ground
from lmworks.plan.time import CLASSES, Seconds, pipe_seconds
from lmworks.plan.work import Work
from tests.plan.conftest import level, recipe


def simulated(p: int, m: int, v: int, hop: float, schedule: str) -> float:
    """Makespan of equal stages, f + w = 3 on each rank, `hop` seconds for each send."""
    found = order(schedule, ranks=p, micro_batches=m, stages_per_rank=v if v > 1 else None)
    link = Link(bytes_per_second=1.0)
    timeline = simulate(found, forward_seconds=1 / v, backward_seconds=2 / v, link=link, boundary_bytes=hop)
    return timeline.makespan


def closed(p: int, m: int, v: int, hop: float, schedule: str) -> float:
    trip = 2 * hop * (v * p - 1)
    gpipe = schedule == "gpipe"
    return pipe_seconds(ranks=p, micro_batches=m, stages_per_rank=v, both=3.0, round_trip=trip, gpipe=gpipe)


@pytest.mark.parametrize(
    ("p", "m", "v", "makespan"),
    [(4, 8, 1, 33.0), (4, 8, 2, 28.5), (4, 8, 4, 26.25), (4, 16, 2, 52.5), (8, 8, 2, 34.5), (8, 16, 2, 58.5)],
)
def test_published_makespans(p: int, m: int, v: int, makespan: float) -> None:
    """tf = 1, tb = 2: 3 m (1 + (p - 1) / (v m)), by the formula and by torch's orders."""
    schedule = "1f1b" if v == 1 else "interleaved-1f1b"
    assert closed(p, m, v, 0.0, schedule) == makespan
    assert simulated(p, m, v, 0.0, schedule) == pytest.approx(makespan, rel=1e-12)


@pytest.mark.parametrize("v", [1, 2, 3])
@pytest.mark.parametrize("p", [2, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_closed_forms_are_exact_while_sends_are_shorter_than_stages(p: int, rounds: int, v: int) -> None:
    schedule = "1f1b" if v == 1 else "interleaved-1f1b"
    for hop in (0.0, 0.03, 0.1, 0.3):
        found = closed(p, rounds * p, v, hop, schedule)
        assert found == pytest.approx(simulated(p, rounds * p, v, hop, schedule), rel=1e-9), hop


@pytest.mark.parametrize("p", [2, 4, 8])
@pytest.mark.parametrize("m", [1, 3, 8, 17])
def test_closed_forms_are_close_for_any_number_of_micro_batches(p: int, m: int) -> None:
    schedule = "1f1b" if m >= p else "gpipe"
    for hop in (0.0, 0.05, 0.1):
        found = closed(p, m, 1, hop, schedule)
        rel = 1e-9 if hop == 0 else 0.05
        assert found == pytest.approx(simulated(p, m, 1, hop, schedule), rel=rel)


def test_pipettes_floor_is_not_here() -> None:
    """With m / p rounded down, m = 2 p - 1 would cost what m = p costs and one micro-batch's hops less."""
    steps = [closed(4, m, 1, 0.5, "1f1b") for m in range(4, 12)]
    differences = [b - a for a, b in itertools.pairwise(steps)]
    assert max(differences) == pytest.approx(min(differences))


# --- a step -----------------------------------------------------------------------------------------------------------


def of(cluster: Cluster, layout: Layout, *, rows: int = 1, **changes: object) -> Seconds:
    settings = recipe(**changes)
    m = settings.batch_size // layout.size("batch") // rows
    choice = Choice(layout=layout, rows=rows, micro_batches=m, saved=settings.saved)
    return time.of_step(Work(Ground(settings, cluster)), choice)


def test_a_step_alone_is_its_products_and_its_memory(laptop: Cluster) -> None:
    """Twice the rows take twice the time of everything but the update."""
    one, two = of(laptop, Layout(dp_shard=1)), of(laptop, Layout(dp_shard=1), batch_size=32)
    assert two.compute == pytest.approx(2 * one.compute)
    assert two.update == one.update > 0
    for name in CLASSES:
        assert name in ("compute", "update") or getattr(one, name) == 0.0


def test_what_is_run_again_is_a_third_of_the_rest_at_most(laptop: Cluster) -> None:
    layout = Layout(dp_shard=1)
    kept = of(laptop, layout)
    whole = of(laptop, layout, saved="recompute")
    products = of(laptop, layout, saved={"use": "recompute", "keep": "products"})
    half = of(laptop, layout, saved={"use": "recompute", "every": 2})
    assert kept.again == 0.0 < products.again < whole.again < kept.compute / 2
    assert half.again == pytest.approx(whole.again / 2)
    assert whole.compute == pytest.approx(kept.compute)


def test_classes_follow_the_axes(laptop: Cluster) -> None:
    assert of(laptop, Layout(dp_shard=1, tp=2)).tensor > 0
    assert of(laptop, Layout(dp_shard=1, cp=2)).context > 0
    assert of(laptop, Layout(dp_shard=2)).gather > 0
    assert of(laptop, Layout(dp_replicate=2, dp_shard=1)).reduce > 0
    assert of(laptop, Layout(pp=2, dp_shard=1)).bubble > 0
    assert of(laptop, Layout(dp_shard=1), saved={"use": "offload", "to": "disk", "last": 0}).away > 0


def test_gathers_hide_behind_large_micro_batches(laptop: Cluster) -> None:
    small = of(laptop, Layout(dp_shard=2), rows=1, batch_size=2)
    large = of(laptop, Layout(dp_shard=2), rows=64, batch_size=128)
    assert large.gather / large.total < small.gather / small.total


@pytest.mark.parametrize("engine", ["all-gather", "ring", "tokenring", "ulysses"])
def test_what_is_waited_for_over_cp_is_what_the_rounds_leave(engine: Any, laptop: Cluster) -> None:
    """Four ranks of one row; slow links, so that no engine hides all. Computing is the block's own attention."""
    slow = dataclasses.replace(laptop, links=(level("wire", None, 1e6, latency=1e-4),))
    settings, layout = recipe(batch_size=2), Layout(dp_shard=1, cp=4, context=engine)
    work = Work(Ground(settings, slow))
    piece = work.block(Choice(layout=layout, rows=2, micro_batches=1, saved=settings.saved), 0)
    attention = 4 * 8 * 8 * (129 / 2) * 2 * 128 / 4 / (work.plain_peak * work.efficiency.share(8))
    shape = {"ranks": 4, "rows": 2, "sequence": 128, "heads": 8, "groups": 4, "head_dim": 8}
    pairs = 128 * 129 / 2 / 4
    calls = Calls(engine=engine, rate=pairs * 2 * 8 * 8 * FORWARD / attention, **shape)
    links = Links(line=1e6, port=1e6, latency=1e-4)
    assert piece.context_forward == pytest.approx(forward(calls, links).exposed, rel=1e-9)
    assert piece.context_backward == pytest.approx(backward(calls, links).exposed, rel=1e-9)
    assert piece.context_forward > 0
