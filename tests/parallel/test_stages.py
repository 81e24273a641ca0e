"""A pipeline tells before each piece of its work what it is and what follows, and is right about both."""

from __future__ import annotations

import pytest
import torch

from lmworks.parallel import gang
from lmworks.parallel.layout import Layout
from lmworks.parallel.schedule import Action, order
from lmworks.train.rehearse import placed, stepping
from tests.parallel.table import scene_of

pytestmark = pytest.mark.ranks


def heard(rank: int, schedule: str) -> list[tuple[str, str]]:
    """What a rank was told in two steps."""
    scene = scene_of("untied", Layout(dp_shard=1, pp=2, schedule=schedule), micro_rows=2)
    made = placed(rank, scene, torch.float32)
    found: list[tuple[str, str]] = []

    def hear(now: Action, then: Action | None) -> None:
        found.append((str(now), str(then)))

    assert made.pipeline is not None
    made.pipeline.on_stage = hear
    step = stepping(made, scene)
    step()
    step()
    return found


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved-1f1b", "zero-bubble-v", "dualpipe-v"])
def test_a_rank_is_told_what_it_does_and_what_follows(schedule: str) -> None:
    planned = order(schedule, ranks=2, micro_batches=4)
    for rank, found in enumerate(gang.run(heard, 2, schedule)):
        mine = [str(action) for action in planned.ranks[rank]]
        assert found == 2 * list(zip(mine, [*mine[1:], "None"], strict=True))
