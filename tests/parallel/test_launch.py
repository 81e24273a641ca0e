"""Ranks that are done, fail, hang, vanish or stop: what the launcher makes of them. The ranks are small programs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmworks.core.errors import LmworksError, Stopped
from lmworks.parallel import failure
from lmworks.parallel.launch import Launch, launch

ranks = pytest.mark.ranks

HEAD = """
import os, signal, sys, time
from pathlib import Path
from lmworks.core.errors import LmworksError, RecipeError, Problem, Stopped
from lmworks.parallel import failure
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
here = Path(sys.argv[1])
def end(error, step=None):
    failure.write(error, step=step)
    sys.exit(getattr(error, "exit_code", 1))
def wait_for(name):
    while not (here / name).exists():
        time.sleep(0.01)
"""


def start(
    tmp_path: Path, body: str, *, ranks: int = 2, max_restarts: int = 0, grace: float = 20.0, patience: float = 1.0
) -> tuple[LmworksError | None, list[str]]:
    """The error of a launch of `body`, and what was noted."""
    program = tmp_path / "program.py"
    program.write_text(HEAD + body)
    notes: list[str] = []
    how = Launch(ranks=ranks, logs=tmp_path / "logs", max_restarts=max_restarts, grace=grace, patience=patience)
    try:
        launch(lambda _: [sys.executable, str(program), str(tmp_path)], how, notes.append)
    except LmworksError as error:
        return error, notes
    return None, notes


@ranks
def test_only_the_first_rank_is_shown_and_the_others_go_to_files(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    error, _ = start(tmp_path, "print(f'I am {rank} of {world}', flush=True)", ranks=3)
    assert error is None
    assert capfd.readouterr().out == "I am 0 of 3\n"
    logs = tmp_path / "logs" / "attempt_0"
    assert [(logs / f"rank_{rank}.log").read_text() for rank in (1, 2)] == ["I am 1 of 3\n", "I am 2 of 3\n"]


@ranks
def test_ranks_meet_in_the_store_of_the_launcher(tmp_path: Path) -> None:
    error, _ = start(
        tmp_path,
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "x = torch.tensor([float(rank + 1)])\n"
        "dist.all_reduce(x)\n"
        "(here / f'sum_{rank}').write_text(str(x.item()))\n"
        "dist.destroy_process_group()\n",
    )
    assert error is None
    assert [(tmp_path / f"sum_{rank}").read_text() for rank in (0, 1)] == ["3.0", "3.0"]


@ranks
def test_the_first_error_in_time_wins_with_rank_and_step(tmp_path: Path) -> None:
    error, _ = start(
        tmp_path,
        "if rank == 2:\n"
        "    failure.write(LmworksError('the loss is nan', next_step='a lower rate'), step=37)\n"
        "    (here / 'failed').touch()\n"
        "    time.sleep(0.3)\n"  # the others leave before it does
        "    sys.exit(1)\n"
        "wait_for('failed')\n"
        "end(RuntimeError('connection closed by peer'), step=38)\n",
        ranks=3,
    )
    assert error is not None
    assert error.exit_code == 1
    assert str(error) == "rank 2 of 3 failed at step 37: the loss is nan\n  next:  a lower rate"


@ranks
def test_a_rank_that_vanishes_is_the_cause_of_what_its_peers_say(tmp_path: Path) -> None:
    error, _ = start(
        tmp_path,
        "if rank == 1:\n"
        "    (here / 'gone').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "wait_for('gone')\n"
        "failure.write(RuntimeError('connection closed by peer'))\n"
        "time.sleep(0.5)\n"  # as torch takes to end
        "sys.exit(1)\n",
    )
    assert error is not None
    assert "rank 1 of 2 failed: it was ended by SIGKILL" in str(error)
    assert "rank_1.log" in str(error)


@ranks
def test_all_ranks_start_again_after_a_kill(tmp_path: Path) -> None:
    error, notes = start(
        tmp_path,
        "if restart == 0 and rank == 1:\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "if restart == 0:\n"
        "    time.sleep(600)\n"
        "(here / f'done_{rank}').touch()\n",
        max_restarts=1,
    )
    assert error is None
    assert (tmp_path / "done_0").exists()
    assert (tmp_path / "done_1").exists()
    assert any("all ranks start again (1 of 1 restarts)" in note for note in notes)
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["attempt_0", "attempt_1"]


@ranks
@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        ("RecipeError([Problem(path='lr', text='must be positive')])", 2, "lr: must be positive"),
        ("Stopped('stopped at step 5 of 9: got SIGUSR1')", 3, "stopped: stopped at step 5 of 9"),
    ],
)
def test_what_a_restart_cannot_help_is_not_restarted(tmp_path: Path, raised: str, code: int, text: str) -> None:
    error, notes = start(tmp_path, f"end({raised})", max_restarts=3)
    assert error is not None
    assert error.exit_code == code
    assert text in str(error)
    assert len(notes) == 1


@ranks
def test_a_stop_waits_for_ranks_that_still_save(tmp_path: Path) -> None:
    error, _ = start(
        tmp_path,
        "if rank == 0:\n    time.sleep(2)\n    (here / 'saved').touch()\nend(Stopped('stopped: limit'))\n",
        patience=0.1,
    )
    assert error is not None
    assert error.exit_code == 3
    assert (tmp_path / "saved").exists()


@ranks
def test_ranks_that_hang_are_ended_with_what_they_started(tmp_path: Path) -> None:
    error, _ = start(
        tmp_path,
        "if rank == 1:\n"
        "    wait_for('pids')\n"
        "    end(LmworksError('disk full'))\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "(here / 'pids.tmp').write_text(f'{os.getpid()} {child.pid}')\n"
        "(here / 'pids.tmp').rename(here / 'pids')\n"
        "time.sleep(600)\n",
    )
    assert error is not None
    assert "rank 1 of 2 failed: disk full" in str(error)
    assert not [pid for pid in (tmp_path / "pids").read_text().split() if is_running(int(pid))]


def is_running(pid: int) -> bool:
    """Whether a process runs. One that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


LAUNCHER = """
import sys
from pathlib import Path
from lmworks.core.errors import LmworksError
from lmworks.parallel.launch import Launch, launch
here = Path(sys.argv[1])
try:
    how = Launch(ranks=2, logs=here / "logs", grace=float(sys.argv[2]), max_restarts=2)
    launch(lambda _: [sys.executable, str(here / "program.py"), str(here)], how, print)
except LmworksError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def launched(tmp_path: Path, body: str, grace: float) -> subprocess.Popen[str]:
    """A launcher in a process of its own, once both ranks have said that they are ready."""
    (tmp_path / "program.py").write_text(HEAD + body)
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "launcher.py"), str(tmp_path), str(grace)],
        stdout=subprocess.PIPE,
        text=True,
    )
    while not all((tmp_path / f"ready_{rank}").exists() for rank in (0, 1)):
        assert process.poll() is None
        time.sleep(0.02)
    return process


READY = "(here / f'pid_{rank}').write_text(str(os.getpid()))\n(here / f'ready_{rank}').touch()\n"
SAVES = """
from lmworks.train.stop import StopRequest
with StopRequest() as stop:
    (here / f'pid_{rank}').write_text(str(os.getpid()))
    (here / f'ready_{rank}').touch()
    while stop.reason() is None:
        time.sleep(0.01)
    (here / f'saved_{rank}').touch()
    end(Stopped(f'stopped at step 4 of 9: {stop.reason()}'), step=4)
"""


@ranks
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_handed_on_and_the_ranks_save(tmp_path: Path, number: signal.Signals) -> None:
    process = launched(tmp_path, SAVES, grace=20)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 3
    assert f"stopped at step 4: stopped at step 4 of 9: got {number.name}" in said
    assert all((tmp_path / f"saved_{rank}").exists() for rank in (0, 1))


@ranks
def test_ranks_that_do_not_stop_are_ended_after_the_grace(tmp_path: Path) -> None:
    process = launched(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY + "time.sleep(600)\n", 0.5)
    process.terminate()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "it did not stop within 0.5 seconds" in said
    assert not [rank for rank in (0, 1) if is_running(int((tmp_path / f"pid_{rank}").read_text()))]


@ranks
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's PR_SET_PDEATHSIG")
def test_no_rank_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    process = launched(tmp_path, READY + "time.sleep(600)\n", 20)
    process.kill()
    process.communicate(timeout=60)
    pids = [int((tmp_path / f"pid_{rank}").read_text()) for rank in (0, 1)]
    until = time.monotonic() + 10
    while any(is_running(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in pids)


def test_the_first_word_of_a_rank_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(failure.FOLDER, str(tmp_path / "errors"))
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert failure.write(ValueError("a"), step=7)
    assert failure.write(ValueError("b"))
    found = failure.first(tmp_path / "errors")
    assert found is not None
    assert (found.rank, found.world, found.step, found.message) == (3, 4, 7, "ValueError: a")


def test_a_stop_is_no_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(failure.FOLDER, str(tmp_path))
    for rank, error in enumerate([Stopped("limit"), LmworksError("disk full")]):
        monkeypatch.setenv("RANK", str(rank))
        failure.write(error)
    found = failure.first(tmp_path)
    assert found is not None
    assert (found.rank, found.exit_code) == (1, 1)


def test_without_a_launcher_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(failure.FOLDER, raising=False)
    assert not failure.write(ValueError("a"))


@ranks
def test_torchrun_alone_tells_rank_and_step_as_the_root_cause(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(HEAD + "if rank == 1:\n    end(LmworksError('disk full'), step=5)\ntime.sleep(600)\n")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*words, str(program), str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={name: value for name, value in os.environ.items() if name != failure.FOLDER},
    )
    assert done.returncode == 1
    root = done.stderr.partition("Root Cause")[2]
    assert "rank      : 1" in root
    assert "rank 1 of 2 failed at step 5: disk full" in root


def test_a_person_can_ask_for_the_first_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert failure.main([str(tmp_path)]) == 1
    assert failure.main([str(tmp_path), "--asked"]) == 3
    facts = {"rank": 1, "world": 2, "time": 1.0, "exit_code": 2, "message": "no such recipe", "step": None, "trace": ""}
    (tmp_path / "rank_1.error.json").write_text(json.dumps(facts))
    assert failure.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("lmworks: rank 1 of 2 failed: no such recipe\n")
