"""What each block keeps for its backward pass."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lmworks.core.errors import Problem
from lmworks.core.home import home
from lmworks.core.recipe import NonNegativeInt, PositiveInt
from lmworks.train import products
from lmworks.train.backends import Disk, Host
from lmworks.train.ledger import Ledger, counted_beside
from lmworks.train.offload import TensorCache
from lmworks.train.slots import BlockBytes, Held, Saved

Forward = Callable[..., Any]


@final
@dataclass(frozen=True, kw_only=True)
class Keep(Saved):
    """Keep every tensor that autograd saves: fastest, most memory."""

    def arrange(self, blocks: Mapping[str, nn.Module], books: Ledger | None = None) -> Sequence[TensorCache]:
        """Only count them."""
        for name, block in blocks.items() if books is not None else ():
            block.forward = counted(block.forward, name, books)
        return ()

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

    def arrange(self, blocks: Mapping[str, nn.Module], books: Ledger | None = None) -> Sequence[TensorCache]:
        """Wrap the chosen blocks' forward. Names of parameters stay as they are."""
        for name, block in blocks.items():
            chosen = self.again(int(name))
            forward = recomputed(block.forward, name, books, keep=self.keep) if chosen else block.forward
            block.forward = counted(forward, name, books)
        return ()

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

    to: Literal["disk", "host"] = "disk"
    """Files, or pinned host memory."""
    folders: tuple[str, ...] = ()
    """Where the files are, one in each folder, written in turns; none: offload/ where lmworks keeps its caches."""
    last: NonNegativeInt = 1
    """Blocks at the end that keep their tensors: they are needed again at once."""
    least_bytes: NonNegativeInt = 1 << 20
    """Smaller tensors stay."""
    recompute: bool = False
    """Send only a block's input out, and run the block again in the backward pass."""
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
        if self.folders and self.to == "host":
            yield Problem(path="folders", text="has no effect with to = 'host'")
        if self.last >= recipe.model.n_layers:
            most = recipe.model.n_layers - 1
            yield Problem(path="last", text=f"is {self.last}: nothing would go out. Legal: 0 to {most}")

    def arrange(self, blocks: Mapping[str, nn.Module], books: Ledger | None = None) -> Sequence[TensorCache]:
        """Wrap the blocks' forward; the cache that holds what went out."""
        cache = TensorCache(
            self._backend(), books or Ledger(), least=self.least_bytes, threads=self.threads, ahead=self.ahead
        )
        for index, (name, block) in enumerate(blocks.items()):
            forward = recomputed(block.forward, name, books) if self.recompute else block.forward
            if index < len(blocks) - self.last:
                block.forward = _sent(forward, name, cache, first=index == 0)
            else:
                block.forward = counted(forward, name, books)
        return [cache]

    def again(self, block: int) -> bool:
        """Of all."""
        return self.recompute

    def _backend(self) -> Disk | Host:
        if self.to == "host":
            return Host()
        folders = [Path(folder).expanduser() for folder in self.folders] or [home() / "offload"]
        return Disk(folders, f"saved-{uuid.uuid4().hex}")


def counted(forward: Forward, name: str, books: Ledger | None) -> Forward:
    """The same, with what it saves in the books."""
    if books is None:
        return forward

    @functools.wraps(forward)
    def with_books(*words: Any, **named: Any) -> Any:
        with books.counting(name):
            return forward(*words, **named)

    return with_books


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


def _sent(forward: Forward, name: str, cache: TensorCache, *, first: bool) -> Forward:
    """The same, with what it saves in the cache."""

    @functools.wraps(forward)
    def with_cache(*words: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*words, **named)
        if first:
            cache.begin()
        with cache.block(name):
            return forward(*words, **named)

    return with_cache
