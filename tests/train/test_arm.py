"""An arm whose layout names several ranks is trained on them, as a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmworks.core.errors import UsageError
from lmworks.train.arm import Measured, train_arm
from tests.train import ranked, toy

pytestmark = pytest.mark.ranks


def spec(tmp_path: Path, **over: Any) -> dict[str, Any]:
    plain = {"layout": {"pp": 2}, "micro_batch_size": 2, "steps": 4, "threads": 1, "checkpoints": {}}
    return ranked.table(toy.corpus(tmp_path / "text"), tmp_path / "cache", **plain | over)


def test_a_pipeline_learns_what_one_rank_learns_and_tells_how_long_it_waited(tmp_path: Path) -> None:
    assert train_arm(spec(tmp_path), str(tmp_path / "two")) == {"failed": None}
    assert train_arm(spec(tmp_path, layout={"dp_shard": 1}), str(tmp_path / "one")) == {"failed": None}
    two, one = (Measured.of(tmp_path / name) for name in ("two", "one"))
    assert two.values("loss") == pytest.approx(one.values("loss"), rel=1e-5)
    assert len(two.values("pipeline/idle_share")) == 4
    assert not one.values("pipeline/idle_share")
    assert train_arm(spec(tmp_path), str(tmp_path / "two")) == {"failed": None}, "a second call finds it done"
    assert len(list((tmp_path / "two" / "logs").iterdir())) == 2


def test_a_loss_that_explodes_on_ranks_is_an_answer(tmp_path: Path) -> None:
    rate = {"use": "sgd", "lr": 1e38}
    found = train_arm(spec(tmp_path, optimizer=rate, gradient=[], steps=8), str(tmp_path / "run"))
    assert "the update was not made" in found["failed"]


def test_a_rule_does_not_say_how_many_ranks(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must say how many ranks"):
        train_arm(spec(tmp_path, layout={"use": "torchtitan"}), str(tmp_path / "run"))
