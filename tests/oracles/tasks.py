"""Plans of attention, token by token: slow and obvious."""

from __future__ import annotations

from collections import Counter

from lmworks.parallel.tasks import Piece, Plan, Sizes


def home(pieces: tuple[Piece, ...]) -> dict[tuple[int, int], tuple[int, int]]:
    """(rank, place on the rank) of every token (document, place in the document)."""
    return {
        (piece.document, token): (piece.rank, piece.offset + token - piece.start)
        for piece in pieces
        for token in range(piece.start, piece.stop)
    }


def work(plan: Plan) -> list[int]:
    """Pairs that each rank computes, one at a time."""
    found = [0] * plan.ranks
    for task in plan.tasks:
        for query in range(task.start, task.stop):
            found[task.server] += sum(1 for key in range(task.stop) if key <= query)
    return found


def sent(plan: Plan) -> tuple[Counter[tuple[int, int]], Counter[tuple[int, int]]]:
    """Queries, and tokens whose keys are sent, from rank to rank: sets of what every server needs and has not."""
    at = home(plan.pieces)
    queries, keys = set(), set()
    for task in plan.tasks:
        queries |= {(task.document, i, task.server) for i in range(task.start, task.stop)}
        keys |= {(task.document, i, task.server) for i in range(task.stop)}
    counts = []
    for needed in (queries, keys):
        lines = ((at[document, token][0], server) for document, token, server in needed)
        counts.append(Counter((source, server) for source, server in lines if source != server))
    return counts[0], counts[1]


def largest_buffer(plan: Plan, sizes: Sizes) -> int:
    """The most bytes in or out of a rank in one exchange."""
    queries, keys = sent(plan)
    totals: Counter[tuple[str, int]] = Counter()
    for (source, server), number in queries.items():
        totals["out", source] += number * sizes.query
        totals["in", server] += number * sizes.query
        totals["home out", server] += number * sizes.found
        totals["home in", source] += number * sizes.found
    for (source, server), number in keys.items():
        totals["out", source] += number * sizes.keys
        totals["in", server] += number * sizes.keys
    return max(totals.values(), default=0)
