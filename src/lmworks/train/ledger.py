"""Bytes that wait for the backward pass, by block: each storage is counted once, however many operations saved it.

Autograd hands every tensor that it saves to a pair of hooks. What they return is a handle; autograd drops it when the
node's backward pass is over, and with the last handle of a storage its bytes leave the books.

A storage is known by a weak reference to it: while that is held, its address cannot be given to another one.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

Forward = Callable[..., Any]
"""A module's forward pass."""
REST = "rest"
"""The scope of what is saved outside of blocks: embedding, final norm, head and loss."""


def is_parameter(x: Tensor) -> bool:
    """Whether x is a weight, or a view of one: it is there anyway. FSDP's gathered weights are leaves as well."""
    base = x._base if x._is_view() else x
    return base is not None and base.is_leaf and base.requires_grad


@dataclass(kw_only=True)
class Storage:
    """One storage that handles point to."""

    weak: Any
    nbytes: int
    scope: str
    handles: int = 0
    claims: int = 0
    """Who holds it in memory; its bytes are counted while anybody does."""


class Ledger:
    """The books of one rank. Safe to call from the threads of a backward pass."""

    def __init__(self, *, on: bool = True) -> None:
        self.lock = threading.RLock()
        """Held by whoever changes them, for a moment only."""
        self._storages: dict[int, Storage] = {}
        self.live: Counter[str] = Counter()
        """Bytes now, by scope."""
        self.on = on
        """Whether `counting` counts."""
        self.total = 0
        """Bytes now."""
        self.peak = 0
        """The most bytes at one moment since `begin`."""
        self.at_peak: dict[str, int] = {}
        """Bytes by scope at that moment."""

    def begin(self) -> None:
        """A new step: the peak starts at what is live."""
        with self.lock:
            self.peak, self.at_peak = self.total, dict(self.live)

    def find(self, x: Tensor, scope: str) -> Storage:
        """The record of x's storage, with one more handle on it."""
        untyped = x.untyped_storage()
        with self.lock:
            found = self._storages.get(untyped._cdata)
            if found is None:
                weak = StorageWeakRef(untyped)  # type: ignore[no-untyped-call]
                found = Storage(weak=weak, nbytes=untyped.nbytes(), scope=scope)
                self._storages[found.weak.cdata] = found
            found.handles += 1
            return found

    def drop(self, storage: Storage) -> None:
        """One handle less."""
        with self.lock:
            storage.handles -= 1
            if not storage.handles:
                self._storages.pop(storage.weak.cdata, None)

    def count(self, storage: Storage) -> None:
        """Somebody more holds its bytes for the backward pass."""
        with self.lock:
            storage.claims += 1
            if storage.claims == 1:
                self.live[storage.scope] += storage.nbytes
                self.total += storage.nbytes
                if self.total > self.peak:
                    self.peak, self.at_peak = self.total, {name: size for name, size in self.live.items() if size}

    def uncount(self, storage: Storage) -> None:
        """Somebody less does."""
        with self.lock:
            storage.claims -= 1
            if not storage.claims:
                self.live[storage.scope] -= storage.nbytes
                self.total -= storage.nbytes

    @contextmanager
    def counting(self, scope: str = REST) -> Iterator[None]:
        """What autograd saves in here is kept as it is, and counted."""
        if not self.on:
            yield
            return
        with saved_tensors_hooks(lambda x: self.kept(x, scope), _tensor_of):
            yield

    def kept(self, x: Tensor, scope: str) -> Any:
        """A handle on x, counted where it is no weight."""
        return Kept(x, scope, None if is_parameter(x) else Lease(self, x, scope))


def counted(forward: Forward, name: str, books: Ledger | None) -> Forward:
    """The same, with what it saves in the books."""
    if books is None:
        return forward

    @functools.wraps(forward)
    def with_books(*words: Any, **named: Any) -> Any:
        with books.counting(name):
            return forward(*words, **named)

    return with_books


class Kept:
    """A handle on a tensor that stays where it is. Autograd does not look for edits behind hooks: this does."""

    __slots__ = ("_lease", "_scope", "_tensor", "_version")

    def __init__(self, x: Tensor, scope: str, lease: Lease | None) -> None:
        self._tensor, self._version = x.detach(), x._version
        self._scope, self._lease = scope, lease

    @property
    def tensor(self) -> Tensor:
        """The tensor. Raises RuntimeError when it was edited in place since it was saved."""
        if self._tensor._version != self._version:
            raise edited(self._scope)
        return self._tensor


def edited(scope: str) -> RuntimeError:
    """A saved tensor is not what it was. As plain autograd, which says less."""
    where = "outside of blocks" if scope == REST else f"in block {scope}"
    text = f"a tensor that was saved {where} for the backward pass was changed in place after it was saved"
    return RuntimeError(text)


def _tensor_of(handle: Any) -> Tensor:
    result: Tensor = handle.tensor if isinstance(handle, Kept) else handle
    return result


@contextmanager
def counted_beside(ledger: Ledger, scope: str) -> Iterator[None]:
    """Inside of other hooks: they get what is saved in here as before, and it is counted while it lives.

    `torch.utils.checkpoint` holds what it recomputes itself; this is how its bytes come into the books.
    """
    if not ledger.on:
        yield
        return
    outer: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if outer is None:
        with ledger.counting(scope):
            yield
        return
    pack, unpack = outer

    def both(x: Tensor) -> Any:
        if is_parameter(x):
            return pack(x)
        lease = Lease(ledger, x, scope)
        try:
            return _Beside(pack(x), lease)
        except Exception:
            # with the last tensor checkpoint stops the pass by an error; it holds x all the same, and x the lease
            x.untyped_storage().lease = lease  # type: ignore[attr-defined]  # storages take attributes
            raise

    def through(handle: Any) -> Tensor:
        result: Tensor = unpack(handle.inner if isinstance(handle, _Beside) else handle)
        return result

    with saved_tensors_hooks(both, through):
        yield


class Lease:
    """A counted claim on a storage by somebody else's handle."""

    __slots__ = ("_ledger", "_storage")

    def __init__(self, ledger: Ledger, x: Tensor, scope: str) -> None:
        self._ledger, self._storage = ledger, ledger.find(x, scope)
        ledger.count(self._storage)

    @property
    def alone(self) -> bool:
        """Whether nobody else has a handle on its storage."""
        return self._storage.handles == 1

    @property
    def nbytes(self) -> int:
        """Bytes of its storage."""
        return self._storage.nbytes

    def __del__(self) -> None:
        self._ledger.uncount(self._storage)
        self._ledger.drop(self._storage)


class _Beside:
    __slots__ = ("inner", "lease")

    def __init__(self, inner: Any, lease: Lease) -> None:
        self.inner, self.lease = inner, lease
