"""Who reads the rows: of the ranks of a machine that need the same, one, and the others copy from its memory.

Ranks of tp, cp and pp train on the same rows. All ranks go through the same steps here, so that nobody waits for a rank
that has no part in it:

    1  the first of those on a machine that need the same rows makes a board (`data.sharing`)
    2  the others find it, by a name that all ranks were told
    3  its name is deleted; it is used where all have found it, and else each of them reads for itself
"""

from __future__ import annotations

import os
import uuid
from contextlib import suppress

import torch

from lmworks.data import sharing
from lmworks.data.sharing import ENDED, SHARED, TENSORS, Board, Reading, Sharing, Taking
from lmworks.parallel.wire import Wire

PREFIX = "lmworks-rows"
"""How files in memory are called, with the process, the run and the rank behind it."""


def appoint(wire: Wire, device: torch.device, *, rows: int, length: int) -> tuple[Sharing | None, tuple[str, ...]]:
    """How this rank comes by its rows, None where it reads by itself; and what people should know. All ranks call it.

    `rows` of `length` tokens are the most that one rank needs for a step.
    """
    if wire.size("batch") == wire.layout.ranks:
        return None, ()
    run = wire.told(uuid.uuid4().hex)
    alike = [rank for rank in wire.here if wire.layout.place(rank, "batch") == wire.place("batch")]
    first, place = alike[0], alike.index(wire.rank)
    board: Board | None = None
    path = sharing.MEMORY / f"{PREFIX}-{os.getpid()}-{run}-{first}"
    if place == 0 and len(alike) > 1:
        sharing.clear_away(sharing.MEMORY, PREFIX)
        with suppress(OSError):
            board = Board.make(path, readers=len(alike) - 1, room=len(TENSORS) * rows * length)
    wire.wait()
    for found in sharing.MEMORY.glob(f"{PREFIX}-*-{run}-{first}") if place > 0 else ():
        with suppress(OSError):
            board = Board.find(found, place - 1)
    wire.wait()
    if board is not None and place == 0:
        path.unlink()
        board.state = SHARED if board.here.all() else ENDED
    wire.wait()
    shared = board is not None and board.state == SHARED
    (alone,) = wire.anywhere([len(alike) > 1 and not shared], device)
    notes = (_remark(rows, length),) if alone else ()
    if board is None or not shared:
        return None, notes
    return (Reading(board) if place == 0 else Taking(board, place - 1)), notes


def _remark(rows: int, length: int) -> str:
    size = sharing.SLOTS * len(TENSORS) * 8 * rows * length / 2**20
    return (
        f"ranks of one machine that need the same rows each read them: there is no shared memory of {size:.1f} MiB in "
        f"{sharing.MEMORY} on some machine (containers: --shm-size)"
    )
