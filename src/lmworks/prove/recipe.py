"""What a proof is: a paper's claims, arms that share a recipe, and the tests that hold one against the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import MinLen

from lmworks.core import recipe as recipes
from lmworks.core.errors import Problem, RecipeError, did_you_mean
from lmworks.core.recipe import NonNegativeInt, PositiveInt, Slot, Table
from lmworks.jobs.executor import Executor
from lmworks.jobs.local import Local

Axis = Literal["steps", "tokens", "flops", "seconds", "joules"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a paper says, and under which conditions."""

    name: str
    """Short, with hyphens; tests refer to it."""
    statement: str
    """One sentence."""
    condition: str
    """Model, data, budget of the paper."""
    figure: str
    """The number as the source has it."""
    source: str
    """Where it stands."""
    untested: str | None = None
    """Why no test below holds it."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train."""

    name: str
    """Short; it is in tables and file names."""
    recipe: str | None = None
    """A recipe file, in place of the proof's own `recipe`."""
    set: dict[str, Any] = field(default_factory=dict)
    """Dotted settings written over the recipe."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Settings to tune, with the values to try."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How the arms' grids are searched, on a seed of their own."""

    seed: NonNegativeInt = 0
    """Not among the proof's seeds, so that no arm is judged on what it was tuned on."""
    steps: PositiveInt | None = None
    """Length of a tuning run; left out: the arm's own."""
    search: Literal["product", "in-turn"] = "product"
    """'product' tries all points; 'in-turn' one setting after the other, in the order of the grid, each at the best
    value of those before it and the arm's own value of those behind."""


@dataclass(frozen=True, kw_only=True)
class Test:
    """One arm held against another on one measured quantity."""

    __test__ = False  # for pytest, which takes every class of this name for one of its own

    claim: str
    """The claim it speaks to."""
    arm: str
    """The arm that is claimed to be different."""
    against: str
    """The arm it is held against."""
    column: str = "val_loss"
    """A column of metrics.jsonl."""
    take: Literal["last", "mean", "min", "max", "reach"] = "last"
    """What of the column: its last value, its mean, least or greatest; or 'reach': at which share of the other arm's
    budget the arm's curve first comes down to the other's last value."""
    compare: Literal["difference", "ratio"] = "difference"
    """arm - against, or arm / against."""
    want: Literal["less", "more", "same"]
    """What the claim says."""
    bound: float | Literal["spread"] | None = None
    """For less and more: where the whole interval must lie; left out: at no effect (0, or 1 for a ratio). For same: how
    far from no effect it may reach; 'spread': as far as the seeds of `against` lie apart."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Claims of one method, and a comparison that tests them."""

    do: Literal["prove"]
    """The verb."""
    method: str | None = None
    """The method's name in the catalogue; left out by `lmworks compare`."""
    arms: tuple[Arm, ...]
    """What is compared."""
    baseline: str
    """The arm that the others are held against, and whose budget is everybody's."""
    seeds: Annotated[tuple[NonNegativeInt, ...], MinLen(1)] = (1, 2, 3)
    """Each arm runs once with each; differences are taken seed by seed."""
    axis: Axis = "tokens"
    """What is equal between the arms."""
    metric: str = "val_loss"
    """The column that tuning makes small and that is drawn."""
    may_differ: tuple[str, ...] = ()
    """Dotted settings, with all below them, in which arms may differ; more is shown as confounded."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """The training recipe that the arms share."""
    tuning: Tuning = Tuning()
    """How grids are searched."""
    claims: tuple[Claim, ...] = ()
    """What the paper says."""
    tests: tuple[Test, ...] = ()
    """What is looked at."""
    executor: Annotated[Executor, Slot("executor")] = Local()
    """Where the runs are done."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Names that point nowhere, and claims that nobody tests."""
        arms = [arm.name for arm in self.arms]
        if len(arms) < 2:
            yield Problem(path="arms", text="a comparison needs two arms or more")
        for name in {name for name in arms if arms.count(name) > 1}:
            yield Problem(path="arms", text=f"two arms are called '{name}'")
        if self.baseline not in arms:
            text = f"no arm is called '{self.baseline}'{did_you_mean(self.baseline, arms)}"
            yield Problem(path="baseline", text=text)
        if self.tuning.seed in self.seeds and any(arm.grid for arm in self.arms):
            yield Problem(path="tuning.seed", text=f"{self.tuning.seed} is one of the seeds that judge; take another")
        yield from self._check_tests(arms)

    def _check_tests(self, arms: list[str]) -> Iterator[Problem]:
        claims = [claim.name for claim in self.claims]
        for i, test in enumerate(self.tests):
            for key, name, known in (
                ("arm", test.arm, arms),
                ("against", test.against, arms),
                ("claim", test.claim, claims),
            ):
                if name not in known:
                    text = f"no {key if key == 'claim' else 'arm'} is called '{name}'{did_you_mean(name, known)}"
                    yield Problem(path=f"tests.{i}.{key}", text=text)
            if test.bound == "spread" and test.want != "same":
                yield Problem(path=f"tests.{i}.bound", text='"spread" goes with want = "same" only')
        tested = {test.claim for test in self.tests}
        for i, claim in enumerate(self.claims):
            if (claim.name in tested) == (claim.untested is not None):
                text = "is tested and says that it is not" if claim.untested else "has no test: add one, or say why not"
                yield Problem(path=f"claims.{i}.untested", text=f"'{claim.name}' {text}")

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)


def arm_table(proof: Proof, arm: Arm, chosen: Table | None = None) -> Table:
    """The arm's training recipe as a table: shared recipe or its own file, its settings, its tuned values.

    Raises RecipeError that names the arm.
    """
    source = f"arm '{arm.name}'"
    if arm.recipe is not None:
        table = recipes.read(recipes.find(arm.recipe, "train"))
    else:
        table = recipes.with_base(proof.recipe)
    firsts = {path: values[0] for path, values in arm.grid.items() if path not in arm.set}
    table = recipes.with_values(table, {**arm.set, **firsts, **(chosen or {})}, source=source)
    if table.get("do") != "train":
        problem = Problem(path="do", text=f"an arm is a training recipe, this one says {table.get('do')!r}")
        raise RecipeError([problem], source=source)
    return table
