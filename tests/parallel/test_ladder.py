"""States placed over three levels of links: what is learned is what one process learns, and who sends what where."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from lmworks.parallel import gang
from lmworks.parallel.levels import by_level
from lmworks.parallel.traffic import traffic
from lmworks.train.rehearse import UNPLANNED, Seen, perform
from tests.parallel import ladders
from tests.parallel.ladders import LAYOUTS, MODEL, RANKS, STEPS, Case
from tests.parallel.test_layouts import covered

pytestmark = pytest.mark.ranks
on_eight = pytest.mark.slow
"""Half a minute for the first one of each kind, where two cores run eight ranks."""
MICROS = {4: "whole", 1: "accumulated"}


@cache
def one() -> Seen:
    """One process, all rows at once."""
    return perform(0, ladders.scene_of(ladders.Layout(dp_shard=1)), torch.float64, STEPS)


@cache
def ran(micro: int) -> dict[str, list[Seen]]:
    """Every layout on eight ranks: what each rank saw."""
    found = gang.run(ladders.trained, RANKS, [Case(name, micro) for name in LAYOUTS])
    return {name: [seen[i] for seen in found] for i, name in enumerate(LAYOUTS)}


@on_eight
@pytest.mark.parametrize("micro", MICROS, ids=MICROS.values())
@pytest.mark.parametrize("name", LAYOUTS)
def test_five_steps_on_eight_ranks_are_those_of_one(name: str, micro: int) -> None:
    found, want = ran(micro)[name], one()
    for seen in found:
        assert seen.losses == pytest.approx(want.losses, rel=1e-12)
        assert seen.norms == pytest.approx(want.norms, rel=1e-10)
    covered(found, want, lambda seen: seen.gradients, 1e-10)
    covered(found, want, lambda seen: seen.weights, 1e-8)


@on_eight
@pytest.mark.parametrize("micro", MICROS, ids=MICROS.values())
@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_are_the_formulas_to_the_last_one(name: str, micro: int) -> None:
    scene = Case(name, micro).scene
    for rank, seen in enumerate(ran(micro)[name]):
        sent = {axis: size for axis, size in seen.sent(STEPS).items() if axis not in UNPLANNED}
        assert sent == traffic(MODEL, scene.layout, rank, scene.work(value_bytes=8)), rank


def network(name: str, micro: int) -> list[float]:
    """Bytes of a step that each rank sends to another node."""
    found = []
    for rank, seen in enumerate(ran(micro)[name]):
        found.append(by_level(LAYOUTS[name], rank, {key: size for key, (_, size) in seen.bills.items()})[-1] / STEPS)
    return found


@on_eight
@pytest.mark.parametrize("name", ["topo", "mics", "ddp", "zero-1"])
def test_what_crosses_the_network_once_a_step_does_not_grow_with_micro_batches(name: str) -> None:
    assert network(name, 1) == network(name, 4)
    assert sum(network(name, 1)) > 0


@on_eight
def test_full_sharding_crosses_it_with_every_micro_batch() -> None:
    assert network("zero-3", 1) == [4 * size for size in network("zero-3", 4)]


@on_eight
def test_a_second_copy_takes_the_backward_gather_off_the_network() -> None:
    """Blocks are gathered twice by ZeRO-3, once of all ranks and once of a node by hpZ; the rest is alike."""
    case = Case("hpz", 4).scene
    blocks = sum(torch.Size(shape).numel() for name, shape in MODEL.shapes() if name.startswith("blocks."))
    padded = blocks + sum(-size[0] % 8 * torch.Size(size[1:]).numel() for n, size in MODEL.shapes() if "blocks." in n)
    for rank, seen in enumerate(ran(4)["hpz"]):
        told = seen.sent(STEPS)
        assert told["secondary"] == 8 * padded * 3 / 4
        more = ran(4)["zero-3"][rank].sent(STEPS)["weights"] - told["weights"]
        assert more == 8 * padded * 7 / 8
    assert case.layout.size("secondary") == 4


def test_a_second_copy_is_never_older_than_the_weights() -> None:
    for plain, copied in gang.run(ladders.after_a_change, 4):
        assert copied == pytest.approx(plain, rel=1e-12)


def test_in_bf16_weights_are_narrow_and_masters_wide() -> None:
    for plain, ladder in gang.run(ladders.in_bf16, 4):
        assert plain[:2] == ("torch.float32", "torch.float32")
        assert ladder[:2] == ("torch.bfloat16", "torch.float32")
        assert ladder[2] == pytest.approx(plain[2], rel=1e-2)
