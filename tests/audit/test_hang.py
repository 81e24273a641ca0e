"""Who waits for whom, from records that are made up: groups, messages, silence, GPUs, ranks that disagree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lmworks.audit import hang

Counts = dict[str, int]


def record(
    rank: int,
    world: int,
    groups: dict[str, list[int]],
    counts: Counts,
    *,
    open_on: str | None = None,
    operation: str = "all-reduce",
    more: list[dict[str, Any]] | None = None,
    sent: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """A record of a rank that made so many exchanges on each axis, and is still in the last one of `open_on`."""
    entries = [
        {
            "number": number,
            "axis": axis,
            "operation": operation,
            "bytes": 4,
            "peer": None,
            "entered": 9.0,
            "left": None if axis == open_on else 8.0,
        }
        for axis, number in counts.items()
        if number
    ]
    place = dict.fromkeys(("pp", "dp_replicate", "dp_shard", "cp", "tp"), 0) | {"dp_shard": rank}
    return {
        "rank": rank,
        "world": world,
        "axes": place,
        "groups": groups,
        "step": 5,
        "doing": [],
        "reason": "SIGUSR2",
        "entries": entries + (more or []),
        "counts": [{"axis": a, "operation": "", "peer": None, "number": n} for a, n in counts.items()] + (sent or []),
        "stacks": {"MainThread": [f"frame {i}" for i in range(40)]},
    }


def message(operation: str, peer: int, number: int, left: float | None) -> dict[str, Any]:
    entry = {"number": number, "axis": "pp", "operation": operation, "bytes": 4, "peer": peer}
    return entry | {"entered": 2.0, "left": left}


def read(folder: Path, *records: dict[str, Any]) -> hang.Hang:
    folder.mkdir(parents=True)
    for each in records:
        (folder / f"rank-{each['rank']:05d}.json").write_text(json.dumps(each))
    return hang.read(folder)


def test_the_rank_below_the_highest_number_is_waited_for(tmp_path: Path) -> None:
    group = {"world": [0, 1, 2]}
    found = read(
        tmp_path / "a",
        record(0, 3, group, {"world": 7}, open_on="world"),
        record(1, 3, group, {"world": 6}),
        record(2, 3, group, {"world": 7}, open_on="world"),
    )
    assert found.suspects == [1]
    assert [(wait.rank, wait.on, wait.exchange, wait.seconds) for wait in found.waits] == [
        (0, 1, "world all-reduce 7", 9.0),
        (2, 1, "world all-reduce 7", 9.0),
    ]
    assert len(found.stack(1)) == hang.MOST_FRAMES
    assert found.stack(1)[-1] == "frame 39"


def test_a_chain_of_groups_ends_at_the_one_who_waits_for_nobody(tmp_path: Path) -> None:
    """0 waits for 1 on dp, 1 for 3 on tp; 2 waits for 3 on dp."""
    found = read(
        tmp_path / "a",
        record(0, 4, {"dp": [0, 1], "tp": [0, 2]}, {"dp": 5, "tp": 2}, open_on="dp"),
        record(1, 4, {"dp": [0, 1], "tp": [1, 3]}, {"dp": 4, "tp": 3}, open_on="tp"),
        record(2, 4, {"dp": [2, 3], "tp": [0, 2]}, {"dp": 5, "tp": 2}, open_on="dp"),
        record(3, 4, {"dp": [2, 3], "tp": [1, 3]}, {"dp": 4, "tp": 2}),
    )
    assert found.suspects == [3]
    assert [(wait.rank, wait.on) for wait in found.paths[0]] == [(0, 1), (1, 3)]


def test_what_a_gpu_was_given_counts_where_nothing_else_is_open(tmp_path: Path) -> None:
    group = {"world": [0, 1]}
    found = read(tmp_path / "a", record(0, 2, group, {"world": 7}), record(1, 2, group, {"world": 6}))
    assert found.suspects == [1]
    assert found.waits[0].seconds == 0.0


def test_silent_ranks_come_first(tmp_path: Path) -> None:
    found = read(tmp_path / "a", record(0, 3, {"world": [0, 1, 2]}, {"world": 1}, open_on="world"))
    assert found.silent == [1, 2]
    assert found.suspects == [1, 2]
    assert "left no record" in hang.text(found)


def test_a_message_waits_for_its_sender_only_while_it_is_not_sent(tmp_path: Path) -> None:
    sent = [{"axis": "pp", "operation": "send", "peer": 1, "number": 3}]
    waiting = record(1, 2, {}, {}, more=[message("receive", 0, 4, None)])
    found = read(tmp_path / "a", record(0, 2, {}, {}, sent=sent), waiting)
    assert [(wait.rank, wait.on, wait.exchange) for wait in found.waits] == [(1, 0, "pp receive 4")]
    came = record(1, 2, {}, {}, more=[message("receive", 0, 3, None)])
    assert read(tmp_path / "b", record(0, 2, {}, {}, sent=sent), came).waits == []


def test_an_exchange_too_long_ago_to_be_kept_was_made(tmp_path: Path) -> None:
    group = {"world": [0, 1], "fsdp": [0, 1]}
    old = record(1, 2, group, {"world": 5, "fsdp": 299})
    old["entries"] = [entry for entry in old["entries"] if entry["axis"] == "fsdp"]
    found = read(tmp_path / "a", record(0, 2, group, {"world": 5, "fsdp": 300}, open_on="fsdp"), old)
    assert [(wait.rank, wait.on, wait.exchange) for wait in found.waits] == [(0, 1, "fsdp all-reduce 300")]


def test_ranks_that_make_different_exchanges_are_told(tmp_path: Path) -> None:
    group = {"world": [0, 1]}
    found = read(
        tmp_path / "a",
        record(0, 2, group, {"world": 7}, open_on="world"),
        record(1, 2, group, {"world": 7}, open_on="world", operation="all-gather"),
    )
    assert found.differ == ["exchange 7 on world is all-gather on some ranks, all-reduce on others"]
    assert found.suspects == []
    assert "NOT THE SAME" in hang.text(found)


def test_in_a_circle_the_one_that_most_wait_for_is_named(tmp_path: Path) -> None:
    found = read(
        tmp_path / "a",
        record(0, 3, {"a": [0, 1], "b": [0, 2]}, {"a": 2, "b": 1}, open_on="a"),
        record(1, 3, {"a": [0, 1], "c": [1, 2]}, {"a": 1, "c": 2}, open_on="c"),
        record(2, 3, {"b": [0, 2], "c": [1, 2]}, {"b": 2, "c": 1}, open_on="b"),
    )
    assert found.suspects == [0, 1, 2], "each waits for the next"


def test_everybody_waits_in_the_same_exchange_and_nobody_is_a_suspect(tmp_path: Path) -> None:
    group = {"world": [0, 1]}
    found = read(tmp_path / "a", *(record(rank, 2, group, {"world": 7}, open_on="world") for rank in range(2)))
    assert found.suspects == []
    assert "nobody waits" in hang.text(found)


def test_the_last_attempt_that_left_records_counts(tmp_path: Path) -> None:
    assert hang.newest(tmp_path) is None
    for name in ("20260101T000000-0", "20260102T000000-40"):
        read(tmp_path / "flight" / name, record(0, 1, {}, {}))
    (tmp_path / "flight" / "20260103T000000-80").mkdir()
    assert hang.newest(tmp_path) == tmp_path / "flight" / "20260102T000000-40"


def test_the_report_is_json_and_names_places(tmp_path: Path) -> None:
    group = {"world": [0, 1]}
    found = read(tmp_path / "a", record(0, 2, group, {"world": 7}, open_on="world"), record(1, 2, group, {"world": 6}))
    told = json.loads(json.dumps(hang.report(found)))
    assert told["suspects"][0]["place"] == "rank 1 (dp_shard 1)"
    assert [(cell["dp"], cell["suspect"]) for cell in told["grid"]] == [(0, False), (1, True)]
