"""Context parallel: the tokens of a row divided among the ranks of cp, in one of the orders of `sight.py`.

Positions, documents and targets go with their tokens. How queries meet the keys of other ranks is `layout.context`:

    all-gather    each block gathers the keys and values of all ranks; backward, their gradients are summed and divided
    ring          keys and values go round                                  (`ring.py`)
    tokenring     queries go round, and what they found comes back          (`ring.py`)
    ulysses       all-to-all, and back: every rank attends whole rows with some of the heads (Jacobs et al. 2023)

Heads that are grouped make keys and values small, and queries large beside them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lmworks.core.errors import UsageError
from lmworks.data.load import Batch
from lmworks.model.attention import Reach, attend, reach
from lmworks.model.backbone import Backbone
from lmworks.parallel import crossing
from lmworks.parallel.pool import Pool
from lmworks.parallel.ring import ring, tokenring
from lmworks.parallel.sight import Sight, places
from lmworks.parallel.wire import Wire


@dataclass(frozen=True)
class Context:
    """The tokens of this rank. Put into a model as its `reach`."""

    wire: Wire

    def own(self, batch: Batch) -> Batch:
        """The batch's rows with this rank's tokens only."""
        index_T = self.places(batch.tokens_BT.shape[1], self.wire.place("cp")).to(batch.tokens_BT.device)
        per_token = ("tokens_BT", "targets_BT", "positions_BT", "documents_BT", "sources_BT")
        return dataclasses.replace(batch, **{name: getattr(batch, name)[:, index_T] for name in per_token})

    def places(self, length: int, rank: int) -> Tensor:
        """The places, in rows of `length` tokens, of the tokens that a rank holds."""
        return places(self.wire.layout.order, length, self.wire.size("cp"), rank)

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
        """As `model.attention.reach`, for `new` tokens of this rank; the keys are those of all ranks."""
        if cached:
            raise UsageError("a cache cannot grow while cp divides the tokens", legal="cp = 1")
        ranks, engine = self.wire.size("cp"), self.wire.layout.context
        by_rank = tuple(self.places(ranks * new, rank) for rank in range(ranks))
        whole_BK = None if documents_BK is None else self.wire.gather(documents_BK, "cp", 1)
        if engine == "ulysses":
            order_K = torch.cat(by_rank).argsort().to(device)
            documents = None if whole_BK is None else whole_BK[:, order_K]
            rows = reach(
                batch=batch,
                new=ranks * new,
                cached=0,
                window=window,
                documents_BK=documents,
                device=device,
                dtype=dtype,
            )
            return Reach(by=partial(ulysses, self.wire, order_K, rows))
        sight = Sight(
            places=by_rank,
            here=tuple(place_T.to(device) for place_T in by_rank),
            window=window,
            documents_BRT=None if whole_BK is None else whole_BK.view(batch, ranks, new),
        )
        if engine == "all-gather":
            return Reach(by=partial(_over_gathered, self.wire, sight.row(self.wire.place("cp"))))
        return Reach(by=partial(ring if engine == "ring" else tokenring, self.wire, sight))


def connect(model: Backbone, wire: Wire) -> None:
    """Let a model ask for keys, or for work, of other ranks where a layout divides them."""
    layout = wire.layout
    if layout.servers is not None and layout.size("attention") > 1:
        model.reach, model.in_turns = Pool(wire, model.config.blocks()[0]), layout.servers.ping_pong is not False
    elif layout.cp > 1:
        model.reach = Context(wire)


def _over_gathered(wire: Wire, mask: Tensor, q_BTNh: Tensor, k_BGTh: Tensor, v_BGTh: Tensor) -> Tensor:
    k_BGKh, v_BGKh = crossing.gather(torch.stack([k_BGTh, v_BGTh]), wire, "cp", 3)
    q_BNTh = q_BTNh.transpose(1, 2)
    mixed_BNTh = F.scaled_dot_product_attention(
        q_BNTh, k_BGKh, v_BGKh, attn_mask=mask, enable_gqa=q_BNTh.shape[1] != k_BGKh.shape[1]
    )
    return mixed_BNTh.transpose(1, 2)


def ulysses(wire: Wire, order_K: Tensor, whole: Reach, q_BTNh: Tensor, k_BGTh: Tensor, v_BGTh: Tensor) -> Tensor:
    """(B, T, N, h): this rank's tokens of all heads for all tokens of its heads, attention, and back.

    `order_K`: where the tokens of a row, in rising places, are among those of all ranks; `whole`: the reach of rows.
    """
    ranks, (batch, new, heads, _) = wire.size("cp"), q_BTNh.shape
    groups = k_BGTh.shape[1] // ranks
    parts = (q_BTNh, k_BGTh.transpose(1, 2), v_BGTh.transpose(1, 2))
    sent_RBTMh = torch.cat([_by_rank(x, ranks) for x in parts], 3)
    come_RBTMh = crossing.exchange(sent_RBTMh, [1] * ranks, [1] * ranks, wire, "cp")
    come_BKMh = come_RBTMh.transpose(0, 1).flatten(1, 2)[:, order_K]
    q_BKnh, k_BKgh, v_BKgh = torch.split(come_BKMh, [heads // ranks, groups, groups], 2)
    mixed_BKnh = attend(q_BKnh, k_BKgh.transpose(1, 2), v_BKgh.transpose(1, 2), whole)
    home_BRTnh = mixed_BKnh[:, order_K.argsort()].unflatten(1, (ranks, new))  # type: ignore[no-untyped-call]  # torch's
    home_RBTnh = crossing.exchange(home_BRTnh.transpose(0, 1), [1] * ranks, [1] * ranks, wire, "cp")
    return home_RBTnh.permute(1, 2, 0, 3, 4).reshape(batch, new, heads, -1)


def _by_rank(x_BTNh: Tensor, ranks: int) -> Tensor:
    """(R, B, T, N / R, h): the heads of each rank."""
    parted: Tensor = x_BTNh.unflatten(2, (ranks, -1))  # type: ignore[no-untyped-call]  # torch's
    return parted.movedim(2, 0)
