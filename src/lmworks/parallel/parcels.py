"""What a rank sends of a placement of states where it travels as block codes, from sizes alone.

Codes and scales are counted packet by packet: with int4 a packet of an odd number of values ends in half a byte, and a
tensor's last block has a scale of its own, however short it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from lmworks.maths.blockwise import CODES, Runs
from lmworks.parallel.layout import Layout
from lmworks.parallel.quantised import bytes_of_gather, bytes_of_sum
from lmworks.parallel.state import StatePlacement

Sizes = Sequence[int]
"""Values of tensors that lie behind each other."""


def in_parts(runs: Runs, places: int) -> list[Runs]:
    """A buffer's cut among so many places, the last ones shorter or empty."""
    length = -(-runs.values // places)
    return [runs.between(place * length, min((place + 1) * length, runs.values)) for place in range(places)]


@dataclass(frozen=True, kw_only=True)
class Parcels:
    """Bytes of one micro-batch. Of a form that is plain nothing is told."""

    layout: Layout
    state: StatePlacement

    def gathered(self, units: Sequence[Sizes]) -> float:
        """Of weights, once for each unit: the parts that a rank has of its tensors."""
        ranks, code = self.layout.size("weights"), CODES[self.state.weights_as]
        return float(sum(bytes_of_gather(ranks, code, self._runs(unit)) for unit in units))

    def copied(self, units: Sequence[Sizes]) -> float:
        """Of second copies: each rank sends as much as the longest part of what was gathered takes."""
        code, ranks = CODES[self.state.secondary_as], self.layout.size("secondary")
        cuts = [self._runs(unit).times(self.layout.size("weights")) for unit in units]
        return float(sum((ranks - 1) * max(part.nbytes(code) for part in in_parts(cut, ranks)) for cut in cuts))

    def summed(self, axis: str, rows: Sequence[Sizes]) -> dict[str, float]:
        """Of gradients, by hop of the axis; each of `rows` is the slice that a rank is left with."""
        found: dict[str, float] = defaultdict(float)
        hops = self.state.hops(axis, self.layout.size("fsdp"))
        sizes, code = [self.layout.size(hop) for hop in hops], CODES[self.state.gradients_as]
        for row in rows:
            for hop, sent in zip(hops, bytes_of_sum(sizes, code, self._runs(row)), strict=True):
                found[hop] += sent
        return dict(found)

    def _runs(self, sizes: Sizes) -> Runs:
        return Runs(lengths=tuple(size for size in sizes if size), block=self.state.block)
