"""The ranks of one machine together: do sums over all of them come out right, and how fast?

    python -m lmworks.parallel.together RANKS

starts so many ranks here, over NCCL where each has a GPU and gloo elsewhere, and prints bytes per second as JSON.
Exits with 1, and says why, when a sum is wrong or does not come within half a minute.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch

from lmworks.core.errors import LmworksError
from lmworks.parallel import failure, world
from lmworks.parallel.launch import Launch, launch
from lmworks.parallel.layout import Layout

PATIENCE = timedelta(seconds=30)
NUMBERS = 1 << 20
"""Of float32 in each sum."""
REPEATS = 3


def rank() -> float:
    """This rank's part: bytes per second that each rank sends. Raises LmworksError for a sum that is wrong."""
    place = world.seat()
    each = torch.cuda.is_available() and torch.cuda.device_count() >= place.local_world
    device = world.device_of("cuda" if each else "cpu", place)
    with world.connected(place, device, patience=PATIENCE):
        wire = world.wire(Layout(dp_shard=place.world), place)
        seconds = []
        for turn in range(REPEATS + 1):
            start = time.perf_counter()
            x = torch.full((NUMBERS,), float(place.rank + 1 + turn), device=device)
            found = wire.sum(x, "world")
            wanted = sum(range(1 + turn, place.world + 1 + turn))
            if not bool((found == wanted).all()):
                raise LmworksError(f"rank {place.rank}: a sum over {place.world} ranks is wrong", where=str(device))
            seconds.append(time.perf_counter() - start)
        return 2 * (place.world - 1) / place.world * 4 * NUMBERS / min(seconds[1:])


def main(words: list[str]) -> int:
    """Start the ranks, or be one of them."""
    if words:
        with tempfile.TemporaryDirectory(prefix="lmworks-together-") as logs:
            command = [sys.executable, "-m", "lmworks.parallel.together"]
            try:
                launch(lambda _: command, Launch(ranks=int(words[0]), logs=Path(logs)), lambda text: None)
            except LmworksError as error:
                sys.stderr.write(f"{error}\n")
                return 1
        return 0
    try:
        rate = rank()
    except Exception as error:
        failure.write(error)
        raise
    if world.seat().first:
        sys.stdout.write(json.dumps({"bytes_per_second": rate}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
