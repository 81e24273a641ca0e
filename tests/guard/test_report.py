"""What agents and drivers write, read back; ages by the reader's clock; the lease."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmworks.core.errors import LmworksError
from lmworks.guard import lease as leases
from lmworks.guard.lease import Lease
from lmworks.guard.report import (
    Arrivals,
    Folder,
    Order,
    Plan,
    RankSeen,
    Report,
    order_at,
    plan_at,
    report_at,
    table_at,
    write,
)
from lmworks.parallel.failure import Failure


def test_a_report_comes_back_as_it_was_written(tmp_path: Path) -> None:
    failure = Failure(rank=1, world=2, time=3.0, exit_code=1, message="no", step=4)
    ranks = (RankSeen(rank=1, pid=7, code=-9, step=3, stack=("a", "b")),)
    report = Report(node="n", pid=1, host="h", count=2, store=("h", 5), ranks=ranks, failure=failure, check={"x": 1})
    report.write(tmp_path / "n.json")
    assert report_at(tmp_path / "n.json") == report


def test_orders_and_plans_come_back(tmp_path: Path) -> None:
    order = Order(number=3, do="start", attempt=1, nodes=("a", "b"), evicted=("c",))
    write(tmp_path / "o", dataclasses.asdict(order))
    assert order_at(tmp_path / "o") == order
    plan = Plan(program=("-m", "x"), ranks_per_node=2, local=True, environment={"A": "b"})
    plan.write(tmp_path / "p")
    assert plan_at(tmp_path / "p") == plan


def test_what_is_not_there_or_half_written_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "half").write_text('{"node": ')
    assert report_at(tmp_path / "half") is None
    assert order_at(tmp_path / "none") is None


def test_ages_are_the_readers_own_whatever_clocks_the_writers_have() -> None:
    """A node whose clock is an hour off, or jumps, is as old as its last new word."""
    now = 100.0
    arrivals = Arrivals(lambda: now)
    for written_at in (3700.0, 3701.0, 12.0):  # by the writer's clock, which then jumps back
        now += 1
        assert arrivals.age("n", written_at) == 0.0
    now += 5
    assert arrivals.age("n", 12.0) == 5.0
    assert arrivals.age("m", 12.0) == 0.0
    arrivals.forget("n")
    assert arrivals.age("n", 12.0) == 0.0


def test_attempts_are_counted_over_all_launches(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    assert folder.next_attempt() == 0
    folder.attempt(4).mkdir(parents=True)
    assert folder.next_attempt() == 5


def test_a_lease_is_taken_once(tmp_path: Path) -> None:
    path = tmp_path / "guard" / "lease.json"
    first = Lease(path)
    assert first.take() is False
    held = table_at(path)
    assert held is not None
    assert held["pid"] == os.getpid()
    first.give_back()
    assert not path.exists()


def test_a_lease_that_is_renewed_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    first = Lease(path)
    first.take()

    def meanwhile(seconds: float) -> None:
        first._write()

    with pytest.raises(LmworksError, match="another driver watches over this run"):
        Lease(path, sleep=meanwhile).take()


def test_the_lease_of_a_dead_driver_is_taken_at_once(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    code = (
        "import sys; from pathlib import Path; from lmworks.guard.lease import Lease; Lease(Path(sys.argv[1])).take()"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    before = table_at(path)

    def asleep(seconds: float) -> None:
        pytest.fail("nobody is waited for")

    mine = Lease(path, sleep=asleep)
    assert mine.take() is True
    now = table_at(path)
    assert before is not None
    assert now is not None
    assert now["count"] > before["count"], "agents see that a driver is there"


def test_a_lease_from_another_host_lapses_by_our_own_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lease.json"
    held = {"id": "x", "pid": 1, "host": "elsewhere", "count": 9, "born": 0.0}
    path.write_text(json.dumps(held))
    monkeypatch.setattr(leases, "LAPSE", 0.0)
    assert Lease(path).take() is True


def test_a_driver_that_wakes_up_late_finds_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lease.json"
    monkeypatch.setattr(leases, "LAPSE", 0.0)
    monkeypatch.setattr(leases, "RENEW", 0.0)
    late, next_ = Lease(path), Lease(path)
    late.take()
    next_.take()
    with pytest.raises(LmworksError, match="another driver has taken over"):
        late.renew()
    next_.renew()
