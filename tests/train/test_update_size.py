"""How far an update moves the weights is what it moved, exactly for small tensors and nearly for large ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lmworks.train.objective import CrossEntropy
from lmworks.train.probe import Probe
from lmworks.train.update_size import MOST_VALUES, UpdateSize
from tests.train import toy


def moved(parameters: list[nn.Parameter], every: int, updates: int, share: float) -> list[float | None]:
    """What is noted of each update that makes every value larger by a share of it."""
    probe = Probe(toy.model(), CrossEntropy(), seed=0)
    size = UpdateSize(parameters, probe, every=every)
    found = []
    for _ in range(updates):
        probe.begin()
        with size.measured(), torch.no_grad():
            for parameter in parameters:
                parameter.mul_(1 + share)
        found.append(probe.notes().get("update_ratio"))
    return found


def test_small_tensors_are_looked_at_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 7), (3,))]
    found = moved(parameters, every=2, updates=4, share=0.01)
    assert found[0] is None
    assert found[2] is None
    assert found[1] == pytest.approx(0.01, rel=1e-5)
    assert found[3] == pytest.approx(0.01, rel=1e-5)


def test_large_ones_are_sampled_and_weigh_by_their_size() -> None:
    """A large tensor that does not move, beside a small one that does."""
    still, moving = nn.Parameter(torch.ones(10 * MOST_VALUES)), nn.Parameter(torch.ones(100))
    probe = Probe(toy.model(), CrossEntropy(), seed=0)
    size = UpdateSize([still, moving], probe, every=1)
    with size.measured(), torch.no_grad():
        moving.mul_(2)
    assert probe.notes()["update_ratio"] == pytest.approx((100 / (100 + 10 * MOST_VALUES)) ** 0.5)


def test_weights_of_nothing_give_nothing() -> None:
    assert moved([nn.Parameter(torch.zeros(4))], every=1, updates=1, share=1.0) == [0.0]
    assert moved([], every=1, updates=1, share=1.0) == [0.0]
