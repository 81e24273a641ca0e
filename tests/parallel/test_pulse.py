"""The heart-beat of a rank: what it says while it works, waits, and is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lmworks.core.events import Events
from lmworks.parallel import pulse
from lmworks.parallel.pulse import FOLDER, Pulse, file_of, read


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path / "beats"))
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(pulse, "LOOK", 0.005)
    monkeypatch.setattr(pulse, "PERIOD", 0.02)
    return tmp_path / "beats"


def test_nobody_asked_nothing_beats(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.chdir(tmp_path)
    with Pulse() as beating:
        assert beating._thread is None
    assert not list(tmp_path.iterdir())


def test_a_beat_tells_step_event_and_place(folder: Path, tmp_path: Path) -> None:
    events = Events(tmp_path / "events.jsonl", run="r")
    with Pulse() as beating:
        beating.events = events
        events.step = 7
        events.write("step")
        until = time.monotonic() + 10
        while (found := read(file_of(folder, 3))) is None or found.event != "step":
            time.sleep(0.01)
            assert time.monotonic() < until
        assert any(name.startswith("test_a_beat_tells") for name in found.stack)
    last = read(file_of(folder, 3))
    assert last is not None
    assert (last.rank, last.pid, last.step, last.over, found.over) == (3, os.getpid(), 7, True, False)
    assert last.count > found.count
    assert last.busy > 0.0
    assert last.waited == 0.0


def test_before_the_first_event_there_is_no_step(folder: Path, tmp_path: Path) -> None:
    with Pulse() as beating:
        beating.events = Events(tmp_path / "events.jsonl", run="r")
    last = read(file_of(folder, 3))
    assert last is not None
    assert last.step is None


def test_a_full_disk_renews_the_time_of_the_last_beat(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Pulse():
        pass
    path = file_of(folder, 3)
    beat = read(path)
    assert beat is not None
    os.utime(path, (1.0, 1.0))

    def full(*words: object, **named: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    pulse._write(path, beat)
    assert path.stat().st_mtime > 1.0
    assert read(path) == beat


@pytest.mark.parametrize(
    ("file", "waits"),
    [
        ("/x/site-packages/torch/distributed/distributed_c10d.py", True),
        ("/x/src/lmworks/parallel/wire.py", True),
        ("/x/src/lmworks/train/step.py", False),
        ("/x/site-packages/torch/nn/functional.py", False),
    ],
)
def test_where_a_rank_waits_for_others(file: str, waits: bool) -> None:
    assert pulse._is_wait(file, 1) == waits


def test_a_handle_that_is_waited_for_is_known_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "lmworks" / "parallel" / "zero.py"
    path.parent.mkdir(parents=True)
    path.write_text("running.wait()\nx = a @ b\n")
    assert pulse._is_wait(str(path), 1)
    assert not pulse._is_wait(str(path), 2)


def test_bytes_and_calls_are_those_of_the_wire(folder: Path) -> None:
    bills = {("tp", "sum"): SimpleNamespace(calls=3, bytes=10.0), ("dp", "sum"): SimpleNamespace(calls=1, bytes=2.5)}
    wire = SimpleNamespace(bills=bills, last=lambda: "dp sum 2 B", place=lambda axis: 1)
    with Pulse() as beating:
        beating.on(wire)  # type: ignore[arg-type]  # the four things that are asked of a wire
    last = read(file_of(folder, 3))
    assert last is not None
    assert (last.calls, last.sent, last.last, last.stage) == (4, 12.5, "dp sum 2 B", 1)


PROGRAM = """
import sys, time
from lmworks.parallel.pulse import Pulse
with Pulse():
    print("ready", flush=True)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        sum(range(1000))
"""


@pytest.mark.slow
def test_a_stopped_process_is_silent_and_its_time_counts_as_busy(tmp_path: Path) -> None:
    environment = {**os.environ, FOLDER: str(tmp_path), "RANK": "0"}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    try:
        process.stdout.readline()
        path = file_of(tmp_path, 0)
        while read(path) is None:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.2)  # a beat that was being written
        before = json.loads(path.read_text())
        time.sleep(2.5)
        assert json.loads(path.read_text()) == before
        os.kill(process.pid, signal.SIGCONT)
        while json.loads(path.read_text())["count"] == before["count"]:
            time.sleep(0.05)
        after = json.loads(path.read_text())
        assert after["busy"] - before["busy"] > 2.4, "it was stopped outside of any exchange"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
