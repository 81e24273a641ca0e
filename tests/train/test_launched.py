"""Real training runs that a launcher starts: a rank is killed, all start again, the run is bitwise the unbroken one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lmworks.core import recipe as recipes
from lmworks.core.run import RunFolder
from lmworks.model.checkpoint import complete
from lmworks.train import save
from tests.train import ranked, toy

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(sys.platform != "linux", reason="ranks are found in /proc"),
]
STEPS = 40


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 steps of a pipeline of two, a checkpoint every 5."""
    home = tmp_path_factory.mktemp("launched")
    model = ranked.MODEL | {"hidden_size": 64, "ffn_size": 128}
    over: dict[str, Any] = {"steps": STEPS, "layout": {"pp": 2}, "micro_batch_size": 2, "model": model, "threads": 1}
    table = ranked.table(toy.corpus(home / "text"), home / "cache", **over)
    path = home / "recipe.toml"
    path.write_text(recipes.dump(recipes.decode(table)))
    return path


def words(starter: str, recipe: Path, run: Path) -> list[str]:
    """The command of a person."""
    if starter == "launch":
        how = ["lmworks", "launch", str(recipe), "--local", "2", "--max-restarts", "1"]
    else:
        how = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
        how += ["-m", "--", "lmworks", "train", str(recipe)]  # without the -- it takes --run for its own --run-path
    return [sys.executable, "-m", *how, "--run", str(run)]


@pytest.fixture(scope="module")
def unbroken(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("unbroken") / "run")
    done = subprocess.run(
        words("launch", recipe, folder.path), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(folder.path)], "the first rank says where the run is, once"
    return folder


@pytest.mark.parametrize("starter", ["launch", "torchrun"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_costs_nothing(
    starter: str, victim: int, recipe: Path, unbroken: RunFolder, tmp_path: Path
) -> None:
    """kill -9 after step 12: all ranks start again from step 10 and end as if nothing had happened."""
    folder = RunFolder(tmp_path / "run")
    with (tmp_path / "said").open("w") as said:
        environment = {**os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2"}  # for a peer that waits for the dead one
        process = subprocess.Popen(words(starter, recipe, folder.path), stdout=said, stderr=said, env=environment)
        until = time.monotonic() + 120
        while seen(folder) < 12:
            assert process.poll() is None, (tmp_path / "said").read_text()
            assert time.monotonic() < until, "the run does not begin"
            time.sleep(0.01)
        os.kill(pid_of(process.pid, victim), signal.SIGKILL)
        code = process.wait(timeout=300)
    assert code == 0, (tmp_path / "said").read_text()
    assert len(json.loads(folder.record.read_text())["attempts"]) == 2
    assert toy.learned(folder) == toy.learned(unbroken)
    ours, theirs = (save.read(complete(each.checkpoints)[-1]) for each in (folder, unbroken))
    for kind in ("model", "optimizer"):
        assert ours.tensors[kind].keys() == theirs.tensors[kind].keys()
        assert all((ours.tensors[kind][name] == value).all() for name, value in theirs.tensors[kind].items())
    assert ours.state["source"] == theirs.state["source"]


def test_a_rank_killed_in_the_middle_of_a_save_costs_nothing(recipe: Path, unbroken: RunFolder, tmp_path: Path) -> None:
    """A save after every step, so that one is going on when the rank dies: the checkpoint before it holds."""
    folder = RunFolder(tmp_path / "run")
    with (tmp_path / "said").open("w") as said:
        command = [*words("launch", recipe, folder.path), "--set", "checkpoints.every=1"]
        process = subprocess.Popen(command, stdout=said, stderr=said)
        until = time.monotonic() + 120
        while seen(folder) < 6 or not list(folder.checkpoints.glob(".writing-step-*")):
            assert process.poll() is None, (tmp_path / "said").read_text()
            assert time.monotonic() < until, "no save was seen"
        os.kill(pid_of(process.pid, 1), signal.SIGKILL)
        code = process.wait(timeout=300)
    assert code == 0, (tmp_path / "said").read_text()
    assert len(json.loads(folder.record.read_text())["attempts"]) == 2
    assert toy.learned(folder) == toy.learned(unbroken)
    assert not list(folder.checkpoints.glob(".writing-*"))


def seen(folder: RunFolder) -> int:
    """The newest step in metrics.jsonl."""
    if not folder.metrics.is_file():
        return 0
    whole = [line for line in folder.metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return max((json.loads(line)["step"] for line in whole), default=0)


def pid_of(launcher: int, rank: int) -> int:
    """The process of a rank, below the launcher."""
    waiting = [launcher]
    while waiting:
        pid = waiting.pop()
        try:
            waiting += [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if pid != launcher and f"RANK={rank}".encode() in environment:
            return pid
    pytest.fail(f"rank {rank} is not there")
