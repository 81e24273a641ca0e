"""Several ranks on this machine, for a rehearsal or a test: gloo processes with one thread each, no port, no launcher.

The processes are forked from a server that has imported torch already, so a gang starts in a fraction of a second.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lmworks.core.errors import LmworksError
from lmworks.parallel.world import TIMEOUT


class RankFailed(LmworksError):
    """A rank of a gang ended with an error: the first one to do so."""


def run(work: Callable[..., Any], world: int, *args: Any, minutes: float = 10.0) -> list[Any]:
    """What `work(rank, *args)` gives on each of `world` connected ranks, in their order.

    `work` is a function of a module; its arguments and results are plain values and NumPy arrays, not tensors. Raises
    RankFailed with the error of the rank that failed first; the others are ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lmworks.parallel.apply", work.__module__])
    ends: dict[Connection, int] = {}
    processes = []
    with tempfile.TemporaryDirectory(prefix="lmworks-gang-") as folder:
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            ends[ours] = rank
            process = context.Process(
                target=_rank, args=(work, rank, world, str(Path(folder) / "store"), theirs, args), daemon=True
            )
            process.start()
            processes.append(process)
            theirs.close()
        try:
            return _collect(ends, world, until=time.monotonic() + 60 * minutes)
        finally:
            for process in processes:
                process.join(timeout=2)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(ends: dict[Connection, int], world: int, *, until: float) -> list[Any]:
    """The ranks' results as they come; the first error ends it."""
    found: dict[int, Any] = {}
    while len(found) < world:
        ready = wait(list(ends), timeout=max(0.0, until - time.monotonic()))
        if not ready:
            late = sorted(set(range(world)) - set(found))
            raise RankFailed(f"ranks {late} have not answered in time")
        failures: list[tuple[float, int, str]] = []
        for end in ready:
            assert isinstance(end, Connection)
            rank = ends.pop(end)
            try:
                when, error, result = end.recv()
            except EOFError:
                when, error, result = time.time(), "the process ended without a word (killed?)", None
            if error is not None:
                failures.append((when, rank, error))
            found[rank] = result
        if failures:
            _, rank, error = min(failures)
            raise RankFailed(f"rank {rank} of {world} failed:\n{error}")
    return [found[rank] for rank in range(world)]


def _rank(work: Callable[..., Any], rank: int, world: int, store: str, answer: Connection, args: Any) -> None:
    """One rank: connect, work, answer (when, error, result)."""
    gc.freeze()  # what was imported before the fork is never garbage; to walk it takes 0.15 s each time
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world),  # type: ignore[attr-defined]  # torch does not list it
            rank=rank,
            world_size=world,
            timeout=TIMEOUT,
        )
        result = work(rank, *args)
    except BaseException:  # noqa: BLE001  (told to the parent)
        answer.send((time.time(), traceback.format_exc(), None))
        return
    answer.send((time.time(), None, result))
    dist.destroy_process_group()
