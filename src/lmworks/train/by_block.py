"""Another policy for other blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, final

from torch import nn

from lmworks.core.errors import LmworksError, Problem
from lmworks.core.recipe import NonNegativeInt, Slot
from lmworks.model.sizes import BlockBytes, Held
from lmworks.train.ledger import Forward, Ledger
from lmworks.train.offload import TensorCache
from lmworks.train.saved import Keep, Offload
from lmworks.train.slots import Saved

FORM = 'numbers from 0 on and ranges, both ends included: "0-5, 8", "-3" for 0 to 3, "20-" for 20 and all behind it'
_PART = re.compile(r"(?P<one>\d+)|(?P<first>\d*)\s*-\s*(?P<last>\d*)")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Some blocks and their policy."""

    blocks: str | tuple[NonNegativeInt, ...]
    """Which: numbers from 0 on and ranges ("0-5, 8"; "-3" is 0 to 3, "20-" is 20 and all behind it), or a list of
    numbers."""
    policy: Annotated[Saved, Slot("saved")]
    """What they keep."""

    def __post_init__(self) -> None:
        list(self._ranges())  # raises ValueError, which becomes a problem of the recipe

    def names(self, block: int) -> bool:
        """Whether a block is among them."""
        return any(first <= block and (last is None or block <= last) for first, last in self._ranges())

    def lasts(self) -> list[int]:
        """The last block of each range that has one, for those who know how many there are."""
        return [last if last is not None else first for first, last in self._ranges()]

    def _ranges(self) -> Iterator[tuple[int, int | None]]:
        """First and last block; None: all behind the first."""
        if not isinstance(self.blocks, str):
            if not self.blocks:
                raise ValueError(f"blocks is empty. Legal: {FORM}")
            yield from ((number, number) for number in self.blocks)
            return
        for part in self.blocks.split(","):
            found = _PART.fullmatch(part.strip())
            if found is None or part.strip() == "-":
                raise ValueError(f"blocks: '{part.strip()}' names no blocks. Legal: {FORM}")
            if found["one"]:
                yield int(found["one"]), int(found["one"])
                continue
            first, last = int(found["first"] or 0), int(found["last"]) if found["last"] else None
            if last is not None and last < first:
                raise ValueError(f"blocks: '{part.strip()}' ends before it begins; write {last}-{first}")
            yield first, last


@final
@dataclass(frozen=True, kw_only=True)
class ByBlock(Saved):
    """Another policy for other blocks: each by its number in the whole model, also in a stage of a pipeline."""

    rules: tuple[Rule, ...]
    """Blocks and policies; a block stands in one rule at most."""
    rest: Annotated[Saved, Slot("saved")] = Keep()
    """What blocks keep that no rule names."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Blocks that are not there, blocks in two rules, parts within parts, a rest that nobody falls to."""
        for path, policy in self._named():
            if isinstance(policy, ByBlock):
                yield Problem(path=path, text="by-block does not stand in by-block: write its rules here")
        if not self.rules:
            yield Problem(path="rules", text="are none; then saved is the rest itself")
            return
        try:
            count = recipe.model.n_layers
        except LmworksError:
            return  # a folder that is not there yet; told where it is wrong
        for i, rule in enumerate(self.rules):
            yield from self._of(i, rule, count)
        if self.rest != Keep() and all(any(rule.names(block) for rule in self.rules) for block in range(count)):
            yield Problem(path="rest", text="has no effect: every block stands in a rule")

    def _of(self, i: int, rule: Rule, count: int) -> Iterator[Problem]:
        """What is wrong with the blocks of a rule."""
        outside = [last for last in rule.lasts() if last >= count]
        if outside:
            text = f"names block {max(outside)}; the model has {count}, 0 to {count - 1}"
            yield Problem(path=f"rules.{i}.blocks", text=text)
        named = [block for block in range(count) if rule.names(block)]
        if isinstance(rule.policy, Offload) and named and rule.policy.last >= len(named):
            text = f"is {rule.policy.last} of the rule's {len(named)} blocks: nothing would go out"
            yield Problem(path=f"rules.{i}.policy.last", text=f"{text}. Legal: 0 to {len(named) - 1}")
        for j in range(i):
            both = [block for block in named if self.rules[j].names(block)]
            if both:
                text = f"names block {both[0]}, which stands in rules.{j} already; a block has one policy"
                yield Problem(path=f"rules.{i}.blocks", text=text)

    def _named(self) -> Iterator[tuple[str, Saved]]:
        """Every policy, and where it stands."""
        yield from ((f"rules.{i}.policy", rule.policy) for i, rule in enumerate(self.rules))
        yield "rest", self.rest

    def passes(self, block: nn.Module, name: str, books: Ledger | None = None) -> Forward:
        """As its policy makes it."""
        return self._policy(int(name)).passes(block, name, books)

    def exact(self) -> bool:
        """Where all policies are."""
        return all(policy.exact() for _, policy in self._named())

    def leaves(self) -> bool:
        """Where one policy's do."""
        return any(policy.leaves() for _, policy in self._named())

    def arrange(self, blocks: Mapping[str, nn.Module], books: Ledger | None = None) -> Sequence[TensorCache]:
        """Give each policy its blocks, in their order."""
        caches: list[TensorCache] = []
        for policy, mine in self._shared([int(name) for name in blocks]):
            caches += policy.arrange({str(block): blocks[str(block)] for block in mine}, books)
        return caches

    def again(self, block: int) -> bool:
        """As its policy says."""
        return self._policy(block).again(block)

    def held(self, blocks: Sequence[BlockBytes]) -> Sequence[Held] | None:
        """As the policies say; unknown where one does not know."""
        by_number = {block.number: block for block in blocks}
        found: dict[int, Held] = {}
        for policy, mine in self._shared(list(by_number)):
            told = policy.held([by_number[number] for number in mine])
            if told is None:
                return None
            found |= dict(zip(mine, told, strict=True))
        return [found[block.number] for block in blocks]

    def _policy(self, block: int) -> Saved:
        return next((rule.policy for rule in self.rules if rule.names(block)), self.rest)

    def _shared(self, blocks: Sequence[int]) -> Iterator[tuple[Saved, list[int]]]:
        """Each policy that has blocks here, with them."""
        left = list(blocks)
        for rule in self.rules:
            mine = [block for block in left if rule.names(block)]
            left = [block for block in left if block not in mine]
            if mine:
                yield rule.policy, mine
        if left:
            yield self.rest, left
