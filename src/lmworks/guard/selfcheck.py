"""The self-check of a node: cheap things first, each held against what healthy nodes of the same run find.

What a node finds by itself: the rate at which its memory is copied, the rate and the bytes of its own network, the rate
at which it writes where the run lives, and that a product comes out the same twice. Where nobody knows what went wrong,
its ranks are tried together as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from lmworks.core.seeds import seed_for

MEMORY_BYTES = 64 << 20
WIRE_BYTES = 16 << 20
DISK_BYTES = 4 << 20
REPEATS = 3
SHARE = 0.3
"""A node is bad when it has less than this share of what its peers have in the median: far outside of noise."""
TOGETHER_SECONDS = 90.0
"""In which the ranks of a node must have found together."""
RATES = {"memory": "memory bandwidth", "loopback": "its own network", "together": "its ranks' exchanges"}
"""What is held against peers; the disk is one that all share."""


def here(folder: Path) -> dict[str, Any]:
    """What this node finds: bytes per second by name, and `failed`, a sentence, where something does not work."""
    found: dict[str, Any] = {"failed": None, "host": platform.node()}
    checks: tuple[tuple[str, Callable[[], float]], ...] = (
        ("memory", memory),
        ("arithmetic", arithmetic),
        ("loopback", loopback),
        ("disk", lambda: disk(folder)),
    )
    for name, check in checks:
        try:
            found[name] = check()
        except (OSError, ValueError, MemoryError) as error:
            return found | {"failed": f"{name}: {error}"}
    return found


class Together:
    """The ranks of this node together, in processes of their own, while the agent goes on reporting."""

    def __init__(self, ranks: int) -> None:
        words = [sys.executable, "-m", "lmworks.parallel.together", str(ranks)]
        pipe = subprocess.PIPE  # a few lines, which fit into it
        self._process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )
        self._until = time.monotonic() + TOGETHER_SECONDS

    def answer(self) -> dict[str, Any] | None:
        """What it adds to the node's findings; None while it runs."""
        if self._process.poll() is None and time.monotonic() < self._until:
            return None
        late = self._process.poll() is None
        said = self.close().strip().splitlines()
        answers = [line for line in said if line.startswith("{")]  # a library may have more to say
        if late or self._process.returncode != 0 or not answers:
            why = f"no answer in {TOGETHER_SECONDS:.0f} s" if late else " ".join(said[-1:])
            return {"failed": f"its ranks together: {why}"}
        return {"together": float(json.loads(answers[0])["bytes_per_second"])}

    def close(self) -> str:
        """End it, with its ranks; what it said."""
        if self._process.poll() is None:
            self._process.kill()
        said: str = self._process.communicate()[0]
        return said


def memory() -> float:
    """Bytes copied per second, the best of a few."""
    source = np.ones(MEMORY_BYTES // 8)
    target = np.zeros_like(source)
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - start)
    if not bool((target == 1.0).all()):
        raise ValueError("a copy differs from what was copied")
    return MEMORY_BYTES / min(seconds)


def arithmetic() -> float:
    """Products per second of small matrices. Raises ValueError when the same product gives other bits."""
    drawn = np.random.default_rng(seed_for(0, "self-check"))
    a, b = (drawn.standard_normal((256, 256)) for _ in range(2))
    first, start = a @ b, time.perf_counter()
    for _ in range(REPEATS):
        if not bool((a @ b == first).all()):
            raise ValueError("the same product gives other bits")
    return REPEATS / (time.perf_counter() - start)


def loopback() -> float:
    """Bytes per second through this machine's own network. Raises ValueError when other bytes arrive."""
    data = bytes(range(256)) * (WIRE_BYTES // 256)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10.0)
        thread = threading.Thread(target=_send, args=(server.getsockname(), data), daemon=True)
        start = time.perf_counter()
        thread.start()
        connection, _ = server.accept()
        connection.settimeout(10.0)
        digest, count = hashlib.sha256(), 0
        with connection:
            while block := connection.recv(1 << 20):
                digest.update(block)
                count += len(block)
        seconds = time.perf_counter() - start
        thread.join()
    if count != len(data) or digest.digest() != hashlib.sha256(data).digest():
        raise ValueError(f"{count} of {len(data)} bytes arrived, or others than were sent")
    return WIRE_BYTES / seconds


def _send(to: tuple[str, int], data: bytes) -> None:
    with socket.create_connection(to, timeout=10.0) as out:
        out.sendall(data)


def disk(folder: Path) -> float:
    """Bytes written and synced per second where the run lives. Raises OSError as the system does."""
    path = folder / f".self-check-{os.getpid()}"
    start = time.perf_counter()
    try:
        with path.open("wb") as file:
            file.write(bytes(DISK_BYTES))
            file.flush()
            os.fsync(file.fileno())
        return DISK_BYTES / (time.perf_counter() - start)
    finally:
        path.unlink(missing_ok=True)


def judge(found: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Which nodes are bad, and why: those where something does not work, and those far below their peers' median.

    Nodes of one host are no peers: they share what is measured.
    """
    bad = {name: str(checks["failed"]) for name, checks in found.items() if checks["failed"] is not None}
    for rate, words in RATES.items():
        for name, checks in found.items():
            peers = [other[rate] for other in found.values() if other["host"] != checks["host"] and rate in other]
            if name in bad or rate not in checks or not peers:
                continue
            if checks[rate] < SHARE * median(peers):
                text = f"{checks[rate] / 1e9:.2f} GB/s, its peers {median(peers) / 1e9:.2f}"
                bad[name] = f"{words}: {text}"
    return bad
