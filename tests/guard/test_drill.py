"""Real runs of two gloo ranks under a driver, each with one fault: seen, mended, and the same to the last bit."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from lmworks.core import recipe as recipes
from lmworks.guard.drill import RULES, Scene, drill, undisturbed
from lmworks.guard.report import Folder, report_at
from tests.train import ranked, toy

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks end with their agent on Linux")
STEPS, EVERY, FAULT = 14, 4, 7


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """14 steps of two data parallel ranks, a checkpoint every 4."""
    home = tmp_path_factory.mktemp("drill")
    checkpoints = {"every": EVERY, "keep": 9}
    table = ranked.table(toy.corpus(home / "text"), home / "cache", steps=STEPS, threads=1, checkpoints=checkpoints)
    path = home / "recipe.toml"
    path.write_text(recipes.dump(recipes.decode(table)))
    return Scene(recipe=str(path), ranks=2, folder=home / "runs", minutes=5, rules=RULES)


@pytest.fixture(scope="module")
def twin(scene: Scene) -> Path:
    return undisturbed(scene)


def leaves_nobody(run: Path) -> None:
    """Neither agents nor ranks are left."""
    for path in Folder(run).nodes.glob("*.json"):
        report = report_at(path)
        assert report is not None
        for pid in (report.pid, *(rank.pid for rank in report.ranks)):
            assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.ranks
def test_a_killed_rank_costs_the_steps_since_the_checkpoint(scene: Scene, twin: Path) -> None:
    found = drill(scene, twin, kind="kill", at="backward", step=FAULT, rank=1)
    assert found.passed, found
    assert (found.kind, found.named, found.attempts) == ("killed", True, 2)
    assert found.lost_steps == FAULT - 1 - EVERY
    leaves_nobody(scene.folder / "kill-backward")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "at", "taken_for"),
    [
        ("hang", "reduce", "silent"),
        ("stuck", "forward", "hang"),
        ("nan", "backward", "nan"),
        ("corrupt", "update", "killed"),
        ("diskfull", "save", "unsaved"),
        ("kill", "load", "killed"),
        ("kill", "save", "killed"),
    ],
)
def test_faults_are_seen_mended_and_leave_no_trace(
    scene: Scene, twin: Path, kind: str, at: str, taken_for: str
) -> None:
    found = drill(scene, twin, kind=kind, at=at, step=FAULT, rank=1)
    assert found.passed, found
    assert found.kind == taken_for
    assert found.attempts == (1 if kind == "diskfull" else 3 if kind == "corrupt" or at == "load" else 2)
    aside = list((scene.folder / f"{kind}-{at}" / "checkpoints").glob("damaged-*"))
    assert len(aside) == (kind == "corrupt")
    leaves_nobody(scene.folder / f"{kind}-{at}")


@pytest.mark.slow
def test_ranks_train_on_while_their_driver_is_dead(scene: Scene, twin: Path) -> None:
    found = drill(scene, twin, kind="driver", at="update", step=FAULT, rank=0)
    assert found.passed, found
    assert (found.kind, found.attempts, found.lost_steps) == ("driver", 1, 0)
    assert [path.name for path in Folder(scene.folder / "driver-update").logs.glob("attempt_*")] == ["attempt_0"]
    leaves_nobody(scene.folder / "driver-update")
