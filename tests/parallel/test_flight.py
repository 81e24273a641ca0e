"""Flight records: what is kept, when it is written, and what records of four ranks say of the one that is away."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from lmworks.audit import hang
from lmworks.parallel import gang
from lmworks.parallel.flight import Flight, Recorder, stacks
from tests.parallel import flights


def test_numbers_count_by_axis_and_messages_by_direction_and_peer() -> None:
    flight = Flight(keep=4)
    for _ in range(3):
        flight.leave(flight.enter("tp", "all-reduce", 8.0))
    last = [
        flight.enter("dp", "all-gather", 4.0),
        flight.enter("pp", "send", 4.0, 2),
        flight.enter("pp", "receive", 4.0, 2),
    ]
    assert [entry.number for entry in last] == [1, 1, 1]
    told = flight.told()
    assert [entry["axis"] for entry in told["entries"]] == ["tp", "dp", "pp", "pp"], "the ring keeps the last ones"
    assert {"axis": "tp", "operation": "", "peer": None, "number": 3} in told["counts"]
    assert told["entries"][0]["left"] is not None
    assert told["entries"][1]["left"] is None


def test_stacks_name_the_place_of_every_thread() -> None:
    ready, done = threading.Event(), threading.Event()

    def waits_here() -> None:
        ready.set()
        done.wait()

    thread = threading.Thread(target=waits_here, name="waiter")
    thread.start()
    ready.wait()
    found = stacks()
    done.set()
    thread.join()
    assert any("waits_here" in frame for frame in found["waiter"])
    assert any("test_stacks_name" in frame for frame in found["MainThread"])


def recorder(folder: Path, rank: int, patience: float = 60.0) -> tuple[Flight, Recorder, list[str]]:
    heard: list[str] = []
    flight = Flight()
    facts = {"world": 2}
    made = Recorder(
        flight, folder, rank=rank, facts=lambda: facts, moved=lambda: 0.0, patience=patience, told=heard.append
    )
    return flight, made, heard


def until(path: Path) -> dict[str, object]:
    """The record, as soon as it is there; a test that waits in vain fails."""
    for _ in range(600):
        if path.is_file():
            return dict(json.loads(path.read_text()))
        time.sleep(0.05)
    raise AssertionError(f"no {path.name}")


@pytest.mark.slow
def test_a_signal_and_another_ranks_record_make_one(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    _, first, _ = recorder(tmp_path, 0)
    _, second, _ = recorder(tmp_path, 1)
    with first, second:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert until(tmp_path / "rank-00000.json")["reason"] == "SIGUSR2"
        assert until(tmp_path / "rank-00001.json")["reason"] == "another rank asked"
    assert signal.getsignal(signal.SIGUSR2) == before
    assert signal.set_wakeup_fd(-1) == -1, "the place for wake-ups is given back"


@pytest.mark.slow
def test_standstill_makes_one_record_and_says_so(tmp_path: Path) -> None:
    flight, made, heard = recorder(tmp_path, 0, patience=0.3)
    flight.enter("world", "all-reduce", 4.0)
    with made:
        found = until(tmp_path / "rank-00000.json")
        time.sleep(0.5)
    assert str(found["reason"]).startswith("nothing has moved")
    assert len(heard) == 1, "once for one standstill"


def test_a_full_disk_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    _, made, _ = recorder(tmp_path / "file", 0)
    assert made.write("error") is None


@pytest.mark.ranks
def test_clocks_a_second_apart_are_aligned_within_five_milliseconds() -> None:
    for found in gang.run(flights.apart, 2, 1.0):
        ((seconds, error, truth),) = found
        assert abs(seconds - truth) <= error + 1e-6, "the error is a bound"
        assert error < 5e-3


@pytest.mark.ranks
def test_a_signal_is_heard_inside_of_an_exchange(tmp_path: Path) -> None:
    assert gang.run(flights.asked, 2, str(tmp_path)) == [True, True]
    record = json.loads((tmp_path / "rank-00000.json").read_text())
    assert record["reason"] == "SIGUSR2"
    (open_entry,) = [entry for entry in record["entries"] if entry["left"] is None]
    assert (open_entry["axis"], open_entry["operation"]) == ("world", "all-reduce")
    assert any("all_reduce" in frame for frame in record["stacks"]["MainThread"])


@pytest.mark.ranks
def test_the_rank_that_sleeps_is_named_with_its_stack(tmp_path: Path) -> None:
    gang.run(flights.late, 4, str(tmp_path), 3, "asleep")
    found = hang.read(tmp_path)
    assert found.suspects == [3]
    assert found.silent == []
    assert any("_stay_away" in frame for frame in found.stack(3))
    assert {(wait.rank, wait.on) for wait in found.waits} >= {(2, 3)}, "its tensor parallel peer waits for it"
    text = hang.text(found)
    assert "SUSPECT  rank 3 (dp_replicate 1, tp 1)" in text
    assert ("tp all-reduce 1", 2) in {(wait.exchange, wait.rank) for wait in found.waits}
    assert "waits for rank 3 in" in text


@pytest.mark.ranks
def test_the_rank_that_is_stopped_leaves_none_and_is_named(tmp_path: Path) -> None:
    with pytest.raises(gang.RankFailed, match=r"ranks \[1\] have not answered"):
        gang.run(flights.late, 4, str(tmp_path), 1, "stopped", minutes=0.2)
    found = hang.read(tmp_path)
    assert found.silent == [1]
    assert found.suspects == [1]
    assert "left no record" in hang.text(found)
    path = [(wait.rank, wait.on) for wait in found.paths[0]]
    assert path[-1] == (0, 1), "rank 0 waits for it in tp"
    assert path[0][0] in (0, 2, 3)
