"""Documents laid on ranks in every way that a plan must stand, for tests."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import strategies as st

from lmworks.parallel.tasks import Piece


def laid(lengths: list[int], ranks: list[int]) -> tuple[Piece, ...]:
    """Whole documents, document i on rank ranks[i]."""
    filled: dict[int, int] = {}
    pieces = []
    for document, (length, rank) in enumerate(zip(lengths, ranks, strict=True)):
        pieces.append(Piece(document, 0, length, rank, filled.get(rank, 0)))
        filled[rank] = filled.get(rank, 0) + length
    return tuple(pieces)


@st.composite
def layings(draw: st.DrawFn, longest: int = 60, most_ranks: int = 5) -> tuple[tuple[Piece, ...], int]:
    """Documents cut into runs, each on any rank: as plain rows, as every order of cp, and worse. With the ranks."""
    ranks = draw(st.integers(1, most_ranks))
    filled = [0] * ranks
    pieces = []
    for document in range(draw(st.integers(1, 8))):
        length = draw(st.integers(1, longest))
        cuts = draw(st.sets(st.integers(1, length), max_size=4)) if draw(st.booleans()) else set()
        edges = sorted({0, *cuts, length})
        for start, stop in pairwise(edges):
            rank = draw(st.integers(0, ranks - 1))
            pieces.append(Piece(document, start, stop, rank, filled[rank]))
            filled[rank] += stop - start
    return tuple(pieces), ranks
