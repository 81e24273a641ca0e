"""The simulator: lanes of one rank by hand, long orders by their rounds, and agreement with the closed form."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from lmworks.parallel.layout import Layout
from lmworks.plan import simulate, time
from lmworks.plan.choice import Choice
from lmworks.plan.cluster import Cluster
from lmworks.plan.shape import Ground
from lmworks.plan.simulate import of_choice, walk
from lmworks.plan.work import Piece, Practice, Work
from tests.plan.conftest import recipe


def choice_of(layout: Layout, *, rows: int = 1, **changes: object) -> tuple[Ground, Choice, Cluster]:
    from lmworks.plan import cluster as clusters

    settings, cluster = recipe(**changes), clusters.load("dgx-a100")
    m = settings.batch_size // layout.size("batch") // rows
    return Ground(settings, cluster), Choice(layout=layout, rows=rows, micro_batches=m, saved=settings.saved), cluster


def walked(pieces: list[Piece], *, gathers: bool = True, reduces: bool = True) -> simulate.Walk:
    """Given pieces on the lanes of a rank alone: no stage's ends among them."""
    ground, choice, _ = choice_of(Layout(dp_shard=1))
    work = Work(ground)
    stage = dataclasses.replace(ground.stages(choice.layout)[0], stop=len(pieces), first=False, last=False)
    work.pieces = lambda *_: pieces  # type: ignore[method-assign,assignment]
    return walk(work, choice, stage, gathers=gathers, reduces=reduces)


def test_a_gather_hides_behind_the_block_before() -> None:
    """Two blocks, forward 4, gathers 3: the first is waited for, the second is not; backward 8 each, gathers again."""
    block = Piece(forward=4, backward=8, gather=3, gather_again=3, reduce=2)
    found = walked([block, block])
    assert found.forward == 3 + 4 + 4
    assert found.backward == 3 + 8 + 8
    assert found.tail == 2


def test_a_gather_longer_than_its_block_is_waited_for() -> None:
    block = Piece(forward=2, backward=8, gather=5, gather_again=5)
    assert walked([block, block, block], reduces=False).forward == 3 * 5 + 2


def test_gradients_wait_for_each_other_on_the_network() -> None:
    """Backward 1 each, sums of 5: the first starts after 1 second, and they go one behind the other."""
    block = Piece(forward=1, backward=1, reduce=5)
    found = walked([block, block, block], gathers=False)
    assert found.backward == 3
    assert found.tail == 1 + 3 * 5 - 3


def test_saved_tensors_go_beside_and_come_back_in_time_or_not() -> None:
    light = Piece(forward=4, backward=8, away=2)
    assert walked([light, light], gathers=False, reduces=False).backward == pytest.approx(2 + 2 + 8 + 8)
    heavy = Piece(forward=1, backward=1, away=10)
    found = walked([heavy, heavy], gathers=False, reduces=False)
    # out: 1 to 11, 11 to 21; in: 21 to 31, 31 to 41; the last backward pass ends at 42
    assert found.forward + found.backward == 42


def test_lanes_never_overlap_themselves() -> None:
    block = Piece(forward=2, backward=3, gather=4, gather_again=4, reduce=5, away=1)
    spans = walked([block] * 5).spans
    for lane in ("compute", "network"):
        mine = [span for span in spans if span.lane == lane]
        assert all(a.end <= b.start + 1e-12 for a, b in itertools.pairwise(mine)), lane


WIDE = {"hidden_size": 2048, "n_heads": 16, "n_kv_heads": 16, "ffn_size": 5632}
"""Whose stages take longer than their sends."""
LAYOUTS = [
    Layout(dp_shard=1),
    Layout(dp_shard=8),
    Layout(dp_replicate=4, dp_shard=1, tp=2),
    Layout(pp=4, dp_shard=1),
    Layout(pp=2, dp_shard=2, schedule="interleaved-1f1b", stages_per_rank=2),
    Layout(pp=4, dp_shard=4, schedule="gpipe"),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.pp}-{layout.dp_shard}-{layout.schedule}")
def test_the_closed_form_is_near_the_simulator(layout: Layout) -> None:
    """A wide model: what closed forms leave out is small there."""
    ground, choice, _ = choice_of(layout, batch_size=32, model=WIDE)
    work = Work(ground)
    found = of_choice(work, choice)
    assert found.seconds.total == pytest.approx(time.of_step(work, choice).total, rel=0.05)
    assert min(found.seconds.by_class().values()) >= 0.0


@pytest.mark.parametrize(
    ("schedule", "held"), [("1f1b", None), ("interleaved-1f1b", 2), ("gpipe", None), ("zero-bubble-v", None)]
)
def test_a_long_order_is_its_rounds(schedule: str, held: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(pp=2, dp_shard=1, schedule=schedule, stages_per_rank=held)  # type: ignore[arg-type]
    totals = []
    for most in (10**9, 1):
        monkeypatch.setattr(simulate, "MOST", most)
        ground, choice, _ = choice_of(layout, batch_size=24, model=WIDE)
        totals.append(of_choice(Work(ground), choice).seconds.total)
    assert totals[1] == pytest.approx(totals[0], rel=1e-9)


def test_a_straggler_holds_all() -> None:
    ground, choice, _ = choice_of(Layout(pp=4, dp_shard=1), batch_size=32, model=WIDE)
    work = Work(ground)
    usual = of_choice(work, choice).seconds.total
    slowed = [of_choice(work, choice, {place: 1.5}).seconds.total for place in range(4)]
    assert min(slowed) > 1.2 * usual
    assert max(slowed) < 1.5 * usual + 1e-12
    assert of_choice(work, choice, {0: 1.0}).seconds.total == usual


def test_gradients_that_do_not_overlap_take_their_time() -> None:
    ground, choice, cluster = choice_of(Layout(dp_replicate=8, dp_shard=1))
    over = of_choice(Work(ground), choice).seconds
    behind = of_choice(Work(Ground(ground.recipe, cluster), Practice(data_overlaps=False)), choice).seconds
    assert behind.reduce > over.reduce
    assert behind.total > over.total
