"""What each block keeps for its backward pass."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, final

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lmworks.core.errors import Problem
from lmworks.core.home import home
from lmworks.core.recipe import NonNegativeInt, PositiveInt, Slot
from lmworks.model.sizes import BlockBytes, Held
from lmworks.train import products
from lmworks.train.backends import Disk, Host
from lmworks.train.ledger import Forward, Ledger, counted_beside
from lmworks.train.offload import Ahead, TensorCache, sent
from lmworks.train.slots import Saved


@final
@dataclass(frozen=True, kw_only=True)
class Keep(Saved):
    """Keep every tensor that autograd saves: fastest, most memory."""

    def passes(self, block: nn.Module, name: str, books: Ledger | None = None) -> Forward:
        """As they are."""
        return block.forward

    def exact(self) -> bool:
        """It is what others are held against."""
        return True

    def held(self, blocks: Sequence[BlockBytes]) -> Sequence[Held]:
        """All of it."""
        return [Held(waiting=block.whole, working=0) for block in blocks]


@final
@dataclass(frozen=True, kw_only=True)
class Recompute(Saved):
    """Keep a block's input and run the block again in the backward pass: about a third more work, far less memory."""

    every: PositiveInt = 1
    """Recompute blocks 0, every, 2 * every, ...; the others keep their tensors."""
    keep: Literal["input", "products"] = "input"
    """What a block that is run again keeps: its input alone, or what its linear layers and fused attention gave as
    well. Then only norms, activations, rotations and attention by tiles are run again."""

    def passes(self, block: nn.Module, name: str, books: Ledger | None = None) -> Forward:
        """Twice where the block is chosen."""
        return recomputed(block.forward, name, books, keep=self.keep) if self.again(int(name)) else block.forward

    def exact(self) -> bool:
        """The second pass gives what the first one gave."""
        return True

    def again(self, block: int) -> bool:
        """Of the chosen ones."""
        return block % self.every == 0

    def held(self, blocks: Sequence[BlockBytes]) -> Sequence[Held]:
        """The input and what else is kept; the whole block while it is run again."""
        found = []
        for block in blocks:
            waiting = block.entrance + (block.products if self.keep == "products" else 0)
            waiting = waiting if self.again(block.number) else block.whole
            found.append(Held(waiting=waiting, working=max(0, block.whole - waiting)))
        return found


@final
@dataclass(frozen=True, kw_only=True)
class Offload(Saved):
    """Send saved tensors to files or host memory after a block's forward pass, and back just before its backward pass.

    On a CPU, host memory is the memory that the run computes in: `to = "host"` only shows there that nothing changes.
    """

    """While a step runs."""
    to: Literal["disk", "host"] = "disk"
    """Files, or pinned host memory."""
    folders: tuple[str, ...] = ()
    """Where the files are, one in each folder, written in turns; none: offload/ where lmworks keeps its caches."""
    last: NonNegativeInt = 1
    """Blocks at the end that keep their tensors: they are needed again at once."""
    least_bytes: NonNegativeInt = 1 << 20
    """Smaller tensors stay."""
    around: Annotated[Saved, Slot("saved")] = Keep()
    """What blocks save at all. Around "recompute" only their inputs go out, and blocks are run again."""
    threads: PositiveInt = 2
    """Threads that write, and as many that read."""
    ahead: bool = True
    """Read a block's tensors back while the block behind it is at work."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Compiled blocks save other tensors; settings without effect."""
        if recipe.compile:
            text = (
                "offload works on blocks that are not compiled. Legal: compile = false, or saved.use = keep, recompute"
            )
            yield Problem(path="compile", text=text)
        yield from refused_around(self.around)
        if self.folders and self.to == "host":
            yield Problem(path="folders", text="has no effect with to = 'host'")
        if self.last >= recipe.model.n_layers:
            most = recipe.model.n_layers - 1
            yield Problem(path="last", text=f"is {self.last}: nothing would go out. Legal: 0 to {most}")

    def passes(self, block: nn.Module, name: str, books: Ledger | None = None) -> Forward:
        """As the policy inside makes it."""
        return self.around.passes(block, name, books)

    def arrange(self, blocks: Mapping[str, nn.Module], books: Ledger | None = None) -> Sequence[TensorCache]:
        """Wrap the blocks' forward; the cache that holds what went out."""
        books = books or Ledger()
        ahead: Ahead = "block" if self.ahead else "off"
        cache = TensorCache(self._backend(), books, least=self.least_bytes, threads=self.threads, ahead=ahead)
        for index, (name, block) in enumerate(blocks.items()):
            forward = self.passes(block, name, books)
            block.forward = sent(forward, name, cache, first=index == 0, out=index < len(blocks) - self.last)
        return [cache]

    def again(self, block: int) -> bool:
        """As the policy inside says."""
        return self.around.again(block)

    def leaves(self) -> bool:
        """They do."""
        return True

    def _backend(self) -> Disk | Host:
        if self.to == "host":
            return Host()
        folders = [Path(folder).expanduser() for folder in self.folders] or [home() / "offload"]
        return Disk(folders)


def refused_around(policy: Saved) -> Iterator[Problem]:
    """A policy whose saved tensors leave memory already."""
    if policy.leaves():
        yield Problem(
            path="around",
            text="sends saved tensors out itself. Legal: one that leaves them in memory, as keep or recompute",
        )


def recomputed(
    forward: Forward, name: str, books: Ledger | None, *, keep: Literal["input", "products"] = "input"
) -> Forward:
    """The same, run again in the backward pass; without its products where those are kept.

    Nobody counts in blocks that are compiled: there the compiler decides what is kept, by the same policy.
    """

    made = functools.partial(_contexts if keep == "input" else products.contexts, name, books)

    # not a partial of torch's function: the compiler leaves those alone, with all that is in them
    @functools.wraps(forward)
    def again(*words: Any, **named: Any) -> Any:
        if keep == "input" and books is None:
            return checkpoint(forward, *words, use_reentrant=False, **named)
        if torch.compiler.is_compiling():  # it wants the policy's name in sight
            seen = functools.partial(create_selective_checkpoint_contexts, products.policy)
            return checkpoint(forward, *words, use_reentrant=False, context_fn=seen, **named)
        return checkpoint(forward, *words, use_reentrant=False, context_fn=made, **named)

    return again


def _contexts(name: str, books: Ledger | None) -> products.Contexts:
    """What is entered around a block's first pass and around its second."""
    return nullcontext(), nullcontext() if books is None else products.Again(lambda: counted_beside(books, name))
