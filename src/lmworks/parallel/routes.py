"""Which rows of queries and keys go where, by a plan of attention (`tasks.py`): index lists of one rank.

A rank is an owner of tokens and a server of tasks. Rows of one kind, queries or keys with their values, travel so:

    owner     rows [those for server 0, those for server 1, ...]
    server    what came [from owner 0, from owner 1, ...], and from there into the order in which it computes

and what is found goes back the other way. The server's queries lie in the order of its tasks; its keys, one document
behind the other, each from the first key to the last that a task of it needs, once however many tasks read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmworks.maths.causal import Run
from lmworks.parallel.tasks import Move, Piece, Plan

Ids = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Lot:
    """Rows of one kind of one rank."""

    rows: Tensor
    """Places, among the rank's tokens, of what it sends: by server, in the server's order."""
    sent: tuple[int, ...]
    """Rows to each server, this rank too."""
    came: tuple[int, ...]
    """Rows from each owner, this rank too."""
    order: Tensor
    """Of each row in the order of computing: its place in what came."""
    home: Tensor
    """Of each row in what came: its place in the order of computing."""


@dataclass(frozen=True, kw_only=True)
class Routes:
    """What one rank sends, gets and computes in a micro-batch; the same for all blocks, forward and backward."""

    tokens: int
    """That this rank holds."""
    queries: Lot
    keys: Lot
    runs: tuple[Run, ...]
    """Its tasks."""


def routes(plan: Plan, here: int, device: torch.device) -> Routes:
    """Those of the rank at a place of the pool."""
    bases: dict[int, int] = {}
    at = 0
    for (server, document), last in plan.last_keys.items():
        if server == here:
            bases[document] = at
            at += last
    runs, query = [], 0
    for task in plan.tasks:
        if task.server == here:
            runs.append(Run(query, bases[task.document], task.stop - task.start, task.stop))
            query += task.stop - task.start
    return Routes(
        tokens=sum(piece.stop - piece.start for piece in plan.pieces if piece.rank == here),
        queries=_lot(plan.query_moves, here, plan.ranks, device),
        keys=_lot(plan.key_moves, here, plan.ranks, device),
        runs=tuple(runs),
    )


def _lot(moves: Sequence[Move], here: int, ranks: int, device: torch.device) -> Lot:
    """`moves` by server, in the order in which each computes; stable sorting keeps it among those of one owner."""
    mine = [move for move in moves if move.source == here]  # by server already
    own = [move for move in moves if move.server == here]
    by_owner = _joined([np.full(move.stop - move.start, move.source) for move in own])
    home = np.argsort(by_owner, kind="stable")
    rows = _joined([np.arange(move.offset, move.offset + move.stop - move.start) for move in mine])
    return Lot(
        rows=torch.from_numpy(rows).to(device),
        sent=_counts(((move.server, move) for move in mine), ranks),
        came=_counts(((move.source, move) for move in own), ranks),
        order=torch.from_numpy(np.argsort(home, kind="stable")).to(device),
        home=torch.from_numpy(home).to(device),
    )


def _counts(moves: Any, ranks: int) -> tuple[int, ...]:
    found = [0] * ranks
    for place, move in moves:
        found[place] += move.stop - move.start
    return tuple(found)


def _joined(parts: list[NDArray[Any]]) -> Ids:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)


def pieces(documents_RBT: Ids, places: Sequence[Ids]) -> list[Piece]:
    """The pieces of packed rows that ranks of cp share.

    `documents_RBT`: the document of each token, by rank of the pool, row of the rank and token. `places`: where the
    tokens of each rank of cp stand in their rows; ranks of the pool that share rows follow each other. Tokens of one
    row with one id are one document, in the order of the row, also where others stand between them.
    """
    ranks, rows, length = documents_RBT.shape
    order = np.concatenate(places)
    found: list[Piece] = []
    document = 0
    for first in range(0, ranks, len(places)):
        shared = documents_RBT[first : first + len(places)]
        for row in range(rows):
            ids = np.empty(len(order), dtype=np.int64)
            ids[order] = shared[:, row].reshape(-1)
            numbers, within = _numbered(ids)
            for i, place in enumerate(places):
                own = (numbers[place] + document, within[place])
                found += [
                    Piece(number, start, stop, first + i, row * length + at) for number, start, stop, at in _runs(*own)
                ]
            document += int(numbers.max(initial=-1)) + 1
    return found


def _numbered(ids_K: Ids) -> tuple[Ids, Ids]:
    """Of each token: its document, counted from 0, and its place in the document."""
    _, number = np.unique(ids_K, return_inverse=True)
    order = np.argsort(number, kind="stable")
    starts = np.searchsorted(number[order], np.arange(number.max(initial=-1) + 1))
    within = np.empty_like(ids_K)
    within[order] = np.arange(len(ids_K)) - starts[number[order]]
    return number, within


def _runs(document_T: Ids, within_T: Ids) -> list[tuple[int, int, int, int]]:
    """(document, first token, one past the last, where it begins) of each run of tokens that follow each other."""
    breaks = (np.diff(document_T) != 0) | (np.diff(within_T) != 1)
    starts = np.concatenate([[0], np.flatnonzero(breaks) + 1]) if len(document_T) else np.zeros(0, dtype=np.int64)
    stops = np.append(starts[1:], len(document_T))
    return [
        (int(document_T[start]), int(within_T[start]), int(within_T[start]) + int(stop - start), int(start))
        for start, stop in zip(starts, stops, strict=True)
    ]
