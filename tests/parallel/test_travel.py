"""What travels as codes, through FSDP and the ladder: near what travels plain, in the bytes of the formulas."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from lmworks.parallel import gang
from lmworks.parallel.state import StatePlacement
from lmworks.train.rehearse import Seen, perform
from tests.parallel.table import Case, train_all

pytestmark = pytest.mark.ranks

STEPS = 3
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
    case("qgz-int8", levels=(2,), gradients_as="int8", block=64),
    case("qgz-feedback", levels=(2,), feedback=0.9, **QGZ),
    case("both", levels=(2,), **QWZ | QGZ),
    case("both-experts", levels=(2,), model="experts", **QWZ | QGZ),
    case("topo", **TOPO, **QGZ),
    case("topo-all", **TOPO, secondary=4, secondary_as="int8", **QWZ | QGZ),
    case("topo-copy-of-pair", **TOPO, secondary=2, secondary_as="int8", block=64),
    case("zero-2", weights=1, levels=(2,), **QGZ),
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
    """Three steps of AdamW, all ranks of one mind; the first loss hangs on weights only."""
    each = BY_NAME[name]
    state = each.axes["state"]
    want = one(each.model)
    for seen in ran()[name]:
        assert seen.losses == ran()[name][0].losses
        assert seen.norms == ran()[name][0].norms
        exact = state.weights_as == "plain"
        assert seen.losses[0] == pytest.approx(want.losses[0], rel=1e-6 if exact else 1e-3)
        assert (abs(seen.losses[0] - want.losses[0]) < 1e-6 * want.losses[0]) == exact
        assert seen.losses == pytest.approx(want.losses, rel=1e-2)
        print(name, seen.losses, want.losses, seen.norms[0], want.norms[0])
