"""Seats: which rank a process is, by the launcher's number or by the name of its machine."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import pytest
import torch

from lmworks.core import recipe as recipes
from lmworks.core.errors import RecipeError, UsageError
from lmworks.parallel import gang, world
from lmworks.parallel.launch import Launch, launch
from lmworks.parallel.layout import Layout
from lmworks.parallel.world import Seat, machine, seated
from tests.parallel.groups import entries
from tests.train import ranked
from tests.train.conftest import cache, text

__all__ = ["cache", "text"]

HOST = platform.node()


def test_without_names_a_seat_stays() -> None:
    place = Seat(rank=3, world=4, local_rank=1, local_world=2)
    assert seated(place, Layout(dp_shard=4)) is place


def test_a_host_is_a_machine_or_several() -> None:
    place = Seat(rank=7, world=8, local_rank=3, local_world=4)
    assert machine(place, 4) == HOST
    assert machine(place, 2) == f"{HOST}:1"
    assert machine(place, 1) == f"{HOST}:3"


@pytest.mark.parametrize("rank", [0, 4])
def test_the_name_decides_and_not_the_launchers_number(rank: int) -> None:
    layout = Layout(dp_shard=8, machines=("a", HOST))
    for local in range(4):
        place = Seat(rank=rank + local, world=8, local_rank=local, local_world=4)
        assert seated(place, layout) == Seat(rank=4 + local, world=8, local_rank=local, local_world=4)


def test_hosts_that_stand_for_several_machines_fill_every_rank_once() -> None:
    layout = Layout(dp_shard=6, machines=(f"{HOST}:2", f"{HOST}:0", f"{HOST}:1"))
    found = [seated(Seat(rank=i, world=6, local_rank=i, local_world=6), layout).rank for i in range(6)]
    assert found == [2, 3, 4, 5, 0, 1]


@pytest.mark.parametrize(("names", "local_world"), [(("a", "b"), 4), ((f"{HOST}:0", "b"), 4), ((HOST, "b"), 3)])
def test_a_machine_that_is_not_named_is_told_the_names(names: tuple[str, ...], local_world: int) -> None:
    place = Seat(rank=0, world=8, local_rank=0, local_world=local_world)
    with pytest.raises(UsageError, match=rf"layout.machines: this machine is '{HOST}(.|\n)*4 ranks on each of"):
        seated(place, Layout(dp_shard=8, machines=names))


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["a", "b", "a"], "layout.machines: names a more than once"),
        (["a", "b", "c"], "layout.machines: names 3, which cannot share 4 ranks alike"),
        ([], "layout.machines: names none. Leave it out"),
    ],
)
def test_names_that_cannot_be(names: list[str], told: str) -> None:
    sets = ["layout.dp_shard=4", f"layout.machines={json.dumps(names)}"]
    with pytest.raises(RecipeError) as refused:
        recipes.load("quickstart", verb="train", sets=sets)
    assert [str(problem) for problem in refused.value.problems] == [told]


def test_two_processes_on_one_seat_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seat is taken by a process of another machine: the second one ends before it would wait for the others."""
    store = torch.distributed.HashStore()  # noqa: TID251  (a store, no collective)
    store.set("seat 1", "elsewhere 17")
    monkeypatch.setattr(world, "_store", lambda: store)
    told = pytest.raises(UsageError, match=rf"two processes take rank 1, on elsewhere and on {HOST}")
    with told, world.connected(Seat(rank=1, world=2), torch.device("cpu")):
        pass


@pytest.mark.ranks
def test_a_group_costs_each_member_one_word_and_nobody_else_any() -> None:
    """So what is said grows as groups and their members do; a barrier of all for each group would be their product."""
    axes = {
        Layout(dp_shard=4): ["dp_shard", "batch", "fsdp", "loss", "edp"],
        Layout(dp_shard=1, dp_replicate=4): ["dp_replicate", "batch", "loss"],
        Layout(dp_shard=1, tp=4): ["tp"],
        Layout(dp_shard=1, tp=2, pp=2): ["tp", "pp"],  # two groups each
        Layout(dp_shard=2, dp_replicate=2): ["dp_replicate", "dp_shard", "batch", "fsdp", "loss", "edp"],
        Layout(dp_shard=1, pp=2, tp=2, sends="early"): ["tp", "pp", "back"],
    }
    found = gang.run(entries, 4, list(axes))[0]
    assert found == [4 * (len(names) + 1) for names in axes.values()]  # and one of all ranks, for long waits
    assert gang.run(entries, 4, [Layout(dp_shard=1, pp=4)])[0] == [4 * 2 + 2]  # and the two ends


@pytest.mark.ranks
def test_a_run_honours_the_names_and_stays_the_same_run(text: Path, cache: Path, tmp_path: Path) -> None:
    """The second process holds the first stage: it takes rank 0, and so it is the one that reports."""
    found = {}
    for name, machines in {"plain": None, "turned": [f"{HOST}:1", f"{HOST}:0"]}.items():
        layout = {"pp": 2, "dp_shard": 1} | ({"machines": machines} if machines else {})
        spec = ranked.table(text, cache, layout=layout, micro_batch_size=4)
        path = tmp_path / f"{name}.toml"
        path.write_text(recipes.dump(recipes.decode(spec)))
        words = [sys.executable, "-m", "lmworks", "train", str(path), "--run", str(tmp_path / name)]
        launch(lambda _, words=words: words, Launch(ranks=2, logs=tmp_path / name / "logs", threads=1), lambda _: None)
        found[name] = ranked.losses(tmp_path / name)
        log = (tmp_path / name / "logs" / "attempt_0" / "rank_1.log").read_text()
        assert ("step 12/12" in log) == (name == "turned")
    assert found["plain"] == found["turned"]
