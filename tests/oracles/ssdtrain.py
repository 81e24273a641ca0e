"""SSDTrain's rules by definition: the paper's inequality scope by scope, and a step tick by tick."""

from __future__ import annotations

from collections.abc import Sequence


def paper(seconds: Sequence[float], nbytes: Sequence[float], rate: float, rest: float, backward: float) -> int:
    """The first block whose need is above the rate, every sum taken anew."""
    whole = (1 + backward) * sum(seconds) + rest
    for n in range(len(seconds)):
        need = (sum(nbytes[:n]) + 2 * nbytes[n]) / (whole - backward * sum(seconds[:n]))
        if need > rate:
            return n
    return len(seconds)


def strict(
    seconds: Sequence[int], writes: Sequence[int], reads: Sequence[int], rest: int, backward: int, *, most: int
) -> int:
    """The most blocks that can go out with no tick waited, by trying all numbers."""
    calm = [out for out in range(most + 1) if ticked(seconds, writes, reads, out, rest, backward)[1] == 0]
    return max(calm)


def ticked(
    seconds: Sequence[int],
    writes: Sequence[int],
    reads: Sequence[int],
    out: int,
    rest: int,
    backward: int,
    ahead: int | None = None,
    duplex: bool = False,
) -> tuple[int, int]:
    """(ticks of a step, ticks that the backward pass waited). All durations are whole ticks; `rest` may be 0."""
    disk = _Disk(writes, reads, duplex)
    program = [("forward", i, t) for i, t in enumerate(seconds)] + [("rest", 0, rest)]
    program += [("backward", j, backward * seconds[j]) for j in reversed(range(len(seconds)))]
    now = stalled = 0
    for kind, i, length in program:
        if kind == "backward":
            for j in reversed(range(out)):
                if ahead is None or j >= i - ahead:
                    disk.ask("read", j)
            while i < out and ("read", i) not in disk.done:
                now, stalled = disk.tick(now), stalled + 1
        for _ in range(length):
            now = disk.tick(now)
        if kind == "forward" and i < out:
            disk.ask("write", i)
    return now, stalled


class _Disk:
    """Serves one job after the other, a tick at a time; with `duplex` reads have a line of their own."""

    def __init__(self, writes: Sequence[int], reads: Sequence[int], duplex: bool) -> None:
        self.lengths = {"write": writes, "read": reads}
        self.lines: dict[str, list[tuple[str, int]]] = {"write": []}
        self.lines["read"] = [] if duplex else self.lines["write"]
        self.left: dict[tuple[str, int], int] = {}
        self.done: set[tuple[str, int]] = set()

    def ask(self, kind: str, i: int) -> None:
        if (kind, i) not in self.left:
            self.left[kind, i] = self.lengths[kind][i]
            self.lines[kind].append((kind, i))

    def tick(self, now: int) -> int:
        """From `now` to the next moment: the head of each line gets one tick, if it can begin."""
        heads = {line[0] for line in self.lines.values() if line}
        for kind, i in [head for head in heads if head[0] == "write" or ("write", head[1]) in self.done]:
            self.left[kind, i] -= 1
            if not self.left[kind, i]:
                self.lines[kind].pop(0)
                self.done.add((kind, i))
        return now + 1
