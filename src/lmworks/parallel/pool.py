"""The ranks that hold tokens of the same blocks, as one pool that shares its attention.

For each micro-batch, or each half of one, all ranks hear which documents the others hold, and each makes the same plan
from it. The plan serves all blocks, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from lmworks.core.errors import LmworksError, UsageError
from lmworks.model.attention import Reach
from lmworks.model.sizes import BlockSizes
from lmworks.parallel.balance import balance
from lmworks.parallel.dispatch import AXIS, begin
from lmworks.parallel.routes import pieces, routes
from lmworks.parallel.sight import places
from lmworks.parallel.tasks import Piece, Plan, Sizes
from lmworks.parallel.wire import Wire

Planner = Callable[[Sequence[Piece], int, Sizes], Plan]
"""(pieces, ranks, bytes of a token) -> who computes what; the same on every rank."""


@dataclass(frozen=True)
class Pool:
    """The tokens of all these ranks. Put into a model as its `reach`."""

    wire: Wire
    block: BlockSizes
    """Whose heads say what a token weighs."""
    planner: Planner | None = None
    """Left out: `balance`, by the layout's settings."""
    remarks: list[str] = field(default_factory=list)
    """Why the first plan that is not as it was asked for is not: one sentence, once a run."""

    def __call__(
        self,
        *,
        batch: int,
        new: int,
        cached: int,
        window: int | None,
        documents_BK: Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Reach:
        """As `model.attention.reach`, for `new` tokens of this rank. All ranks of the pool have as many rows."""
        if cached or window is not None:
            what = "a cache cannot grow" if cached else "a window cannot be served"
            raise UsageError(f"{what} while ranks share their attention", legal="layout.servers left out")
        servers = self.wire.layout.servers
        assert servers is not None, "the layout has them"
        plan = self.plan(self._documents(batch, new, documents_BK, device), dtype)
        self._agreed(plan, device)
        if plan.reason is not None and not self.remarks:
            self.remarks.append(f"layout.servers: {plan.reason}; of later plans nothing is said")
        return Reach(apart=partial(begin, self.wire, routes(plan, self.wire.place(AXIS), device), servers.keep))

    def plan(self, documents_RBT: Tensor, dtype: torch.dtype) -> Plan:
        """Who computes what, by the document of each token of each rank."""
        layout, ranks = self.wire.layout, documents_RBT.shape[0]
        servers, cp, length = layout.servers, layout.cp, layout.cp * documents_RBT.shape[2]
        assert servers is not None, "the layout has them"
        stand = [places(layout.order, length, cp, rank) if cp > 1 else torch.arange(length) for rank in range(cp)]
        held = pieces(documents_RBT.cpu().numpy(), [place_T.numpy() for place_T in stand])
        heads, groups = self.block.n_heads // layout.tp, self.block.n_kv_heads // layout.tp
        sizes = Sizes.of(heads, groups, self.block.head_dim, dtype.itemsize)
        if self.planner is not None:
            return self.planner(held, ranks, sizes)
        return balance(
            held,
            ranks,
            sizes=sizes,
            tolerance=servers.tolerance,
            tile=servers.tile,
            buffer_bytes=servers.buffer_bytes,
        )

    def _documents(self, batch: int, new: int, documents_BT: Tensor | None, device: torch.device) -> Tensor:
        """(R, B, T): the document of each token of each rank; one for each row where nothing was said."""
        ranks = self.wire.size(AXIS)
        if documents_BT is None:
            return torch.zeros(ranks, batch, new, dtype=torch.int64, device=device)
        return self.wire.gather(documents_BT.to(torch.int64), AXIS, 0).view(ranks, batch, new)

    def _agreed(self, plan: Plan, device: torch.device) -> None:
        """Ranks with other plans would wait for each other, or add up what does not belong together."""
        own = torch.tensor([int(plan.digest[:15], 16)], device=device)
        if len(set(self.wire.gather(own, AXIS, 0).tolist())) > 1:
            raise LmworksError(
                "ranks made different plans of the same documents",
                where="layout.servers",
                next_step="start all ranks from the same version of lmworks, on the same layout",
            )
