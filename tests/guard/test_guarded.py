"""The command `lmworks guard`, with agents on several stand-ins for nodes: they die, are replaced, are stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from lmworks.core import recipe as recipes
from lmworks.core.journal import rows
from lmworks.core.run import RunFolder
from lmworks.guard.report import Folder, Report, report_at
from tests.train import ranked, toy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="ranks end with their agent on Linux"),
]
STEPS = 60


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 steps of as many data parallel ranks as there are, a checkpoint every 5."""
    home = tmp_path_factory.mktemp("guarded")
    model = ranked.MODEL | {"hidden_size": 64, "ffn_size": 128}
    table = ranked.table(toy.corpus(home / "text"), home / "cache", steps=STEPS, model=model, threads=1)
    path = home / "recipe.toml"
    path.write_text(recipes.dump(recipes.decode(table)))
    return path


def words(recipe: Path, run: Path, *more: str) -> list[str]:
    command = ["-m", "lmworks", "guard", str(recipe), "--run", str(run), "--missed", "5", "--still", "6", *more]
    return [sys.executable, *command]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    """Starts a command; whatever the test does, nobody is left."""
    started: list[subprocess.Popen[str]] = []

    def start(command: list[str]) -> subprocess.Popen[str]:
        started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()
    for path in tmp_path.rglob("guard/nodes/*.json"):
        report = report_at(path)
        if report is not None and psutil.pid_exists(report.pid):
            with suppress(ProcessLookupError):
                os.kill(report.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def unbroken(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("unbroken") / "run")
    done = subprocess.run(
        words(recipe, folder.path, "--ranks-per-node", "2"), capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(folder.path)]
    assert "step 60/60" in done.stderr, "what rank 0 writes is handed on"
    return folder


def newest(run: Path) -> int:
    """The newest complete checkpoint."""
    return max((int(path.parent.name[5:]) for path in run.glob("checkpoints/step-*/manifest.json")), default=0)


def until(true: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.02)


def report_of(run: Path, node: str) -> Report:
    report = report_at(Folder(run).node(node))
    assert report is not None
    return report


def broken(run: Path) -> list[dict[str, object]]:
    """The incidents that ended an attempt: a rank may really be slow on a machine that does other work besides."""
    return [row for row in said(run, "incident") if row["kind"] != "slow"]


def said(run: Path, name: str) -> list[dict[str, object]]:
    return [row["attrs"] for row in rows(Folder(run).events) if row["name"] == name]


def test_a_node_whose_agent_dies_twice_gives_way_to_a_spare(
    recipe: Path, unbroken: RunFolder, tmp_path: Path, begin: Callable[[list[str]], subprocess.Popen[str]]
) -> None:
    run = tmp_path / "run"
    process = begin(words(recipe, run, "--nodes", "3", "--spares", "1", "--tries", "9"))
    for least in (5, 10):
        until(lambda least=least: newest(run) >= least, process)  # type: ignore[misc]  # bound at once
        os.kill(report_of(run, "node-1").pid, signal.SIGKILL)
        dead = len(broken(run))
        until(lambda dead=dead: len(broken(run)) > dead, process)  # type: ignore[misc]
        until(lambda: (report := report_of(run, "node-0")).doing == "runs" and bool(report.ranks[0].began), process)
    _, told = process.communicate(timeout=240)
    assert process.returncode == 0, told
    assert "node-1 is evicted: it was the cause of failure after failure" in told
    assert report_of(run, "node-2").ranks or report_of(run, "node-2").doing == "gone"
    assert {row["node"] for row in said(run, "revive")[3:]} == {"node-1"}, "once it may have been an accident"
    assert toy.learned(RunFolder(run)) == toy.learned(unbroken)


def test_stopped_by_a_signal_the_same_command_goes_on(
    recipe: Path, unbroken: RunFolder, tmp_path: Path, begin: Callable[[list[str]], subprocess.Popen[str]]
) -> None:
    run = tmp_path / "run"
    process = begin(words(recipe, run, "--ranks-per-node", "2"))
    until(lambda: newest(run) >= 5, process)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 3, told
    assert "the same command goes on" in told
    assert not Folder(run).lease.exists()
    process = begin(words(recipe, run, "--ranks-per-node", "2"))
    _, told = process.communicate(timeout=240)
    assert process.returncode == 0, told
    assert toy.learned(RunFolder(run)) == toy.learned(unbroken)


def test_under_torchrun_each_process_is_an_agent(
    recipe: Path, unbroken: RunFolder, tmp_path: Path, begin: Callable[[list[str]], subprocess.Popen[str]]
) -> None:
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--"]
    process = begin([*torchrun, *words(recipe, run)[2:]])
    until(lambda: newest(run) >= 5, process)
    os.kill(report_of(run, "node-1").ranks[0].pid, signal.SIGKILL)
    _, told = process.communicate(timeout=240)
    assert process.returncode == 0, told
    assert "it was ended by SIGKILL" in told
    assert [row["kind"] for row in broken(run)] == ["killed"]
    assert toy.learned(RunFolder(run)) == toy.learned(unbroken)


def test_a_wrong_recipe_and_a_wrong_layout_are_told_at_once(recipe: Path, tmp_path: Path) -> None:
    for more, text in ((["--set", "layout.tp=3"], "layout"), (["--spares", "1"], "--spares"), (["--slurm"], "srun")):
        done = subprocess.run(
            words(recipe, tmp_path / "run", *more), capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 2, done.stderr
        assert text in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
