"""Files of measured links: what is refused, what is filled in, what is stale."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core.errors import DataError
from lmworks.parallel.links import TABLES, Profile, Table, empty, from_json, read, to_json


def profile(bandwidth: Any, each: int = 1, **over: Any) -> Profile:
    n = len(bandwidth)
    some: Table = tuple(tuple(1e-5 if i != j or each > 1 else None for j in range(n)) for i in range(n))
    rows = tuple(tuple(row) for row in bandwidth)
    plain: dict[str, Any] = {
        "machines": tuple(f"m{i}" for i in range(n)),
        "ranks_per_machine": each,
        "device": "H100",
        "driver": "570",
        "flops_per_second": 4e14,
        "message_bytes": 1024,
        "bytes_per_second": rows,
        "both_ways": rows,
        "latency_seconds": some,
    }
    return Profile(**plain | over)


GOOD = [[None, 2e9, 3e9], [4e9, None, 5e9], [6e9, 7e9, None]]


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    found = profile(GOOD)
    found.write(tmp_path / "links.json")
    assert read(tmp_path / "links.json") == found
    assert "m1" in found.as_table()
    assert "latency 10 to 10 microseconds" in found.as_table()


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0.0, r"bytes_per_second from m1 to m2 is 0\.0, and not a number above 0: the link is dead"),
        (math.nan, "bytes_per_second from m1 to m2 is nan"),
        (math.inf, "bytes_per_second from m1 to m2 is inf"),
        (-1.0, r"bytes_per_second from m1 to m2 is -1\.0"),
    ],
)
def test_a_number_that_cannot_be_names_the_pair(value: float, told: str, tmp_path: Path) -> None:
    bad = [row[:] for row in GOOD]
    bad[1][2] = value
    with pytest.raises(DataError, match=told):
        profile(bad)
    content = json.loads(to_json(profile(GOOD))) | {"bytes_per_second": bad}
    path = tmp_path / "links.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"links.json: {told}"):
        read(path)


@pytest.mark.parametrize(
    ("over", "told"),
    [
        ({"both_ways": ((None, 1.0), (1.0, None))}, "both_ways has 2 rows of 2 entries; 3 of 3 belong"),
        ({"both_ways": ((None, 1.0), (1.0,), (1.0,))}, "both_ways has 3 rows of 1, 2 entries; 3 of 3 belong"),
        ({"both_ways": ()}, "both_ways has 0 rows of no entries; 3 of 3 belong"),
        ({"machines": ("a", "a", "b")}, "3 machines with 2 names"),
        ({"flops_per_second": 0.0}, "flops_per_second is 0.0"),
    ],
)
def test_wrong_sizes_and_names(over: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        profile(GOOD, **over)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": 1}', '{"version": 2, "machines": []}', "3"])
def test_what_is_no_profile_is_told_so(text: str, tmp_path: Path) -> None:
    path = tmp_path / "links.json"
    path.write_text(text)
    with pytest.raises(DataError, match="not a file of measured links"):
        read(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: cannot be read(.|\n)*lmworks probe"):
        read(tmp_path / "none.json")


@given(st.integers(2, 6), st.data())
def test_missing_pairs_are_the_median_of_what_their_machines_have(number: int, data: st.DataObject) -> None:
    pairs = [(i, j) for i in range(number) for j in range(number) if i != j]
    gone = data.draw(st.sets(st.sampled_from(pairs), max_size=len(pairs) - 1))
    value = {pair: 1e9 * (1 + 7 * pair[0] + pair[1]) for pair in pairs}
    rows = [[None if i == j or (i, j) in gone else value[i, j] for j in range(number)] for i in range(number)]
    found = profile(rows)
    assert found.missing == sorted(gone)
    filled = found.complete()
    assert filled.missing == []
    for i, j in pairs:
        near = [value[pair] for pair in pairs if pair not in gone and {i, j} & set(pair)]
        left = [value[pair] for pair in pairs if pair not in gone]
        want = value[i, j] if (i, j) not in gone else median(near or left)
        assert filled.bytes_per_second[i][j] == want


def test_insides_are_filled_by_the_other_insides() -> None:
    rows = [[9e9, 2e9, 3e9], [4e9, None, 5e9], [6e9, 7e9, 11e9]]
    found = profile(rows, each=8)
    assert found.missing == [(1, 1)]
    assert found.complete().bytes_per_second[1][1] == 10e9


def test_nothing_measured_is_an_error() -> None:
    facts = {"ranks_per_machine": 1, "device": "x", "driver": "", "flops_per_second": None, "message_bytes": 1}
    nothing = empty(("a", "b"), **facts)
    assert nothing.missing == [(0, 1), (1, 0)]
    assert from_json(to_json(nothing)) == nothing
    with pytest.raises(DataError, match="bytes_per_second has no measurement between machines"):
        nothing.complete()


def test_a_profile_of_another_device_or_driver_is_stale() -> None:
    found = profile(GOOD)
    assert found.stale("H100", "570") is None
    assert "'H100', this is 'A100'" in (found.stale("A100", "570") or "")
    assert "driver 570, this is 580" in (found.stale("H100", "580") or "")


def test_all_three_tables_are_known() -> None:
    assert set(TABLES) < set(json.loads(to_json(profile(GOOD))))
