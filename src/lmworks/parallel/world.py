"""The ranks of a run: who this process is, its device, and the process groups of a layout."""

from __future__ import annotations

import dataclasses
import gc
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # torch does not list it
from torch.distributed.rendezvous import rendezvous

from lmworks.core.errors import UsageError
from lmworks.parallel.layout import AXES, Layout
from lmworks.parallel.state import STATE_AXES
from lmworks.parallel.wire import BACK, Group, Wire

TIMEOUT = timedelta(minutes=10)
"""How long a collective waits for the other ranks before the run ends with an error."""
PATIENCE = timedelta(days=7)
"""The same for what one rank does while the others have nothing to do, such as tokenising."""


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Which of how many ranks this process is."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    """Ranks on this machine."""

    @property
    def first(self) -> bool:
        """Whether this rank writes what a run writes once."""
        return self.rank == 0


def seat() -> Seat:
    """As torchrun's environment variables say; one rank where there are none."""
    if "WORLD_SIZE" not in os.environ:
        return Seat()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing and os.environ["WORLD_SIZE"] != "1" and not dist.is_initialized():
        raise UsageError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set",
            next_step="start ranks with lmworks launch or torchrun, which set all of them",
        )
    rank, world, local_rank = (int(os.environ.get(name, default)) for name, default in zip(names, "010", strict=True))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return Seat(rank=rank, world=world, local_rank=local_rank, local_world=local_world)


def machine(place: Seat, each: int) -> str:
    """The name of a machine of `each` ranks: the host's, with a number behind it where a host counts as several."""
    host = platform.node()
    return host if place.local_world == each else f"{host}:{place.local_rank // each}"


def seated(place: Seat, layout: Layout) -> Seat:
    """The seat of this process where the layout says which machine holds which of its ranks, else as it is.

    The launcher's numbers of machines may be others each time; names stay. Raises UsageError on a machine that the
    layout does not name.
    """
    if layout.machines is None:
        return place
    each = layout.ranks // len(layout.machines)
    name = machine(place, each)
    if place.local_world % each or name not in layout.machines:
        raise UsageError(
            f"this machine is '{name}', with {place.local_world} ranks",
            where="layout.machines",
            legal=f"{each} ranks on each of {', '.join(layout.machines)}",
            next_step="start the run there, or take machines out of the recipe's layout",
        )
    return dataclasses.replace(place, rank=layout.machines.index(name) * each + place.local_rank % each)


def neighbours(place: Seat, layout: Layout) -> range:
    """The ranks on the machine of a seat, this one among them; where a host counts as several machines, on its own."""
    each = place.local_world if layout.machines is None else layout.ranks // len(layout.machines)
    first = place.rank - place.local_rank % each
    return range(first, first + each)


def device_of(kind: str, place: Seat) -> torch.device:
    """This rank's device: its own GPU, or the CPU."""
    if kind != "cuda":
        return torch.device(kind)
    device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@contextmanager
def connected(place: Seat, device: torch.device, *, patience: timedelta = TIMEOUT) -> Iterator[None]:
    """The ranks can speak to each other inside. Does nothing for a single rank.

    `patience`: how long each waits for another one. Raises UsageError when two processes take one rank.
    """
    if place.world == 1:
        yield
        return
    mine = not dist.is_initialized()
    if mine:
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = _store()
        mine_here = f"{platform.node()} {os.getpid()}"
        there = store.compare_set(f"seat {place.rank}", "", mine_here).decode()
        if there != mine_here:
            text = f"two processes take rank {place.rank}, on {there.split()[0]} and on {platform.node()}"
            raise UsageError(text, where="layout.machines", legal="machines of different names")
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world, timeout=patience)
    elif dist.get_rank() != place.rank:
        raise UsageError("these ranks are connected already, in another order", where="layout.machines")
    try:
        yield
    finally:
        if mine:
            dist.destroy_process_group()


@contextmanager
def temporary_groups() -> Iterator[None]:
    """Groups that are made inside end with it: each has threads, and a process may go through many layouts."""
    known = dist.distributed_c10d._world.pg_map  # torch has no public list of them
    before = set(known)
    try:
        yield
    finally:
        for group in [group for group in known if group not in before]:
            dist.destroy_process_group(group)
        gc.collect()  # FSDP's modules hold their groups in circles, and a group holds threads


def _store() -> Any:
    """Where ranks find each other, apart from what those of an earlier attempt left there.

    torchrun keeps one store over its restarts. Gloo would take the addresses of processes that are gone.
    """
    names = ("TORCHELASTIC_RESTART_COUNT", "WORLD_SIZE")
    store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
    return PrefixStore("/".join(os.environ.get(name, "") for name in names), store)


def wire(layout: Layout, place: Seat) -> Wire:
    """The groups of every axis and view that this rank is in. All ranks call it together."""
    groups: dict[str, Group] = {}
    if layout.ranks > 1:
        more = layout.state.axes(layout.size("fsdp")) if layout.state is not None else ()
        served = ("attention",) if layout.servers is not None else ()  # a group of its own: beside all else
        for name in (*AXES, "batch", "fsdp", "loss", "ep", "edp", *more, *served):
            if layout.size(name) > 1:
                groups[name] = _group(layout, name)
        everyone = dist.group.WORLD
        assert everyone is not None, "ranks are connected"
        groups["world"] = everyone
        groups["patient"] = dist.new_group(backend="gloo", timeout=PATIENCE)
        if layout.pp > 2:
            groups["ends"] = _ends(layout)
        if layout.sends == "early":
            groups[BACK] = _group(layout, "pp")
    return Wire(layout, place.rank, groups, first_here=place.local_rank == 0, here=neighbours(place, layout))


def lines(layout: Layout, axis: str) -> list[list[int]]:
    """The ranks of every group of an axis or a view: those that differ along it only, in order."""
    found: dict[int, list[int]] = {}
    stride = _stride(layout, axis)
    for rank in range(layout.ranks):
        found.setdefault(rank - layout.place(rank, axis) * stride, []).append(rank)
    return list(found.values())


def _stride(layout: Layout, axis: str) -> int:
    """How far apart neighbours along an axis are."""
    if axis in ("ep", "edp"):
        return layout.tp * (layout.ep if axis == "edp" else 1)
    if layout.state is not None and axis.partition("/")[0] in STATE_AXES:
        return layout.tp * layout.state.stride(axis, layout.size("fsdp"))
    names = {"batch": "dp_shard", "fsdp": "cp", "loss": "cp", "attention": "cp"}
    last = AXES.index(names.get(axis, axis))
    stride = 1
    for name in AXES[last + 1 :]:
        stride *= layout.size(name)
    return stride


def _group(layout: Layout, axis: str) -> Group:
    own: Group
    own, _ = dist.new_subgroups_by_enumeration(lines(layout, axis), timeout=TIMEOUT)  # type: ignore[no-untyped-call]
    return own


def _ends(layout: Layout) -> Group:
    """The first and the last rank of each pipeline: they share a tied token table."""
    pairs = [[line[0], line[-1]] for line in lines(layout, "pp")]
    own: Group  # or None where a rank is neither, which then never asks
    own, _ = dist.new_subgroups_by_enumeration(pairs, timeout=TIMEOUT)  # type: ignore[no-untyped-call]
    return own
