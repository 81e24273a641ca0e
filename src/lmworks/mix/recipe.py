"""What a recipe of `lmworks mix` holds: the run that a mixture is sought for, smaller ones, and the search."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from lmworks.core import recipe as recipes
from lmworks.core.errors import Problem, RecipeError, did_you_mean
from lmworks.core.recipe import NonNegativeInt, PositiveFloat, Slot, Table
from lmworks.jobs.executor import Executor
from lmworks.jobs.local import Local
from lmworks.mix.asking import Searching
from lmworks.mix.problem import TOP

Named = Literal["chosen", "natural", "uniform", "worst"]


@dataclass(frozen=True, kw_only=True)
class Size:
    """A smaller run than the one that the mixture is for."""

    name: str
    """Short; it is in tables and file names."""
    set: dict[str, Any] = field(default_factory=dict)
    """Dotted settings written over the recipe: fewer blocks, fewer steps. Not the tokenizer, not the readers."""
    cost: PositiveFloat | None = None
    """Of one run, in runs of the target's size; left out: by the FLOPs of both."""


@dataclass(frozen=True, kw_only=True)
class Verifying:
    """Runs of the target's size that show whether the answer is one. They are paid for, and counted."""

    mixtures: tuple[Named, ...] = ()
    """Which are run: the chosen one, the natural, all sources alike, the one predicted to be worst. None: nothing is
    verified, and the answer says so."""
    seeds: tuple[NonNegativeInt, ...] = (1,)
    """Each is run once with each."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """A search for the shares of a run's sources."""

    do: Literal["mix"]
    """The verb."""
    recipe: dict[str, Any]
    """The training recipe that a mixture is sought for; its readers are the sources."""
    search: Annotated[Searching, Slot("mixture")]
    """What decides which runs are made, and which mixture comes out."""
    sizes: tuple[Size, ...] = ()
    """Smaller runs, cheapest first."""
    target: dict[str, float] = field(default_factory=dict)
    """What is to be small: the weight of the validation loss of sources, by name. Left out: the mean of all."""
    max_epochs: PositiveFloat | None = 4.0
    """How often the run may read a source; beyond 4 times each further one teaches less."""
    bounds: dict[str, list[float]] = field(default_factory=dict)
    """Least and greatest share of sources, by name, as in { docs = [0.1, 0.5] }."""
    verify: Verifying = Verifying()
    """Runs of the target's size at the end."""
    seed: NonNegativeInt = 0
    """Of the drawn mixtures and of the small runs, which differ in their mixtures only."""
    executor: Annotated[Executor, Slot("executor")] = Local()
    """Where the runs are made."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Recipes that cannot be run, names that point nowhere, sizes that would not compare."""
        decoded = yield from self._decoded("recipe", {})
        if decoded is None:
            return
        names = list(decoded.data.shares)
        if decoded.data.validation == 0:
            yield Problem(path="recipe.data.validation", text="is 0: there is nothing to tell mixtures apart by")
        for i, reader in enumerate(decoded.data.readers):
            if reader.weight != 1.0:
                yield Problem(path=f"recipe.data.readers.{i}.weight", text="has no effect: shares are what is sought")
        yield from self._check_names(names)
        yield from self._check_sizes()

    def _check_names(self, names: list[str]) -> Iterator[Problem]:
        for key, given in (("target", self.target), ("bounds", self.bounds)):
            for name in given:
                if name not in names:
                    text = f"no reader is called '{name}'{did_you_mean(name, names)} Legal: {', '.join(names)}"
                    yield Problem(path=f"{key}.{name}", text=text)
        for name, pair in self.bounds.items():
            if len(pair) != 2 or not 0 <= pair[0] <= pair[1] <= 1:
                yield Problem(path=f"bounds.{name}", text=f"must be [least, greatest] from 0 to 1, got {pair}")
        if self.target and not any(self.target.values()):
            yield Problem(path="target", text="all weights are 0")

    def _check_sizes(self) -> Iterator[Problem]:
        names = [size.name for size in self.sizes]
        for i, size in enumerate(self.sizes):
            if size.name == TOP or names.count(size.name) > 1 or not size.name.replace("-", "").isalnum():
                text = f"'{size.name}' is taken, or no name of letters, digits and hyphens"
                yield Problem(path=f"sizes.{i}.name", text=text)
            for path in size.set:
                if path.startswith(("data.tokenizer", "data.readers", "data.validation")):
                    text = "would make losses that do not compare with the target's: leave it to the recipe"
                    yield Problem(path=f"sizes.{i}.set.{path}", text=text)
            yield from self._decoded(f"sizes.{i}", size.set)

    def _decoded(self, where: str, sets: Table) -> Generator[Problem, None, Any]:
        """What is wrong with the recipe; returns it decoded, or None."""
        try:
            return recipes.decode(self.table(sets), verb="train", source=where)
        except RecipeError as error:
            for problem in error.problems:
                yield Problem(path=f"{where}.{problem.path}".rstrip("."), text=problem.text)
        return None

    def table(self, sets: Table | None = None) -> Table:
        """The training recipe as a table, with settings over it."""
        return recipes.with_values(recipes.with_base(self.recipe), sets or {})
