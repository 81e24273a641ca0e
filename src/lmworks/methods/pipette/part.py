"""Pipette's rule in a recipe's `layout`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from lmworks.core.errors import Problem, RecipeError
from lmworks.core.recipe import NonNegativeInt, PositiveFloat, PositiveInt
from lmworks.maths.whole import legal_divisors
from lmworks.methods.pipette.plans import Refusal, plans
from lmworks.parallel.layout import Arrangement, Layout
from lmworks.parallel.links import Profile, Table, empty, read
from lmworks.parallel.probe import this_device
from lmworks.train.saved import Recompute

WITHOUT = ("ranks_per_machine", "bytes_per_second", "inside_bytes_per_second")
"""What a profile tells, and what is asked for without one."""


@final
@dataclass(frozen=True, kw_only=True)
class Pipette(Arrangement):
    """The layout that takes least time on measured links, of those that fit, with every machine in its place."""

    memory_gib: PositiveFloat
    """What a rank may hold, GiB. Leave a tenth of the device free."""
    profile: str | None = None
    """The file of measured links that `lmworks probe` wrote. Left out: links are alike, as the next three settings say,
    and machines stay in the launcher's order."""
    ranks_per_machine: PositiveInt | None = None
    """Without a profile: ranks of a machine."""
    machines: PositiveInt | None = None
    """Without a profile: how many there are. Left out: as many as the ranks make."""
    bytes_per_second: PositiveFloat | None = None
    """Without a profile: what a link carries from machine to machine for each rank, one way."""
    inside_bytes_per_second: PositiveFloat | None = None
    """Without a profile: what a rank sends to another one of its machine."""
    flops: PositiveFloat | None = None
    """FLOP/s that a rank reaches in training. Left out: those of matrix products, as the profile has them."""
    moves: PositiveInt = 20_000
    """Orders of machines that are tried for each layout, where there are more than six machines."""
    simulated: NonNegativeInt = 10
    """So many of the best layouts are run on a clock, and the best of them is taken. 0: the closed form decides."""
    seed: NonNegativeInt = 0
    """Of the search. All ranks need the same."""

    @property
    def asked(self) -> int | None:
        """The profile's ranks, or those of the machines that are named; else it takes as many as there are."""
        if self.profile is not None:
            found = read(Path(self.profile))
            return len(found.machines) * found.ranks_per_machine
        return None if self.machines is None else self.machines * (self.ranks_per_machine or 1)

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Settings that a profile replaces, or that are needed without one."""
        if self.profile is not None and self.machines is not None:
            yield Problem(path="machines", text="has no effect: the profile tells it")
        for name in WITHOUT:
            value = getattr(self, name)
            if self.profile is not None and value is not None:
                yield Problem(path=name, text="has no effect: the profile tells it")
            if self.profile is None and value is None:
                yield Problem(
                    path=name, text="is needed without a profile. Measure one: lmworks probe --out links.json"
                )
        if self.profile is None and self.flops is None:
            yield Problem(path="flops", text="is needed without a profile, which tells what products reach")

    def settle(self, world: int, recipe: Any) -> Layout:
        """The best plan's layout. Raises RecipeError, with what would fit, when none does."""
        if world == 1:
            return Layout(dp_shard=1)
        links = self._links(world, recipe)
        flops = self.flops or links.flops_per_second
        if flops is None:
            raise RecipeError([Problem(path="layout.flops", text="is needed: the profile was made without")])
        found, refused = plans(
            recipe,
            links,
            memory_gib=self.memory_gib,
            flops=flops,
            moves=self.moves,
            simulated=self.simulated,
            seed=self.seed,
        )
        if found:
            return found[0].layout if self.profile is not None else dataclasses.replace(found[0].layout, machines=None)
        raise RecipeError([self._nothing(recipe, links, refused)])

    def _links(self, world: int, recipe: Any) -> Profile:
        """Measured links with nothing missing, or links alike."""
        if self.profile is None:
            return self._alike(world)
        found = read(Path(self.profile))
        ranks = len(found.machines) * found.ranks_per_machine
        if ranks != world:
            text = (
                f"is of {len(found.machines)} machines with {found.ranks_per_machine} ranks each, {world} were started"
            )
            raise RecipeError([Problem(path="layout.profile", text=f"{text}. Measure these: lmworks probe --out FILE")])
        kind = recipe.device if recipe.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if kind != "cuda" or torch.cuda.is_available():
            stale = found.stale(*this_device(torch.device(kind)))
            if stale is not None:
                warnings.warn(f"{self.profile}: {stale}", stacklevel=2)
        if found.missing:
            named = ", ".join(found.pair(i, j) for i, j in found.missing[:4])
            more = f", and {len(found.missing) - 4} more" if len(found.missing) > 4 else ""
            text = f"{self.profile}: not measured, and taken as the median of what their machines have: {named}{more}"
            warnings.warn(text, stacklevel=2)
        return found.complete()

    def _alike(self, world: int) -> Profile:
        """A cluster of equal links."""
        each = self.ranks_per_machine
        assert each is not None, "checked"
        if self.machines is not None and world != self.machines * each:
            text = f"is {self.machines}, with {each} ranks each; {world} ranks were started"
            raise RecipeError([Problem(path="layout.machines", text=text)])
        each = min(each, world)
        if world % each:
            legal = legal_divisors(world)
            text = f"{each} does not divide {world} ranks. Legal: {legal}"
            raise RecipeError([Problem(path="layout.ranks_per_machine", text=text)])
        n = world // each
        table: Table = tuple(
            tuple(self.bytes_per_second if i != j else self.inside_bytes_per_second for j in range(n)) for i in range(n)
        )
        facts = {"ranks_per_machine": each, "device": "", "driver": "", "flops_per_second": self.flops}
        nothing = empty(tuple(f"machine {i}" for i in range(n)), message_bytes=0, **facts)
        return dataclasses.replace(nothing, bytes_per_second=table, both_ways=table)

    def _nothing(self, recipe: Any, links: Profile, refused: list[Refusal]) -> Problem:
        """Which constraint binds, and the nearest change that would fit."""
        heavy = [each for each in refused if each.bytes is not None]
        if not heavy:
            return Problem(path="layout", text=f"no layout of these ranks is legal; the first: {refused[0].reason}")
        least = min(heavy, key=lambda each: (each.bytes, each.layout.pp, each.layout.tp))
        layout = least.layout
        text = f"no layout keeps a rank below it; pp = {layout.pp}, tp = {layout.tp} needs least: {least.reason}"
        return Problem(path="layout.memory_gib", text=f"{text}. {self._relaxed(recipe, links)}")

    def _relaxed(self, recipe: Any, links: Profile) -> str:
        """The first change that fits, of the least to the most."""
        again, small = {"saved": Recompute()}, {"micro_batch_size": 1}
        for words, change in (
            ("micro_batch_size = 1", small),
            ('saved.use = "recompute"', again),
            ('saved.use = "recompute" with micro_batch_size = 1', again | small),
        ):
            if self._fits(dataclasses.replace(recipe, **change), links):
                return f"It fits with {words}"
        for times in (2, 4, 8, 16):
            more = _more(links, times)
            if self._fits(dataclasses.replace(recipe, **again, **small), more):
                return f"It fits on {len(more.machines)} machines with blocks run again and micro_batch_size = 1"
        return "More machines alone do not help: offload what is saved (saved.use), or take a smaller model"

    def _fits(self, recipe: Any, links: Profile) -> bool:
        found, _ = plans(recipe, links, memory_gib=self.memory_gib, flops=1.0, moves=1, simulated=0)
        return bool(found)


def _more(links: Profile, times: int) -> Profile:
    """The same with more machines; links do not matter."""
    n = len(links.machines) * times
    table: Table = ((1.0,) * n,) * n
    names = tuple(f"machine {i}" for i in range(n))
    return dataclasses.replace(links, machines=names, bytes_per_second=table, both_ways=table, latency_seconds=table)
