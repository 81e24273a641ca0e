"""What codes take beside weights and gradients: a second copy, and what is fed back, as ranks have them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lmworks.parallel import gang
from lmworks.parallel.holdings import holdings
from lmworks.parallel.state import StatePlacement
from lmworks.train.rehearse import Scene
from tests.parallel.coded import held
from tests.parallel.table import LENGTH, MODELS, Case

pytestmark = pytest.mark.ranks

CODED: dict[str, Any] = {"secondary_as": "int8", "gradients_as": "int4", "feedback": 0.5, "block": 2}
STATES = {
    "zero++": {"secondary": 2, "levels": (2,)},
    "zero++-one-hop": {"secondary": 4},
    "topo": {"secondary": 4, "weights": 2, "levels": (2,)},
    "pairs": {"secondary": 2, "weights": 2, "gradients": 2},
}
MODEL = dataclasses.replace(MODELS["window"], vocab_size=256)


def scene(state: dict[str, Any]) -> Scene:
    case = Case("", {"dp_shard": 4, "state": StatePlacement(**CODED, **state)}, micro=2, model="window")
    return dataclasses.replace(case.scene, model=MODEL)


def test_second_copies_and_what_is_fed_back_take_what_is_told() -> None:
    """Rows that four ranks divide, in blocks of two values, so that nothing is filled up."""
    scenes = [scene(state) for state in STATES.values()]
    for rank, seen in enumerate(gang.run(held, 4, scenes)):
        for each, bytes_of in zip(scenes, seen, strict=True):
            told = holdings(MODEL, each.layout, rank, sequence=LENGTH, value=4, optimizer=each.optimizer)
            assert bytes_of == (told.copy, told.missed)
