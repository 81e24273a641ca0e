"""The tournament, and probes of three and four ranks over gloo."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.parallel import gang
from lmworks.parallel.links import from_json, read
from lmworks.parallel.probe import rounds
from tests.parallel import probed


@given(st.integers(1, 40))
def test_every_pair_once_every_machine_once_a_round(number: int) -> None:
    found = rounds(number)
    assert sorted(pair for pairs in found for pair in pairs) == list(combinations(range(number), 2))
    for pairs in found:
        seen = [place for pair in pairs for place in pair]
        assert len(seen) == len(set(seen)) == number - number % 2, "one idles where the number is odd"
    assert len(found) == (0 if number == 1 else number - 1 if number % 2 == 0 else number)


@pytest.mark.ranks
def test_three_machines_of_one_rank_each(tmp_path: Path) -> None:
    path = tmp_path / "new" / "links.json"
    answers = gang.run(probed.measured, 3, 3, 1, str(path))
    assert len({text for text, _, _ in answers}) == 1, "all ranks know the same"
    found = read(path)
    assert found == from_json(answers[0][0])
    assert found.machines == ("m0", "m1", "m2")
    assert found.missing == []
    assert found.flops_per_second == 1e9, "the slowest rank's"
    for i in range(3):
        assert found.bytes_per_second[i][i] is None, "one rank has nobody inside to send to"
        assert all(1e5 < (found.both_ways[i][j] or 0) < 1e12 for j in range(3) if i != j)
        assert all(0 < (found.latency_seconds[i][j] or 0) < 1 for j in range(3) if i != j)
    assert answers[0][1][-1] == "links: round 3 of 3, 0 ways left"
    for _, _, bill in answers:  # 2 partners; 2 messages, 3 echoes of its own and 3 swaps with each
        calls, sent = bill["world", "send"]
        assert sent == 2 * ((2 + 3) * probed.MESSAGE + (3 + 5) * 4)
        assert calls == 2 * (2 + 3 + 3 + 5)


@pytest.mark.ranks
def test_two_machines_of_two_ranks_each_and_a_probe_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "links.json"
    gang.run(probed.measured, 4, 4, 2, str(path))
    whole = read(path)
    assert whole.machines == ("m0", "m1")
    assert all(value for row in whole.bytes_per_second for value in row), "inside as well"
    content = json.loads(path.read_text())
    for name in ("bytes_per_second", "both_ways", "latency_seconds"):
        content[name][1][1] = None
    path.write_text(json.dumps(content))
    assert read(path).missing == [(1, 1)]
    gang.run(probed.measured, 4, 4, 2, str(path))
    again = read(path)
    assert again.missing == []
    assert again.bytes_per_second[0] == whole.bytes_per_second[0], "what was measured stays"
    told = gang.run(probed.refused, 4, 4, 1, str(path))
    assert len(set(told)) == 1
    assert "it is of other links: machines is ('m0', 'm1'), here ('m0', 'm1', 'm2', 'm3')" in told[0]


@pytest.mark.ranks
def test_a_dead_link_is_named_and_what_was_measured_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "links.json"
    told = gang.run(probed.with_a_dead_rank, 3, 3, str(path), 2)
    first = next(dict.fromkeys(pairs) for pairs in rounds(3) if any(2 in pair for pair in pairs))
    partner = next(place for pair in first for place in pair if 2 in pair and place != 2)
    assert f"nothing comes through from m{partner} to m2: the link is dead" in told[partner]
    assert str(path) in told[partner]
    if path.exists():
        assert all(2 in pair for pair in read(path).missing)
