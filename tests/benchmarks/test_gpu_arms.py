"""The arms of the GPU benchmarks: each is a recipe that lmworks takes, or is left out for what is not there yet."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from lmworks.core.catalogue import SLOTS

HAS_TORCHAO = importlib.util.find_spec("torchao") is not None


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    import gpu_arms

    made = argparse.Namespace(size="toy", device="cpu", batch=2, sequence=32, arms=list(gpu_arms.ARMS))
    gpu_arms.write_rows(tmp_path, made, rows=4)
    return made


def there(over: dict[str, Any]) -> bool:
    """Whether the catalogue has every part of an arm."""
    used = {slot: value["use"] for slot, value in over.items() if isinstance(value, dict)}
    return all(name in SLOTS[slot].parts for slot, name in used.items())


def test_an_arm_is_left_out_only_for_what_is_not_there(options: argparse.Namespace, tmp_path: Path) -> None:
    import gpu_arms

    for name, arm in gpu_arms.ARMS.items():
        reason = gpu_arms.why_not(name, options, tmp_path)
        if not there(arm.over):
            assert reason is not None
            assert "is called" in reason, name
        elif "float8" in name and not HAS_TORCHAO:
            assert "torchao" in str(reason)
        elif reason is not None:
            assert name == "recompute-selective", reason
            assert "has no setting 'keep'" in reason


def test_left_out_arms_are_told(
    options: argparse.Namespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu_arms

    gpu_arms.ARMS["unheard-of"] = gpu_arms.Arm(line="", over={"saved": {"use": "unheard-of"}})
    options.arms = ["eager", "unheard-of"]
    left = gpu_arms.those_that_run(options, tmp_path)
    assert options.arms == ["eager"]
    assert list(left) == ["unheard-of"]
    assert "LEFT OUT: unheard-of" in capsys.readouterr().err


def test_an_arm_is_the_run_of_its_recipe(options: argparse.Namespace, tmp_path: Path) -> None:
    import gpu_arms

    built = gpu_arms.opened("recompute", options, tmp_path, rows=2)
    assert built.recipe.precision == "bf16"
    first, second = built.step(), built.step()
    assert first.targets == 2 * (32 - 1), "one document a row; nothing follows its last token"
    assert second.loss < first.loss + 1.0
    stays = gpu_arms.held(built)
    parameters = sum(p.numel() for p in built.placement.model.parameters())
    assert stays["weights"] == stays["gradients"] == 4 * parameters
    assert stays["optimizer"] == pytest.approx(8 * parameters, rel=0.01), "two moments, and a count for each tensor"


def test_a_run_that_would_not_end_in_time_is_stopped() -> None:
    import gpu_arms

    budget = gpu_arms.Budget(0.02)
    found = budget.run([sys.executable, "-c", "import time; time.sleep(60)"])
    assert found == {"failed": "the budget of minutes ended"}
    assert not budget.has_room()


def test_a_run_tells_its_last_line_or_its_last_words() -> None:
    import gpu_arms

    budget = gpu_arms.Budget(1.0)
    assert budget.run([sys.executable, "-c", "print('noise'); print('{\"a\": 1}')"]) == {"a": 1}
    assert "no room" in budget.run([sys.executable, "-c", "raise SystemExit('no room')"])["failed"]
    assert budget.has_room()
