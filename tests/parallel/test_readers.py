"""Of the ranks of a machine that need the same rows one reads, and nothing stays behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmworks.parallel import gang
from lmworks.parallel.layout import Layout
from lmworks.parallel.world import Seat, neighbours
from tests.parallel import reading

STEPS = 200
LAYOUTS = {
    "tp-2": Layout(dp_shard=1, tp=2),
    "tp-2-fsdp-2": Layout(dp_shard=2, tp=2),
    "pp-2-cp-2": Layout(dp_shard=1, pp=2, cp=2),
    "replicate-2-cp-2": Layout(dp_shard=1, dp_replicate=2, cp=2),
}


@pytest.mark.ranks
@pytest.mark.parametrize("name", LAYOUTS)
def test_all_ranks_get_identical_bytes_from_one_reader(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    found: list[reading.Drawn] = gang.run(reading.draws, layout.ranks, layout, STEPS, str(tmp_path))
    shares = [layout.place(rank, "batch") for rank in range(layout.ranks)]
    for share in set(shares):
        alike = [seen for seen, of in zip(found, shares, strict=True) if of == share]
        assert len({seen.rows for seen in alike}) == 1
        assert [seen.reads > 0 for seen in alike] == [True] + [False] * (len(alike) - 1)
        assert alike[0].reads >= STEPS
    assert len({seen.rows for seen in found}) == len(set(shares))
    assert not any(seen.during or seen.after for seen in found), "its name is gone before the first step"
    assert all(seen.files <= 0 and not seen.notes for seen in found)
    (alone,) = gang.run(reading.draws, 1, Layout(dp_shard=1), STEPS, str(tmp_path))
    assert len(set(shares)) > 1 or alone.rows == found[0].rows


@pytest.mark.ranks
def test_ranks_that_need_other_rows_share_nothing(tmp_path: Path) -> None:
    found = gang.run(reading.draws, 2, Layout(dp_shard=2), 5, str(tmp_path))
    assert all(seen.reads >= 5 and not seen.notes for seen in found)


@pytest.mark.ranks
@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_is_killed_leaves_nothing_in_memory(dies: int, tmp_path: Path) -> None:
    with pytest.raises(gang.RankFailed, match="of 2 failed"):
        gang.run(reading.draws, 2, Layout(dp_shard=1, tp=2), 40, str(tmp_path), dies)
    assert not list(tmp_path.iterdir())


@pytest.mark.ranks
def test_without_memory_each_rank_reads_and_it_is_said(tmp_path: Path) -> None:
    layout = Layout(dp_shard=1, tp=2)
    want = gang.run(reading.draws, 2, layout, 20, str(tmp_path))
    found = gang.run(reading.draws, 2, layout, 20, str(tmp_path / "nowhere"))
    assert [seen.rows for seen in found] == [seen.rows for seen in want]
    assert all(seen.reads >= 20 for seen in found)
    assert all("each read them: there is no shared memory" in seen.notes[0] for seen in found)


def test_neighbours_are_the_ranks_of_a_machine() -> None:
    layout = Layout(dp_shard=8)
    found = [neighbours(Seat(rank=r, world=8, local_rank=r % 4, local_world=4), layout) for r in range(8)]
    assert found == [range(4)] * 4 + [range(4, 8)] * 4
    several = Layout(dp_shard=8, machines=("h:1", "h:0", "h:2", "h:3"))
    assert neighbours(Seat(rank=1, world=8, local_rank=3, local_world=8), several) == range(2)
    assert neighbours(Seat(rank=5, world=8, local_rank=5, local_world=8), several) == range(4, 6)
