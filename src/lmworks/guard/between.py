"""The second level of a self-check: what goes between nodes, over plain connections, a few partners for each node.

While nodes check themselves each holds a door open: who comes sends bytes and gets back their hash. Node i goes to
nodes i + 1, i + 2, i + 4, ... of those that are left, so that in each turn every node sends to one and hears one, and
a thousand nodes have ten partners each.
"""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from statistics import median

from lmworks.guard.selfcheck import SHARE

BYTES = 8 << 20
TIMEOUT = 10.0
"""Seconds after which a connection counts as dead."""
HEAD = 8
"""Bytes of the length that comes before the bytes."""


class Door:
    """Answers whoever comes with the hash of what it sends, while it is open."""

    def __init__(self, host: str) -> None:
        self._server = socket.create_server((host, 0))
        self._thread = threading.Thread(target=self._answer, name="door", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Which the system chose."""
        return int(self._server.getsockname()[1])

    def close(self) -> None:
        """Nobody comes in any more."""
        with suppress(OSError):  # macOS: it is not connected
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join()

    def _answer(self) -> None:
        while True:
            try:
                guest, _ = self._server.accept()
            except OSError:
                return  # closed
            threading.Thread(target=_serve, args=(guest,), daemon=True).start()


def _serve(guest: socket.socket) -> None:
    guest.settimeout(TIMEOUT)
    try:
        with guest:
            left = min(int.from_bytes(_received(guest, HEAD), "big"), BYTES)
            digest = hashlib.sha256()
            while left > 0:
                block = guest.recv(min(left, 1 << 20))
                if not block:
                    return
                digest.update(block)
                left -= len(block)
            guest.sendall(digest.digest())
    except OSError:
        return  # who came has gone, and tells it


def _received(guest: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (block := guest.recv(size - len(data))):
        data += block
    return data


def measure(address: tuple[str, int]) -> float:
    """Bytes per second to a node's door and back. Raises OSError when nothing, or something else, comes through."""
    data = bytes(range(256)) * (BYTES // 256)
    start = time.perf_counter()
    with socket.create_connection(address, timeout=TIMEOUT) as out:
        out.sendall(len(data).to_bytes(HEAD, "big") + data)
        answer = _received(out, hashlib.sha256().digest_size)
    if answer != hashlib.sha256(data).digest():
        raise OSError("other bytes arrived than were sent")
    return len(data) / (time.perf_counter() - start)


def partners(nodes: Sequence[str], name: str) -> list[str]:
    """To whom a node goes, in order."""
    place, count, step, found = nodes.index(name), len(nodes), 1, list[str]()
    while step < count:
        found.append(nodes[(place + step) % count])
        step *= 2
    return found


def links(doors: Mapping[str, tuple[str, int]], nodes: Sequence[str], name: str) -> dict[str, float]:
    """What this node finds of its ways to its partners: bytes per second, 0 for a dead one."""
    found = {}
    for peer in partners(nodes, name):
        try:
            found[peer] = measure(doors[peer])
        except (OSError, KeyError):
            found[peer] = 0.0
    return found


def judge(found: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """Which nodes are bad: those most of whose links are dead or far below the median of all, the worst first.

    A bad link is the fault of one end, so the links of a node that is bad say nothing about its partners.
    """
    left = {(name, peer): rate for name, rates in found.items() for peer, rate in rates.items()}
    alive = [rate for rate in left.values() if rate > 0]
    least = SHARE * median(alive) if alive else 1.0
    bad: dict[str, str] = {}
    while True:
        worst, share = "", 0.5
        for name in found:
            own = [rate < least for pair, rate in left.items() if name in pair]
            if name not in bad and own and sum(own) / len(own) > share:
                worst, share = name, sum(own) / len(own)
        if not worst:
            return bad
        rates = [rate for pair, rate in left.items() if worst in pair]
        dead, slow = sum(rate == 0 for rate in rates), sum(0 < rate < least for rate in rates)
        bad[worst] = f"network: of {len(rates)} links {dead} are dead, and {slow} slow"
        left = {pair: rate for pair, rate in left.items() if worst not in pair}
