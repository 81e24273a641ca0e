"""What each block keeps for its backward pass."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, final

from torch import nn
from torch.utils.checkpoint import checkpoint

from lmworks.core.errors import Problem
from lmworks.core.home import home
from lmworks.core.recipe import NonNegativeInt, PositiveInt
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


@final
@dataclass(frozen=True, kw_only=True)
class Recompute(Saved):
    """Keep a block's input and run the block again in the backward pass: about a third more work, far less memory."""

    every: PositiveInt = 1
    """Recompute blocks 0, every, 2 * every, ...; the others keep their tensors."""

    def passes(self, block: nn.Module, name: str, books: Ledger | None = None) -> Forward:
        """Twice where the block is chosen."""
        return recomputed(block.forward, name, books) if int(name) % self.every == 0 else block.forward


@final
@dataclass(frozen=True, kw_only=True)
class Offload(Saved):
    """Send saved tensors to files or host memory after a block's forward pass, and back just before its backward pass.

    On a CPU, host memory is the memory that the run computes in: `to = "host"` only shows there that nothing changes.
    """

    leaves: ClassVar[bool] = True
    """While a step runs."""
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

    def passes(self, block: nn.Module, name: str, books: Ledger | None = None) -> Forward:
        """Once, or twice with `recompute`."""
        return recomputed(block.forward, name, books) if self.recompute else block.forward

    def arrange(self, blocks: Mapping[str, nn.Module], books: Ledger | None = None) -> Sequence[TensorCache]:
        """Wrap the blocks' forward; the cache that holds what went out."""
        books = books or Ledger()
        ahead: Ahead = "block" if self.ahead else "off"
        cache = TensorCache(self._backend(), books, least=self.least_bytes, threads=self.threads, ahead=ahead)
        for index, (name, block) in enumerate(blocks.items()):
            forward = self.passes(block, name, books)
            block.forward = sent(forward, name, cache, first=index == 0, out=index < len(blocks) - self.last)
        return [cache]

    def _backend(self) -> Disk | Host:
        if self.to == "host":
            return Host()
        folders = [Path(folder).expanduser() for folder in self.folders] or [home() / "offload"]
        return Disk(folders)


def recomputed(forward: Forward, name: str, books: Ledger | None) -> Forward:
    """The same, run again in the backward pass."""
    if books is None:
        return functools.partial(checkpoint, forward, use_reentrant=False)
    contexts = functools.partial(_contexts, name, books)
    return functools.partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)


def _contexts(name: str, books: Ledger) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What is entered around a block's first pass and around its second."""
    return nullcontext(), counted_beside(books, name)
