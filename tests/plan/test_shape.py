"""The planner's bytes are those that the footprint and the traffic of every rank tell."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from typing import Any

import pytest

from lmworks.core.errors import UsageError
from lmworks.core.recipe import decode_part
from lmworks.parallel.footprint import predict
from lmworks.parallel.layout import Layout, problems_of
from lmworks.parallel.schedule import order
from lmworks.parallel.state import STATE_AXES, StatePlacement
from lmworks.parallel.traffic import Work as Step
from lmworks.parallel.traffic import traffic
from lmworks.plan import cluster as clusters
from lmworks.plan import simulate, time
from lmworks.plan.choice import Choice
from lmworks.plan.cluster import Cluster
from lmworks.plan.shape import Ground
from lmworks.plan.states import exchanges
from lmworks.plan.time import boundary_bytes
from lmworks.plan.work import Work
from tests.plan.conftest import recipe

LAYOUTS = {
    "one": Layout(dp_shard=1),
    "fsdp": Layout(dp_shard=4),
    "hsdp": Layout(dp_replicate=2, dp_shard=2),
    "tp": Layout(dp_shard=2, tp=4, sequence_parallel=True),
    "tp whole": Layout(dp_shard=1, tp=2),
    "cp": Layout(dp_shard=2, cp=2),
    "ulysses": Layout(dp_shard=1, cp=2, context="ulysses"),
    "1f1b": Layout(pp=4, dp_shard=2),
    "gpipe": Layout(pp=4, dp_shard=4, schedule="gpipe"),
    "interleaved": Layout(pp=2, dp_shard=2, tp=2, schedule="interleaved-1f1b", stages_per_rank=2),
    "v": Layout(pp=2, dp_shard=1, schedule="zero-bubble-v"),
    "split": Layout(pp=2, dp_shard=1, split=(3, 5)),
}
CODED = {"weights_as": "int8", "gradients_as": "int4", "block": 64, "feedback": 0.5}
PLACEMENTS = {
    "zero-1": Layout(dp_shard=4, state=StatePlacement(weights=1, gradients=1)),
    "zero-2": Layout(dp_shard=4, state=StatePlacement(weights=1)),
    "zero-3": Layout(dp_shard=4, state=StatePlacement()),
    "mics": Layout(dp_shard=4, state=StatePlacement(weights=2, gradients=2, optimizer=2)),
    "hpz": Layout(dp_shard=4, state=StatePlacement(secondary=2)),
    "three": Layout(dp_shard=8, state=StatePlacement(weights=2, gradients=4, levels=(2, 4))),
    "four": Layout(dp_shard=16, state=StatePlacement(weights=2, gradients=4, optimizer=8)),
    "with tp, cp": Layout(dp_shard=2, cp=2, tp=2, state=StatePlacement(weights=2)),
    "uneven": Layout(dp_shard=3, cp=2, state=StatePlacement(weights=3)),
    "pipeline": Layout(pp=2, dp_shard=4, state=StatePlacement(weights=1, gradients=2)),
    "pipeline, weights": Layout(pp=2, dp_shard=4, state=StatePlacement(weights=2)),
    "coded": Layout(dp_shard=8, state=StatePlacement(levels=(2, 4), secondary=2, secondary_as="int8", **CODED)),  # type: ignore[arg-type]
    "coded, three": Layout(dp_shard=8, state=StatePlacement(weights=2, gradients=4, levels=(2, 4), **CODED)),  # type: ignore[arg-type]
}
OPTIMIZERS: list[dict[str, Any]] = [
    {"use": "adamw", "lr": 1e-3},
    {"use": "muon", "lr": 1e-3},
    {"use": "sophia", "lr": 1e-3},
    {"use": "coat", "around": {"use": "adamw", "lr": 1e-3}},
]
POLICIES: list[Any] = [
    "keep",
    "recompute",
    {"use": "recompute", "every": 2},
    {"use": "recompute", "keep": "products"},
    {"use": "by-block", "rules": [{"blocks": [0, 1, 5], "policy": "recompute"}]},
]


def choice_of(settings: Any, layout: Layout, rows: int = 1) -> Choice:
    own = settings.batch_size // layout.size("batch")
    return Choice(layout=layout, rows=rows, micro_batches=own // rows, saved=settings.saved)


def same(settings: Any, layout: Layout, cluster: Cluster, rows: int = 1) -> None:
    """Every rank takes what its place is told, and the places that matter have the largest."""
    choice, ground = choice_of(settings, layout, rows), Ground(settings, cluster)
    whole = dataclasses.replace(settings, layout=layout, micro_batch_size=rows)
    device = "cuda" if cluster.kind == "gpu" else "cpu"
    whole = dataclasses.replace(whole, device=device)
    told = [predict(whole, layout, rank, vocabulary=ground.vocabulary) for rank in range(layout.ranks)]
    for place in range(layout.pp):
        mine = [told[rank] for rank in range(layout.ranks) if layout.place(rank, "pp") == place]
        mine_at_most, found = max(mine, key=lambda footprint: footprint.total), ground.footprint(choice, place)
        assert found == mine_at_most
    largest = max(ground.footprint(choice, place).total for place in ground.places(choice))
    assert largest == max(ground.footprint(choice, place).total for place in range(layout.pp))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_memory_is_the_footprint_under_every_layout(layout: str, kind: str) -> None:
    cluster = clusters.load("dgx-a100" if kind == "gpu" else "laptop")
    same(recipe(), LAYOUTS[layout], cluster)


@pytest.mark.parametrize("saved", POLICIES, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_is_the_footprint_under_every_policy(saved: Any, precision: str, laptop: Cluster) -> None:
    same(recipe(saved=saved, precision=precision), LAYOUTS["1f1b"], laptop, rows=2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("rows", [1, 4])
def test_what_is_whole_for_a_while(precision: str, reshard: bool, rows: int, laptop: Cluster) -> None:
    """FSDP over 4 ranks, one micro-batch or four: weights gathered, gradients that wait, counted name by name."""
    settings = recipe(precision=precision)
    layout = Layout(dp_shard=4, reshard=reshard)
    ground = Ground(settings, laptop)
    values = {name: math.prod(shape) for name, shape in ground.shape.shapes()}
    around = sum(size for name, size in values.items() if not name.startswith("blocks."))
    block = sum(size for name, size in values.items() if name.startswith("blocks.0."))
    used = 4 if precision == "fp32" else 2
    gathered = used * (around + block * (2 if reshard else 8))
    waiting = 4 * (around + 8 * block) if rows == 1 else (4 + used) * (around + block)
    assert ground.whole(choice_of(settings, layout, rows), 0) == gathered + waiting
    assert ground.whole(choice_of(settings, Layout(dp_replicate=4, dp_shard=1), rows), 0) == 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda table: str(table["use"]))
@pytest.mark.parametrize("tied", [True, False])
def test_memory_is_the_footprint_under_every_optimizer(optimizer: dict[str, Any], tied: bool, laptop: Cluster) -> None:
    settings = recipe(optimizer=optimizer, model={"tied": tied})
    same(settings, LAYOUTS["one"], laptop)
    same(settings, LAYOUTS["hsdp"], laptop)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_is_the_footprint_under_every_placement_of_states(
    placement: str, precision: str, laptop: Cluster
) -> None:
    same(recipe(precision=precision, model={"tied": True}), PLACEMENTS[placement], laptop)
    same(recipe(precision=precision, optimizer=OPTIMIZERS[3]), PLACEMENTS[placement], laptop)


def test_placements_of_the_list_are_legal() -> None:
    for name, layout in PLACEMENTS.items():
        assert not problems_of(dataclasses.replace(recipe(batch_size=48), layout=layout, micro_batch_size=1)), name


def test_memory_of_unlike_blocks_and_experts(laptop: Cluster) -> None:
    same(recipe(model={"ffn_size": [176, 176, 96, 96, 176, 64, 64, 64]}), LAYOUTS["1f1b"], laptop)
    experts = {"experts": {"count": 4, "top_k": 2, "first_dense": 1}}
    same(recipe(model=experts), Layout(dp_shard=4, ep=2), laptop)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved-1f1b"])
@pytest.mark.parametrize("pp", [2, 4])
def test_live_micro_batches_are_the_orders(schedule: str, pp: int, laptop: Cluster) -> None:
    for m in (pp, 2 * pp, 5 * pp):
        held = 2 if schedule == "interleaved-1f1b" else None
        layout = Layout(pp=pp, dp_shard=1, schedule=schedule, stages_per_rank=held)  # type: ignore[arg-type]
        peak = order(schedule, ranks=pp, micro_batches=m, stages_per_rank=held).peak_live
        ground = Ground(recipe(), laptop)
        assert [ground.live(layout, m, place) * layout.held for place in range(pp)] == list(peak)


# --- bytes that are sent ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["fsdp", "hsdp", "tp whole", "cp", "ulysses", "1f1b", "gpipe", "interleaved", "v"])
@pytest.mark.parametrize("saved", ["keep", "recompute"])
def test_seconds_over_a_byte_a_second_are_the_traffic(layout: str, saved: str, unit: Cluster) -> None:
    """Links of one byte a second and no latency: seconds are bytes, and they are the formulas' of `traffic`."""
    settings, chosen = recipe(saved=saved), LAYOUTS[layout]
    choice = choice_of(settings, chosen)
    work = Work(Ground(settings, unit))
    again = frozenset(range(8)) if saved == "recompute" else frozenset()
    step = Step(rows=1, micro_batches=choice.micro_batches, sequence=128, value_bytes=2, recomputed=again)
    for place in range(chosen.pp):
        rank = next(r for r in range(chosen.ranks) if chosen.place(r, "pp") == place)
        want = traffic(work.ground.shape, chosen, rank, step)
        found = _sent(work, choice, place)
        for axis in ("tp", "fsdp", "dp_replicate"):
            assert found[axis] == pytest.approx(want.get(axis, 0.0), rel=1e-12), (axis, place)
        documents = chosen.size("cp") > 1 and choice.micro_batches * 0.5 * 128 * 8
        assert found["cp"] + documents == pytest.approx(want.get("cp", 0.0), rel=1e-12)
        assert found["pp"] == pytest.approx(want.get("pp", 0.0), rel=1e-12)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_exchanges_of_a_placement_are_the_traffic_by_axis(placement: str, laptop: Cluster) -> None:
    settings, layout, m = recipe(model={"tied": False}), PLACEMENTS[placement], 4
    ground = Ground(settings, laptop)
    step = Step(rows=1, micro_batches=m, sequence=128, value_bytes=2)
    for place in range(layout.pp):
        want = traffic(ground.shape, layout, place * (layout.ranks // layout.pp), step)
        found: dict[str, float] = defaultdict(float)
        for stage in ground.held(layout, place):
            around = [ground.named((name,)) for name in ground.around(stage)]
            blocks = [ground.named((f"blocks.{number}.",)) for number in range(stage.start, stage.stop)]
            for each in [e for names in (*around, *blocks) for e in exchanges(names, layout, value=2)]:
                times = 1 if each.moment == "once" or layout.pp > 1 else m
                found[each.axis] += times * each.sent
        axes = {axis for axis in {*want, *found} if axis.partition("/")[0] in STATE_AXES}
        assert axes
        for axis in axes:
            assert found[axis] == pytest.approx(want.get(axis, 0.0), rel=1e-12), (axis, place)


@pytest.mark.parametrize("placement", [name for name in PLACEMENTS if "coded" not in name])
def test_seconds_of_a_placement_over_a_byte_a_second_are_its_bytes(placement: str, unit: Cluster) -> None:
    """Computing takes no time and links carry a byte a second: all that a step waits for is bytes. Exchanges of tp and
    cp take as long, and some of a placement's hide behind them."""
    settings, layout = recipe(batch_size=48), PLACEMENTS[placement]
    choice = choice_of(settings, layout)
    work = Work(Ground(settings, unit))
    step = Step(rows=1, micro_batches=choice.micro_batches, sequence=128, value_bytes=2)
    told = [traffic(work.ground.shape, layout, rank, step) for rank in range(layout.ranks)]
    rank_bytes = max(sum(size for axis, size in each.items() if axis in STATE_AXES) for each in told)
    for seconds in (simulate.of_choice(work, choice).seconds, time.of_step(work, choice)):
        waited = seconds.gather + seconds.reduce
        if layout.pp == layout.cp == layout.tp == 1:
            assert waited == pytest.approx(rank_bytes, rel=1e-6)
        else:
            assert 0 < waited <= rank_bytes * (1 + 1e-6)


def _sent(work: Work, choice: Choice, place: int) -> dict[str, float]:
    """Bytes of a place's first rank in a step, from the pieces."""
    ground, layout, m = work.ground, choice.layout, choice.micro_batches
    found = dict.fromkeys(("tp", "cp", "pp", "fsdp", "dp_replicate"), 0.0)
    reshards = layout.pp == 1
    for stage in ground.held(layout, place):
        pieces = work.pieces(choice, stage)
        for i, piece in enumerate(pieces):
            block = stage.start + i - (1 if stage.first else 0)
            inside = stage.start <= block < stage.stop and not (stage.first and i == 0)
            again = inside and choice.saved.again(block)
            found["tp"] += m * (piece.tensor_forward + piece.tensor_backward + (piece.tensor_again if again else 0.0))
            found["cp"] += m * (piece.context_forward * (2 if again else 1) + piece.context_backward)
            times = (m if layout.pp == 1 else 1) * (2 if reshards and inside else 1)
            found["fsdp"] += times * piece.bytes_gather + piece.bytes_reduce
            found["dp_replicate"] += piece.bytes_replicate
        number = ground.stages(layout).index(stage)
        for other in (number - 1, number + 1):
            mine = ground.held(layout, place)
            if 0 <= other < len(ground.stages(layout)) and ground.stages(layout)[other] not in mine:
                found["pp"] += m * boundary_bytes(work, choice)
    return found


def test_a_layout_of_the_list_is_legal() -> None:
    for name, layout in LAYOUTS.items():
        settings = dataclasses.replace(recipe(), layout=layout, micro_batch_size=1)
        assert not problems_of(settings), name


def test_a_table_of_unknown_size_is_refused(laptop: Cluster) -> None:
    settings = recipe()
    file = decode_part("tokenizer", {"use": "file", "path": "nowhere.json"})
    data = dataclasses.replace(settings.data, tokenizer=file)
    model = dataclasses.replace(settings.model, vocab_size=None)
    with pytest.raises(UsageError, match="size of the token table"):
        Ground(dataclasses.replace(settings, data=data, model=model), laptop)
