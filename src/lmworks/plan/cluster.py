"""Machines and links as data: `recipes/clusters/*.toml`. Every figure says where it is from.

Ranks stand on a ladder of levels, the fastest first: the dies of a package, the devices of a node, all nodes. A level
joins blocks of so many neighbouring ranks; the last joins all that there are.

How much of a data sheet's rate is reached comes from a fit (`recipes/clusters/fits/*.toml`), which keeps the figures
that it was fitted to and what it leaves of them. A cluster whose hardware nobody fitted borrows one, and says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, final

from lmworks.core import recipe as recipes
from lmworks.core.errors import Problem, RecipeError, UsageError, did_you_mean
from lmworks.core.recipe import PositiveFloat, PositiveInt

FOLDER = "clusters"
"""Below `recipes/`."""
Dtype = Literal["fp32", "bf16", "fp8"]


@final
@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number, and where it is from."""

    value: float
    """In the unit of the setting that it stands in."""
    source: str
    """A page, a data sheet, a measurement."""
    checked: bool = True
    """False: written from memory, or a guess; nobody held it against its source."""

    def __post_init__(self) -> None:
        if not 0 <= self.value < float("inf"):
            raise ValueError(f"is {self.value}; legal: a number from 0 up")


@final
@dataclass(frozen=True, kw_only=True)
class Level:
    """Links of one speed."""

    name: str
    """Of the links."""
    ranks: PositiveInt | None = None
    """Neighbouring ranks that they join; left out: all that there are."""
    bytes_per_second: Figure
    """Of each device, in one direction."""
    latency_seconds: Figure
    """Of one message."""


@final
@dataclass(frozen=True, kw_only=True)
class OfRegion:
    """A figure that hangs on where the machines stand."""

    region: str
    """A name; the first of a list is taken where nobody says."""
    value: float
    """In the unit of the list."""
    source: str
    """A page, and its year."""
    checked: bool = True
    """As in a figure."""


@final
@dataclass(frozen=True, kw_only=True)
class Point:
    """A published or measured figure beside what the fit gives."""

    name: str
    """What was run."""
    published: float
    """A rate of one device in the source's unit: TFLOP/s as it counts them, or tokens per second."""
    modelled: float
    """The same by the planner with this fit."""
    used: bool
    """Whether the fit saw it."""

    @property
    def residual(self) -> float:
        """Relative: modelled over published, less 1."""
        return self.modelled / self.published - 1


@final
@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """How much of a data sheet's rates is reached, by two fitted numbers.

    A product whose narrowest side has w values runs at `matrix` w / (w + `half_width`) of the peak; what is bound by
    memory at `memory` of the bandwidth.
    """

    matrix: PositiveFloat
    """Share of the peak that wide products reach."""
    half_width: float
    """Width at which products reach half of that."""
    memory: PositiveFloat = 1.0
    """Share of the memory's bandwidth. Not fitted where it is 1."""
    source: str
    """What it was fitted to, or why it is a guess."""
    fitted: bool
    """Whether it was fitted to this hardware."""
    points: tuple[Point, ...] = ()
    """The figures beside the fit."""

    def share(self, width: float) -> float:
        """Of the peak, for a product whose narrowest side has `width` values."""
        return self.matrix * width / (width + self.half_width)


@final
@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Devices, links, power and prices."""

    name: str
    """For people."""
    device: str
    """What one rank computes on."""
    kind: Literal["gpu", "cpu"] = "gpu"
    """Whose forms of attention and norms it runs."""
    devices_per_node: PositiveInt
    """Ranks of a node."""
    memory_bytes: Figure
    """Of one device."""
    fp32: Figure
    """FLOP/s of dense products in float32 (TF32 where that is what float32 products take)."""
    bf16: Figure
    """FLOP/s of dense products in bfloat16."""
    fp8: Figure | None = None
    """FLOP/s of dense products in eight bits; left out: it has none."""
    memory_bytes_per_second: Figure
    """Of the device's own memory."""
    host_bytes_per_second: Figure | None = None
    """Each way between a device and its host's memory; left out: saved tensors cannot go there."""
    disk_bytes_per_second: Figure | None = None
    """Of a node's disks, written, one device's share."""
    node_memory_bytes: Figure | None = None
    """Of a node's own memory, for what making it cost the climate; left out: that is not told."""
    sockets: PositiveInt = 2
    """Processors of a node."""
    dies: PositiveInt = 1
    """Devices that one board holds."""
    links: tuple[Level, ...]
    """The fastest first."""
    watts: Figure
    """Of one device at work, its share of the node's rest included."""
    idle_watts: Figure
    """The same while it waits."""
    price: tuple[OfRegion, ...] = ()
    """US dollars for one device and hour."""
    carbon: tuple[OfRegion, ...] = ()
    """Grams of CO2 per kWh."""
    fit: str
    """File in `recipes/clusters/fits/`, without .toml."""

    def problems(self) -> Iterator[Problem]:
        """Levels out of order."""
        joined = [level.ranks for level in self.links]
        if not joined or joined[-1] is not None or None in joined[:-1]:
            yield Problem(path="links", text="the last level, and no other, leaves `ranks` out: it joins all nodes")
            return
        below = 1
        for number, ranks in enumerate(joined[:-1]):
            assert ranks is not None, "only the last level joins all"
            if ranks <= below or ranks % below:
                text = f"is {ranks}; a level joins a multiple of the {below} ranks of the level before it, and more"
                yield Problem(path=f"links.{number}.ranks", text=text)
            below = ranks

    @cached_property
    def efficiency(self) -> Efficiency:
        """From the fit's file."""
        path = recipes.recipes_folder() / FOLDER / "fits" / f"{self.fit}.toml"
        if not path.is_file():
            known = sorted(p.stem for p in path.parent.glob("*.toml"))
            text = f"no fit is called '{self.fit}'{did_you_mean(self.fit, known)} Legal: {', '.join(known)}"
            raise RecipeError([Problem(path="fit", text=text)], source=self.name)
        found = recipes.decode_as(Efficiency, recipes.read(path), source=str(path))
        assert isinstance(found, Efficiency)
        return found

    def slowed(self, factor: float) -> Cluster:
        """The same with devices that take `factor` times as long for all they do by themselves: products, attention,
        what moves through their memory, the update. Links stay as they are."""
        known, found = self.efficiency, dataclasses.replace(self)
        less = dataclasses.replace(known, matrix=known.matrix / factor, memory=known.memory / factor)
        found.__dict__["efficiency"] = less  # a cached property of a frozen dataclass
        return found

    def flops(self, dtype: Dtype) -> float:
        """FLOP/s of dense products by the data sheet. Raises UsageError where the device has none of that type."""
        figure: Figure | None = getattr(self, dtype)
        if figure is None:
            raise UsageError(f"{self.device} multiplies no {dtype}", where=self.name, legal="precision bf16 or fp32")
        return figure.value

    def unchecked(self) -> list[str]:
        """Settings whose figures nobody held against their source."""
        found = [name for name, value in vars(self).items() if isinstance(value, Figure) and not value.checked]
        for level in self.links:
            both = {"bytes_per_second": level.bytes_per_second, "latency_seconds": level.latency_seconds}
            found += [f"{level.name} {name}" for name, figure in both.items() if not figure.checked]
        for kind in ("price", "carbon"):
            found += [f"{kind} {entry.region}" for entry in getattr(self, kind) if not entry.checked]
        return found


def names() -> list[str]:
    """The clusters that lmworks ships."""
    return sorted(path.stem for path in (recipes.recipes_folder() / FOLDER).glob("*.toml"))


def load(name: str) -> Cluster:
    """The cluster of a shipped name, or of a file that ends in .toml. Raises UsageError, RecipeError."""
    path = Path(name) if name.endswith(".toml") else recipes.recipes_folder() / FOLDER / f"{name}.toml"
    if not path.is_file():
        known = names()
        what = f"no cluster is called '{name}'{did_you_mean(name, known)}"
        raise UsageError(what, legal=f"{', '.join(known)}, or a .toml file of your own")
    found = recipes.decode_as(Cluster, recipes.read(path), source=str(path))
    assert isinstance(found, Cluster)
    if problems := list(found.problems()):
        raise RecipeError(problems, source=str(path))
    return found
