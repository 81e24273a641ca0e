"""Saved tensors that leave memory after their forward pass and come back just before their backward pass.

    pack      a tensor is handed over; a thread writes its storage out; only a weak reference stays
    unpack    its storage is read back, unless it still lives: then that is taken, and a write that has not begun is
              called off
    prefetch  the first unpack of a block asks for the whole block before it, in the order of the forward pass
    release   autograd drops the handle; with the last one the slot is free again

A storage goes out once, however many operations saved it; views are rebuilt from their shape, stride and offset. If a
store cannot be written, its tensor stays in memory, with one warning. An edit in place after the save is an error.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lmworks.train.ledger import Ledger, Storage, is_parameter


class Backend(Protocol):
    """Where bytes go. Called from threads."""

    def store(self, values: Tensor) -> Any:
        """Write a flat uint8 tensor out; returns its slot. Raises OSError when it cannot."""
        ...

    def load(self, slot: Any, out: Tensor) -> None:
        """Read a slot into a flat uint8 tensor."""
        ...

    def free(self, slot: Any) -> None:
        """The slot may be used again."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


@dataclass(kw_only=True)
class Facts:
    """What one step moved."""

    stored: int = 0
    loaded: int = 0
    forwarded: int = 0
    """Bytes that were taken from memory because their write was not over."""
    misses: int = 0
    """Storages that the backward pass had to wait for, unasked before."""
    kept: int = 0
    """Bytes that could not be written, and stayed."""
    seconds_storing: float = 0.0
    seconds_loading: float = 0.0


@dataclass(kw_only=True, eq=False)
class Parcel:
    """One storage on its way out or back. `lock` guards everything below it."""

    storage: Storage
    scope: str
    version: int
    lock: threading.RLock = field(default_factory=threading.RLock)
    here: Any = None
    """The storage, where it is in memory: to be written, forwarded, or read back."""
    slot: Any = None
    going: Future[None] | None = None
    coming: Future[None] | None = None
    failure: BaseException | None = None
    dead: bool = False


class TensorCache:
    """The tensor cache of one model on one rank."""

    def __init__(self, backend: Backend, ledger: Ledger, *, least: int, threads: int, ahead: bool) -> None:
        self.backend, self.ledger, self.least, self.ahead = backend, ledger, least, ahead
        self.facts = Facts()
        self._threads = threads
        self._pools: tuple[ThreadPoolExecutor, ThreadPoolExecutor] | None = None
        self._parcels: dict[int, Parcel] = {}
        self._order: list[Scope] = []
        self._warned = False
        self._lock = threading.RLock()

    # --- forward ------------------------------------------------------------------------------------------------------

    @contextmanager
    def block(self, name: str) -> Iterator[None]:
        """The forward pass of a block of which saved tensors go out."""
        scope = Scope(name, self._order[-1] if self._order else None)
        self._order.append(scope)
        with saved_tensors_hooks(lambda x: self._pack(x, scope), _unpack):
            yield

    def begin(self) -> None:
        """A new forward pass: its blocks have none before them."""
        self._order = []

    def told(self) -> Facts:
        """What was moved since this was last asked."""
        with self._lock:
            found, self.facts = self.facts, Facts()
        return found

    def _pack(self, x: Tensor, scope: Scope) -> Any:
        if is_parameter(x):
            return x.detach()
        if x.untyped_storage().nbytes() < self.least or x.device.type == "meta":
            return self.ledger.kept(x, scope.name)
        return Handle(self, x, scope)

    def parcel(self, x: Tensor, scope: Scope) -> Parcel:
        """The parcel of x's storage: a new one is sent off."""
        storage = self.ledger.find(x, scope.name)
        with self._lock:
            found = self._parcels.get(id(storage))
            if found is None:
                found = Parcel(storage=storage, scope=scope.name, version=x._version, here=x.untyped_storage())
                self._parcels[id(storage)] = found
                scope.parcels.append(found)
                self.ledger.count(storage)
                ready = _marked(x.device)
                found.going = self._pool(0).submit(self._store, found, x.detach(), ready)
        return found

    def _pool(self, which: int) -> ThreadPoolExecutor:
        if self._pools is None:
            stores = ThreadPoolExecutor(self._threads, thread_name_prefix="offload-store")
            self._pools = stores, ThreadPoolExecutor(self._threads, thread_name_prefix="offload-load")
        return self._pools[which]

    def _store(self, parcel: Parcel, alias: Tensor, ready: Any) -> None:
        """On a thread of the store's pool."""
        with parcel.lock:
            if parcel.dead or parcel.here is None:
                return
            values = _bytes(parcel.here, alias.device)
        began = time.perf_counter()
        try:
            slot = self.backend.store(_at_hand(values, ready))
        except OSError as error:
            self._stays(parcel, error)
            return
        with parcel.lock:
            if alias._version != parcel.version:
                parcel.failure = _edited(parcel)
            if parcel.dead:
                self.backend.free(slot)  # type: ignore[unreachable]  # another thread says so
                return
            parcel.slot = slot
            if parcel.coming is None:  # nobody has asked for it meanwhile
                parcel.here = None
                self.ledger.uncount(parcel.storage)
        with self._lock:
            self.facts.stored += parcel.storage.nbytes
            self.facts.seconds_storing += time.perf_counter() - began

    def _stays(self, parcel: Parcel, error: OSError) -> None:
        with self._lock:
            self.facts.kept += parcel.storage.nbytes
            if not self._warned:
                self._warned = True
                text = f"{parcel.storage.nbytes} bytes of block {parcel.scope} cannot be written: they stay in memory"
                warnings.warn(f"{text} ({error})", stacklevel=2)

    # --- backward -----------------------------------------------------------------------------------------------------

    def take(self, parcel: Parcel, scope: Scope, device: torch.device) -> Any:
        """The storage of a parcel, in memory. Asks for the block before it."""
        self._ask(scope.before, device)
        with parcel.lock:
            if parcel.failure is not None:
                raise parcel.failure
            if parcel.here is not None and parcel.coming is None:
                self._forward(parcel)
                return parcel.here
            if parcel.coming is None:
                self.facts.misses += 1
                parcel.coming = self._pool(1).submit(self._load, parcel, _room(parcel, device))
            coming = parcel.coming
        coming.result()
        return parcel.here

    def _forward(self, parcel: Parcel) -> None:
        """The write is not over, or could not be made: what is in memory is taken, and stays there."""
        done: Future[None] = Future()
        done.set_result(None)
        parcel.coming = done
        if parcel.going is not None and parcel.going.cancel():
            parcel.going = None
        self.facts.forwarded += parcel.storage.nbytes

    def _ask(self, scope: Scope | None, device: torch.device) -> None:
        if not self.ahead or scope is None or scope.asked:
            return
        scope.asked = True
        for parcel in reversed(scope.parcels):
            with parcel.lock:
                if parcel.here is None and parcel.coming is None and not parcel.dead:
                    parcel.coming = self._pool(1).submit(self._load, parcel, _room(parcel, device))

    def _load(self, parcel: Parcel, values: Tensor) -> None:
        """On a thread of the load's pool."""
        began = time.perf_counter()
        with parcel.lock:
            if parcel.dead:
                return
            slot = parcel.slot
        self.backend.load(slot, values)
        with parcel.lock:
            if parcel.dead:
                return  # type: ignore[unreachable]  # another thread says so
            parcel.here = values.untyped_storage()
            self.ledger.count(parcel.storage)
        with self._lock:
            self.facts.loaded += parcel.storage.nbytes
            self.facts.seconds_loading += time.perf_counter() - began

    def release(self, parcel: Parcel) -> None:
        """One handle less; with the last one, slot and memory are free."""
        with self._lock:
            if not self.ledger.drop(parcel.storage):
                return
            self._parcels.pop(id(parcel.storage), None)
        with parcel.lock:
            parcel.dead, parcel.here = True, None
            if parcel.going is not None:
                parcel.going.cancel()
            if parcel.slot is not None:
                self.backend.free(parcel.slot)
                parcel.slot = None

    @property
    def live(self) -> int:
        """Parcels that somebody may still ask for."""
        return len(self._parcels)

    def close(self) -> None:
        """End the threads and give the backend's room back."""
        if self._pools is not None:
            for pool in self._pools:
                pool.shutdown(wait=True, cancel_futures=True)
            self._pools = None
        self.backend.close()


class Scope:
    """One forward pass of one block."""

    def __init__(self, name: str, before: Scope | None) -> None:
        self.name, self.before = name, before
        self.parcels: list[Parcel] = []
        self.asked = False


class Handle:
    """What autograd holds in the place of a tensor."""

    __slots__ = ("_cache", "_counter", "_device", "_dtype", "_parcel", "_scope", "_shape", "_version")

    def __init__(self, cache: TensorCache, x: Tensor, scope: Scope) -> None:
        self._cache, self._scope = cache, scope
        self._shape = x.shape, x.stride(), x.storage_offset()
        self._dtype, self._device, self._version = x.dtype, x.device, x._version
        self._counter = x.detach()
        self._counter.data = torch.empty(0, dtype=x.dtype, device=x.device)  # keeps the count of edits, not the values
        self._parcel = cache.parcel(x, scope)

    def tensor(self) -> Tensor:
        """The tensor again, as it was."""
        if self._counter._version != self._version:
            raise _edited(self._parcel)
        storage = self._cache.take(self._parcel, self._scope, self._device)
        return torch.empty(0, dtype=self._dtype, device=self._device).set_(storage, self._shape[2], *self._shape[:2])

    def __del__(self) -> None:
        if hasattr(self, "_parcel"):
            self._cache.release(self._parcel)


def _unpack(handle: Any) -> Tensor:
    if isinstance(handle, Handle):
        return handle.tensor()
    result: Tensor = getattr(handle, "tensor", handle)
    return result


def _edited(parcel: Parcel) -> RuntimeError:
    return RuntimeError(
        f"a tensor that block {parcel.scope} saved for its backward pass was changed in place after it was saved"
    )


def _bytes(storage: Any, device: torch.device) -> Tensor:
    """A storage as a flat uint8 tensor, without a copy."""
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _room(parcel: Parcel, device: torch.device) -> Tensor:
    """Memory for a storage that comes back, made by the thread that computes: C libraries give each thread its own."""
    return torch.empty(parcel.storage.nbytes, dtype=torch.uint8, device=device)


def _marked(device: torch.device) -> Any:
    """The point in the stream's work at which a tensor is complete; None on a CPU."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def _at_hand(values: Tensor, ready: Any) -> Tensor:
    """The values in host memory, once they are complete."""
    if ready is None:
        return values
    ready.synchronize()
    return values.cpu()
