"""What travels as codes, through FSDP and the ladder: near what travels plain, in the bytes of the formulas."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from lmworks.maths.blockwise import INT8, Runs, quantise
from lmworks.parallel import gang
from lmworks.parallel.state import StatePlacement
from lmworks.parallel.traffic import traffic
from lmworks.train.rehearse import UNPLANNED, Seen, perform, placed, stepping
from tests.parallel.table import MODELS, Case, train_all

pytestmark = pytest.mark.ranks

STEPS = 2
QWZ: dict[str, Any] = {"weights_as": "int8", "block": 64}
QGZ: dict[str, Any] = {"gradients_as": "int4", "block": 64}
TOPO: dict[str, Any] = {"weights": 2, "levels": (2,)}


def case(name: str, **state: Any) -> Case:
    more = {key: state.pop(key) for key in ("micro", "model", "recompute") if key in state}
    return Case(name, {"dp_shard": 4, "state": StatePlacement(**state)}, **{"micro": 1, **more})


CASES = [
    case("plain"),
    case("qwz", **QWZ),
    case("qwz-recompute", recompute=True, **QWZ),
    case("qwz-hpz", secondary=2, **QWZ),
    case("copy", secondary=2, secondary_as="int8", block=64),
    case("copy-recompute", secondary=2, secondary_as="int8", block=64, recompute=True),
    case("copy-of-codes", secondary=2, secondary_as="int8", **QWZ),
    case("copy-among-all", secondary=4, secondary_as="int8", model="gpt2", block=64),
    case("qgz-one-hop", **QGZ),
    case("qgz-two-hops", levels=(2,), **QGZ),
    case("qgz-feedback", levels=(2,), feedback=0.9, **QGZ),
    case("both", levels=(2,), **QWZ | QGZ),
    case("both-experts", levels=(2,), model="experts", **QWZ | QGZ),
    case("topo", **TOPO, **QGZ),
    case("topo-all", **TOPO, secondary=4, secondary_as="int8", **QWZ | QGZ),
    case("topo-copy-of-pair", **TOPO, secondary=2, secondary_as="int8", gradients_as="int8", block=64),
    case("zero-2", weights=1, levels=(2,), **QGZ),
    Case(
        "both-copy-tp-2",
        {"dp_shard": 2, "tp": 2, "state": StatePlacement(secondary=2, secondary_as="int8", **QWZ | QGZ)},
        micro=2,
    ),
    Case("both-of-cp-2", {"dp_shard": 2, "cp": 2, "state": StatePlacement(levels=(2,), **QWZ | QGZ)}, micro=2),
    Case("both-pp-2", {"pp": 2, "dp_shard": 2, "state": StatePlacement(**QWZ | QGZ)}, micro=1),
    Case("zero-2-pp-2", {"pp": 2, "dp_shard": 2, "state": StatePlacement(weights=1, **QGZ)}, micro=1),
]
BY_NAME = {each.name: each for each in CASES}


@cache
def ran() -> dict[str, list[Seen]]:
    found = gang.run(train_all, 4, CASES, torch.float32, STEPS)
    return {each.name: [seen[i] for seen in found] for i, each in enumerate(CASES)}


@cache
def one(model: str) -> Seen:
    return perform(0, Case("one", model=model).scene, torch.float32, STEPS)


@pytest.mark.parametrize("name", BY_NAME)
def test_what_travels_as_codes_is_near_what_travels_plain(name: str) -> None:
    """All ranks are of one mind. The first loss hangs on the form of weights only; the first norm has the errors of two
    hops of int4, which add 2 x 0.1^2 to 0.15^2 of its square."""
    each = BY_NAME[name]
    want, exact = one(each.model), each.axes["state"].weights_as == "plain"
    for seen in ran()[name]:
        assert (seen.losses, seen.norms) == (ran()[name][0].losses, ran()[name][0].norms)
        off = abs(seen.losses[0] / want.losses[0] - 1)
        assert off < 1e-6 if exact else 1e-6 < off < 1e-3
        assert seen.losses == pytest.approx(want.losses, rel=5e-3)
        assert seen.norms[0] == pytest.approx(want.norms[0], rel=0.025)


@pytest.mark.parametrize("name", [name for name in BY_NAME if name != "plain"])
def test_it_is_rounded_at_all(name: str) -> None:
    """What a case codes reaches the update: a copy that nobody read would leave the norm of gradients as it was."""
    each = BY_NAME[name]
    assert abs(ran()[name][0].norms[0] / one(each.model).norms[0] - 1) > 1e-5


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("qwz-recompute", "qwz"),  # a pass that is run again sees the same weights
        ("qwz-hpz", "qwz"),  # so does one that reads a plain copy of what the codes told
        ("copy-of-codes", "qwz"),  # and one that reads a copy in codes of its own
        ("zero-2", "qgz-two-hops"),  # gradients take the same two hops, whoever holds the weights
    ],
)
def test_ways_that_code_the_same_values_give_the_same_run(name: str, same: str) -> None:
    assert ran()[name][0].losses == ran()[same][0].losses


@pytest.mark.parametrize("model", ["tied", "experts"])
def test_a_gathered_weight_is_what_its_parts_codes_tell(model: str) -> None:
    """The first loss of one process whose weights are coded part by part, tensor by tensor, outside of FSDP."""
    scene = Case("one", model=model).scene
    made = placed(0, scene, torch.float32)
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.requires_grad:
                for rows in parameter.split(-(-parameter.shape[0] // 4)):
                    runs = Runs(lengths=(rows.numel(),), block=64)
                    rows.copy_(quantise(rows.reshape(1, -1), INT8, runs).decode().view_as(rows))
    name = "qwz" if model == "tied" else "both-experts"
    assert ran()[name][0].losses[0] == pytest.approx(stepping(made, scene)().loss, rel=1e-6)


@pytest.mark.parametrize("name", BY_NAME)
def test_bytes_are_those_of_the_formulas(name: str) -> None:
    """Of every axis, hops apart, to the byte."""
    each = BY_NAME[name]
    work = each.scene.work(value_bytes=4)
    for rank, seen in enumerate(ran()[name]):
        sent = {axis: size for axis, size in seen.sent(STEPS).items() if axis not in UNPLANNED}
        assert sent == pytest.approx(traffic(MODELS[each.model], each.layout, rank, work), rel=1e-12)
