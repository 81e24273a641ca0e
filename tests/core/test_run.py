"""The run folder: one process at a time, one id, a line for each attempt."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lmworks.core.errors import LmworksError
from lmworks.core.run import RunFolder


def test_a_folder_is_locked_while_somebody_works_in_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "a")
    with folder.alone():
        with pytest.raises(LmworksError, match=rf"another process trains here \(pid {os.getpid()}\)"):
            folder.alone().__enter__()
        with RunFolder(tmp_path / "runs" / "b").alone():
            pass
    with folder.alone():
        pass
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_lock_that_a_killed_process_left_locks_nobody_out(tmp_path: Path) -> None:
    (tmp_path / ".a.lock").write_text("1234567")
    with RunFolder(tmp_path / "a").alone():
        assert (tmp_path / ".a.lock").read_text() == str(os.getpid())


def test_the_record_keeps_its_id_and_every_attempt(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_record({"code": 1}, {"step": 0})
    first = folder.id()
    folder.write_record({"code": 2}, {"step": 7})
    record = json.loads(folder.record.read_text())
    assert record == {"id": first, "code": 2, "attempts": [{"step": 0}, {"step": 7}]}
    assert RunFolder(tmp_path / "other").id() != first
