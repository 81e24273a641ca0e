"""Parts of an agent that need no ranks: stacks before ranks are ended, and what it makes of beats."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmworks.guard.agent import Tracker, stacks
from lmworks.guard.report import Arrivals
from lmworks.parallel.attempt import Attempt
from lmworks.parallel.pulse import Beat, file_of


def test_stacks_are_kept_where_py_spy_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = Attempt(tmp_path / "attempt_0")
    attempt.folder.mkdir()
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    attempt.processes[3] = process  # type: ignore[assignment]  # of text or bytes, it says nothing
    try:
        monkeypatch.setenv("PATH", str(tmp_path))
        stacks(attempt)
        assert not list(attempt.folder.iterdir()), "without it nothing is tried"
        (tmp_path / "py-spy").write_text('#!/bin/sh\necho "$@"\n')
        (tmp_path / "py-spy").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.defpath}")
        stacks(attempt)
        said = (attempt.folder / "rank_3.stack.txt").read_text()
        assert said == f"dump --nonblocking --pid {process.pid}\n"
    finally:
        process.kill()
        process.wait()


def test_a_tracker_knows_ages_and_the_pace(tmp_path: Path) -> None:
    now = 0.0
    tracker = Tracker(Arrivals(lambda: now), 2)
    assert tracker.look(tmp_path, 7, None).began is False
    now = 4.0
    assert tracker.look(tmp_path, 7, None).quiet == 4.0
    beat = Beat(rank=2, pid=7, host="h", count=1, step=10, event="step")
    for step in (10, 12, 14):  # two steps in each three seconds
        now += 3.0
        beat = dataclasses.replace(beat, step=step, count=beat.count + 1)
        file_of(tmp_path, 2).write_text(json.dumps(dataclasses.asdict(beat)))
        seen = tracker.look(tmp_path, 7, None)
        assert (seen.began, seen.quiet, seen.still, seen.step) == (True, 0.0, 0.0, step)
    assert seen.pace == 1.5
    now += 5.0
    file_of(tmp_path, 2).write_text(json.dumps(dataclasses.asdict(dataclasses.replace(beat, count=9))))
    seen = tracker.look(tmp_path, 7, None)
    assert (seen.quiet, seen.still) == (0.0, 5.0), "it beats, and does nothing new"
    now += 2.0
    file_of(tmp_path, 2).unlink()
    seen = tracker.look(tmp_path, 7, -9)
    assert (seen.code, seen.step, seen.still) == (-9, 14, 7.0), "the last word counts"
