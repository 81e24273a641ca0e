"""The self-check: what it finds here, and what it makes of what nodes find."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lmworks.guard import selfcheck
from lmworks.guard.selfcheck import judge
from tests.guard.simulated import SOUND


def nodes(count: int) -> dict[str, dict[str, object]]:
    return {f"n{i}": SOUND | {"host": f"n{i}"} for i in range(count)}


def test_this_machine_is_sound(tmp_path: Path) -> None:
    found = selfcheck.here(tmp_path)
    assert found["failed"] is None
    assert all(found[name] > 0 for name in ("memory", "arithmetic", "loopback", "disk"))
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_a_disk_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    found = selfcheck.here(tmp_path / "gone")
    assert str(found["failed"]).startswith("disk: ")
    assert found["memory"] > 0, "what came before it is kept"


def test_memory_that_gives_other_bytes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck.np, "copyto", lambda target, source: None)  # as a broken memory: nothing arrives
    assert selfcheck.here(tmp_path)["failed"] == "memory: a copy differs from what was copied"


@pytest.mark.ranks
def test_ranks_of_a_node_together() -> None:
    together = selfcheck.Together(2)
    until = time.monotonic() + 120
    while (found := together.answer()) is None:
        time.sleep(0.05)
        assert time.monotonic() < until
    assert set(found) == {"together"}
    assert found["together"] > 0


@pytest.mark.ranks
def test_ranks_that_do_not_come_together_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails, and one that takes too long; nobody is left."""
    failing = selfcheck.Together(0)  # no ranks: the launcher refuses it
    while (found := failing.answer()) is None:
        time.sleep(0.05)
    assert str(found["failed"]).startswith("its ranks together: ")
    monkeypatch.setattr(selfcheck, "TOGETHER_SECONDS", 0.1)
    late = selfcheck.Together(2)
    while (found := late.answer()) is None:
        time.sleep(0.05)
    assert found["failed"] == "its ranks together: no answer in 0 s"


def test_sound_nodes_are_not_bad() -> None:
    assert judge(nodes(4)) == {}


@pytest.mark.parametrize("rate", ["memory", "loopback"])
def test_a_node_far_below_its_peers_is_bad(rate: str) -> None:
    found = nodes(4)
    found["n2"][rate] = 0.29 * float(str(SOUND[rate]))
    assert list(judge(found)) == ["n2"]
    found["n2"][rate] = 0.31 * float(str(SOUND[rate]))
    assert judge(found) == {}


def test_what_failed_is_bad_in_its_own_words() -> None:
    found = nodes(2)
    found["n1"] = {"host": "n1", "failed": "memory: bits"}
    assert judge(found) == {"n1": "memory: bits"}


def test_groups_of_processes_on_one_host_are_no_peers() -> None:
    found = nodes(3)
    for checks in found.values():
        checks["host"] = "here"
    found["n0"]["memory"] = 1.0
    assert judge(found) == {}
