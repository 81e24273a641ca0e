"""Who sees whom when the tokens of rows lie on several ranks: the places of tokens, and masks between two ranks.

    order         rank r of n holds                              work of the ranks
    zigzag        runs r and 2 n - 1 - r of 2 n                  alike
    contiguous    run r of n                                     the last has 2 n - 1 times that of the first
    striped       tokens r, r + n, r + 2 n, ...                  alike but for a diagonal

Every rank's tokens are in rising order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmworks.parallel.layout import Order


def places(order: Order, length: int, ranks: int, rank: int) -> Tensor:
    """The places, in rows of `length` tokens, of the tokens that a rank holds: int64, rising."""
    if order == "striped":
        return torch.arange(rank, length, ranks)
    if order == "contiguous":
        run = length // ranks
        return torch.arange(rank * run, (rank + 1) * run)
    run = length // (2 * ranks)
    first, second = rank * run, length - (rank + 1) * run
    return torch.cat([torch.arange(first, first + run), torch.arange(second, second + run)])


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What the queries of one rank see of the keys of one."""

    queries: slice
    """From the first query that sees any key to the last."""
    keys: slice
    """From the first key that is seen by any query to the last."""
    seen: Tensor | None
    """(B or 1, 1, queries, keys) boolean, True = seen; None where all of these see all of these."""


@dataclass(frozen=True, kw_only=True)
class Sight:
    """The places and documents of all ranks' tokens. Masks are made when they are needed: all of them together would
    be a value for each pair of a row's tokens."""

    places: tuple[Tensor, ...]
    """(T) by rank, rising, on the CPU: which parts of a mask are needed at all is worked out without asking a GPU."""
    here: tuple[Tensor, ...]
    """The same on the device."""
    window: int | None
    documents_BRT: Tensor | None
    """Ids by rank."""

    def pair(self, asking: int, asked: int) -> Pair | None:
        """The queries of rank `asking` on the keys of rank `asked`; None where none sees any, whatever documents."""
        query_T, key_T = self.places[asking], self.places[asked]
        stop_T = torch.searchsorted(key_T, query_T, right=True)
        lowest_T = query_T - (self.window if self.window is not None else query_T + 1) + 1
        start_T = torch.searchsorted(key_T, lowest_T)
        seeing = (stop_T > start_T).nonzero()[:, 0].tolist()
        if not seeing:
            return None
        queries = slice(seeing[0], seeing[-1] + 1)
        keys = slice(int(start_T[seeing].min()), int(stop_T[seeing].max()))
        everything = bool((start_T[queries] <= keys.start).all() and (stop_T[queries] >= keys.stop).all())
        mask = None if everything else self._order(self.here[asking][queries], self.here[asked][keys])
        if self.documents_BRT is not None:
            of_B1q1 = self.documents_BRT[:, None, asking, queries, None]
            same = of_B1q1 == self.documents_BRT[:, None, asked, None, keys]
            mask = same if mask is None else mask & same
        return Pair(queries=queries, keys=keys, seen=mask)

    def row(self, asking: int) -> Tensor:
        """(B or 1, 1, T, K): which keys of all ranks, behind each other, the queries of a rank see."""
        seen = self._order(self.here[asking], torch.cat(self.here))
        if self.documents_BRT is None:
            return seen
        return seen & (self.documents_BRT[:, None, asking, :, None] == self.documents_BRT.flatten(1)[:, None, None])

    def _order(self, query_q: Tensor, key_k: Tensor) -> Tensor:
        """(1, 1, q, k): keys at or before the query, within the window."""
        seen = key_k <= query_q[:, None]
        if self.window is not None:
            seen = seen & (key_k > query_q[:, None] - self.window)
        return seen[None, None]
