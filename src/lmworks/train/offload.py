"""Saved tensors that leave memory after their forward pass and come back just before their backward pass.

    pack      a tensor is handed over; a thread writes its storage out, and drops it
    unpack    its storage is read back, unless it is still here: then that is taken, and a write that has not begun is
              called off
    prefetch  the first unpack of a piece (a block, or a part of one) asks for it and for the piece before it
    release   autograd drops the handle; with the last one the slot is free again

A storage goes out once, however many operations saved it; views are rebuilt from their shape, stride and offset. What
cannot be written, or would wait too long for its turn, stays in memory, with one warning. An edit in place after the
save is an error.

All books are kept under one lock, the ledger's: a handle may die at any moment, also while its thread holds a lock.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lmworks.core.errors import LmworksError
from lmworks.core.spans import Clock
from lmworks.parallel.clock import clock_of
from lmworks.parallel.schedule import Action, Kind
from lmworks.train.handles import Handle, Stays, counter, unpack
from lmworks.train.lanes import moment, on
from lmworks.train.ledger import Ledger, edited, is_parameter
from lmworks.train.moved import Backend, Busy, Facts, Parcel, Pass, Piece, Visit

Ahead = Literal["off", "block", "chunk"]
"""What is asked for before it is needed: nothing, the block before, or the few storages before."""
CHUNK = 4
"""Storages of a chunk."""
MOST_WAITING = 4 << 30
"""Bytes that may wait for their write at one time."""


class TensorCache:
    """The tensor cache of the blocks of one model, or of one stage, on one rank.

    `steer` is told what a step moved, before anybody else is, and may add notes.
    """

    def __init__(
        self,
        backend: Backend,
        ledger: Ledger,
        *,
        least: int,
        threads: int,
        ahead: Ahead,
        most_waiting: int = MOST_WAITING,
        steer: Callable[[Facts], None] | None = None,
    ) -> None:
        self.backend, self.ledger, self.least, self.ahead = backend, ledger, least, ahead
        self.most_waiting = most_waiting
        self.facts = Facts()
        self.depth = 1
        """Pieces that are asked for ahead of the one that the backward pass comes to."""
        self.waiting = 0
        """Bytes whose write is not over."""
        self._steer = steer
        self._threads = threads
        self._pools: tuple[ThreadPoolExecutor, ThreadPoolExecutor] | None = None
        self._parcels: dict[int, Parcel] = {}
        self._pass = Pass()
        self._passes: dict[int, Pass] = {}
        self._coming: tuple[int, bool] | None = None
        self._clock: Clock | None = None
        self._storing, self._loading = Busy(), Busy()
        self._began = time.perf_counter()
        self._warned: set[str] = set()
        self._lock = ledger.lock

    # --- what comes next ----------------------------------------------------------------------------------------------

    def expect(self, micro_batch: int, *, turns: bool) -> None:
        """The next forward pass is of this micro-batch; `turns`: its own backward pass follows at once.

        Where nobody says so, every forward pass turns.
        """
        self._coming = micro_batch, turns

    def fetch(self, micro_batch: int) -> None:
        """The backward pass of this micro-batch comes next: its last piece is asked for now."""
        found = self._passes.get(micro_batch)
        if found is not None:
            self._ask(found.tail)

    @property
    def turns(self) -> bool:
        """Whether the forward pass that is at work is followed by its own backward pass."""
        return self._pass.turns

    # --- forward ------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A new forward pass: its blocks have none before them."""
        micro_batch, turns = self._coming or (None, True)
        self._coming, self._pass = None, Pass(turns=turns)
        if micro_batch is not None:
            self._passes[micro_batch] = self._pass
        self.facts.passes.append(self._pass)

    @contextmanager
    def block(self, name: str, *, out: bool = True) -> Iterator[None]:
        """The forward pass of a block; `out`: its saved tensors go out, else they stay and are counted."""
        visit = Visit(name, out=out)
        visit.begun = self._now()
        self._pass.begin_piece()
        with saved_tensors_hooks(lambda x: self._pack(x, visit), unpack):
            yield
        visit.ended = self._now()
        self._pass.visits.append(visit)

    def told(self) -> Facts:
        """What was moved since this was last asked."""
        with self._lock:
            found, self.facts = self.facts, Facts()
        now = time.perf_counter()
        found.seconds, self._began = now - self._began, now
        found.seconds_storing, found.seconds_loading = self._storing.taken(), self._loading.taken()
        found.clock = self._clock
        if self._steer is not None:
            self._steer(found)
        return found

    def _now(self) -> Any:
        """A moment, once it is known what is computed on."""
        return None if self._clock is None else self._clock.mark()

    def _pack(self, x: Tensor, visit: Visit) -> Any:
        if is_parameter(x):
            return x.detach()
        if self._clock is None and x.device.type != "meta":
            self._clock = clock_of(x.device)
        if x.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise LmworksError(
                "a CUDA graph cannot hold tensors that leave memory: threads copy them, and a graph knows no threads",
                next_step="capture no graph of the blocks, or set saved.use = 'keep'",
            )
        small = x.untyped_storage().nbytes() < self.least or x.device.type == "meta"
        parcel = None if small or not visit.out else self._parcel(x, visit)
        if parcel is not None:
            return Handle(self, x, parcel, self._pass.piece)
        stays = Stays(self, x, visit.name, self._pass.piece)
        if not small and stays.lease.alone:
            visit.nbytes += stays.lease.nbytes
        return stays

    def _parcel(self, x: Tensor, visit: Visit) -> Parcel | None:
        """The parcel of x's storage, with one more handle: a new one is sent off. None where too much waits already."""
        most = CHUNK if self.ahead == "chunk" else None
        with self._lock:
            storage = self.ledger.find(x, visit.name)
            found = self._parcels.get(id(storage))
            if found is not None:
                found.handles += 1
                self._pass.add(found, most=most)
                return found
            if self.waiting + storage.nbytes > self.most_waiting:
                self.ledger.drop(storage)
                self._stays(storage.nbytes, visit.name, f"{self.waiting} bytes wait for their write already")
                return None
            found = Parcel(storage=storage, scope=visit.name, device=x.device, here=x.untyped_storage())
            found.counter, found.version = counter(x), x._version
            self._parcels[id(storage)] = found
            visit.nbytes += storage.nbytes
            self.waiting += storage.nbytes
            self.ledger.count(storage)
            self._pass.add(found, most=most)
            found.going = self._pool(0).submit(self._store, found, moment(x.device))
        return found

    def _pool(self, which: int) -> ThreadPoolExecutor:
        """Threads that write (0) or read (1), started when first needed: a process that is forked before has none."""
        with self._lock:
            if self._pools is None:
                stores = ThreadPoolExecutor(self._threads, thread_name_prefix="offload-store")
                self._pools = stores, ThreadPoolExecutor(self._threads, thread_name_prefix="offload-load")
        return self._pools[which]

    def _store(self, parcel: Parcel, ready: Any) -> None:
        """On a thread of the store's pool. Its failure is told here, since nobody asks the future for it."""
        here = parcel.here
        slot, failure = None, None
        if here is not None:
            try:
                with self._storing, on(parcel.device):
                    slot = self.backend.store(_bytes(here, parcel.device), ready)
            except (OSError, RuntimeError, MemoryError) as error:  # torch's own errors are RuntimeErrors
                failure = error
        with self._lock:
            self.waiting -= parcel.storage.nbytes
            if failure is not None and not parcel.dead:
                self._stays(parcel.storage.nbytes, parcel.scope, str(failure))
            if slot is not None:
                self._is_out(parcel, slot)

    def _is_out(self, parcel: Parcel, slot: Any) -> None:
        """A write is over: its storage leaves memory, unless somebody has asked for it meanwhile."""
        self.facts.stored += parcel.storage.nbytes
        if parcel.edited:
            parcel.failure = edited(parcel.scope)
        if parcel.dead:
            self.backend.free(slot)
            return
        parcel.slot = slot
        if parcel.coming is None:
            parcel.here = None
            self.ledger.uncount(parcel.storage)

    def _stays(self, nbytes: int, scope: str, why: str) -> None:
        """Something could not go out. Each kind of reason is told once."""
        self.facts.kept += nbytes
        kind = why.lstrip("0123456789 ")
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"{nbytes} bytes of block {scope} stay in memory: {why}", stacklevel=2)

    # --- backward -----------------------------------------------------------------------------------------------------

    def enter(self, piece: Piece) -> None:
        """The backward pass has come to a piece: it and the one before it are asked for."""
        if piece.entered:
            return
        piece.entered = True
        if piece.of.turned is None:
            piece.of.turned = self._now()
        if self.ahead != "off":
            wanted: Piece | None = piece
            for _ in range(1 + self.depth):
                if wanted is not None:
                    self._ask(wanted)
                    wanted = wanted.before

    def take(self, parcel: Parcel, piece: Piece) -> Any:
        """The storage of a parcel, in memory."""
        with self._lock:
            missed = parcel.here is None and parcel.coming is None
        self.enter(piece)
        with self._lock:
            if parcel.failure is not None:
                raise parcel.failure
            self.facts.misses += missed
            if parcel.here is not None and parcel.coming is None:
                self._forward(parcel)
            coming = parcel.coming or self._fetch(parcel)
        if not coming.done():
            began = time.perf_counter()
            coming.result()
            with self._lock:
                self.facts.stalled += time.perf_counter() - began
        if parcel.failure is not None:
            raise parcel.failure
        return parcel.here

    def _forward(self, parcel: Parcel) -> None:
        """The write is not over, or could not be made: what is in memory is taken, and stays there."""
        parcel.coming = Future()
        parcel.coming.set_result(None)
        self._call_off(parcel)
        self.facts.forwarded += parcel.storage.nbytes

    def _call_off(self, parcel: Parcel) -> None:
        """A write that has not begun is not made."""
        if parcel.going is not None and parcel.going.cancel():
            self.waiting -= parcel.storage.nbytes
            parcel.going = None

    def _ask(self, piece: Piece) -> None:
        """Read a piece back, last storage first."""
        with self._lock:
            for parcel in reversed(piece.parcels):
                if parcel.here is None and parcel.coming is None and not parcel.dead:
                    self._fetch(parcel)

    def _fetch(self, parcel: Parcel) -> Future[None]:
        """Memory for a storage that comes back is made by the thread that computes: C libraries give each its own."""
        room = torch.empty(parcel.storage.nbytes, dtype=torch.uint8, device=parcel.device)
        parcel.coming = self._pool(1).submit(self._load, parcel, room, moment(parcel.device))
        return parcel.coming

    def _load(self, parcel: Parcel, room: Tensor, ready: Any) -> None:
        """On a thread of the load's pool."""
        slot, failure = parcel.slot, None
        if slot is None:  # it is dead
            return
        try:
            with self._loading, on(parcel.device):
                self.backend.load(slot, room, ready)
        except OSError as error:
            text = f"saved tensors of block {parcel.scope} cannot be read back: {error}"
            failure = LmworksError(text, next_step="the run goes on from its last checkpoint: the same command again")
        with self._lock:
            if parcel.dead:
                return
            parcel.failure = parcel.failure or failure
            parcel.here = room.untyped_storage()
            self.ledger.count(parcel.storage)
            self.facts.loaded += parcel.storage.nbytes

    def release(self, parcel: Parcel) -> None:
        """One handle less; with the last one, slot and memory are free."""
        with self._lock:
            self.ledger.drop(parcel.storage)
            parcel.handles -= 1
            if parcel.handles:
                return
            del self._parcels[id(parcel.storage)]
            if parcel.here is not None:
                self.ledger.uncount(parcel.storage)
            parcel.dead, parcel.here = True, None
            self._call_off(parcel)
            if parcel.slot is not None:
                self.backend.free(parcel.slot)
                parcel.slot = None

    # --- the end ------------------------------------------------------------------------------------------------------

    @property
    def live(self) -> int:
        """Parcels that somebody may still ask for."""
        return len(self._parcels)

    def settle(self) -> None:
        """Wait until nothing is being written."""
        for parcel in list(self._parcels.values()):
            if parcel.going is not None:
                parcel.going.result()

    def close(self) -> None:
        """End the threads and give the backend's room back."""
        if self._pools is not None:
            for pool in self._pools:
                pool.shutdown(wait=True, cancel_futures=True)
            self._pools = None
        self.backend.close()


def sent(
    forward: Callable[..., Any], name: str, cache: TensorCache, *, first: bool, out: bool | Callable[[], bool]
) -> Callable[..., Any]:
    """A block's forward with what it saves in the cache. `first`: it begins a pass; `out` may be asked for each."""

    @functools.wraps(forward)
    def with_cache(*words: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*words, **named)
        if first:
            cache.begin()
        with cache.block(name, out=out if isinstance(out, bool) else out()):
            return forward(*words, **named)

    return with_cache


def hints(caches: Mapping[int, Sequence[TensorCache]]) -> Callable[[Action, Action | None], None]:
    """What a pipeline tells of its stages, for the caches of each: see `expect` and `fetch`."""

    def on_stage(now: Action, then: Action | None) -> None:
        backward = then is not None and then.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT)
        turns = now.kind is Kind.FORWARD and backward and then is not None and then[1:] == now[1:]
        if now.kind is Kind.FORWARD:
            for cache in caches[now.stage]:
                cache.expect(now.micro_batch, turns=turns)
        if then is not None and backward and not turns:
            for cache in caches[then.stage]:
                cache.fetch(then.micro_batch)

    return on_stage


def _bytes(storage: Any, device: torch.device) -> Tensor:
    """A storage as a flat uint8 tensor, without a copy."""
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
