"""Context parallel: the tokens of a row divided among the ranks of cp, keys and values gathered.

A row of T tokens is cut into 2 n runs for n ranks, and rank r holds runs r and 2 n - 1 - r: one that sees little and
one that sees much, so that all ranks have the same work. Positions, documents and targets go with their tokens. Each
block gathers the keys and values of all ranks (grouped heads, so there are few of them), and attends with its own
queries; backward, the gradients of keys and values are summed and divided again.
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
from lmworks.model.attention import Reach
from lmworks.parallel import crossing
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
        run = length // (2 * self.wire.size("cp"))
        first, second = rank * run, length - (rank + 1) * run
        return torch.cat([torch.arange(first, first + run), torch.arange(second, second + run)])

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
        ranks = self.wire.size("cp")
        keys_K = torch.cat([self.places(ranks * new, rank) for rank in range(ranks)]).to(device)
        own_T = self.places(ranks * new, self.wire.place("cp")).to(device)
        seen_TK = keys_K[None] <= own_T[:, None]
        if window is not None:
            seen_TK = seen_TK & (keys_K[None] > own_T[:, None] - window)
        mask = seen_TK[None, None]
        if documents_BK is not None:
            whole_BK = self.wire.gather(documents_BK, "cp", 1)
            mask = (seen_TK & (documents_BK[:, :, None] == whole_BK[:, None]))[:, None]
        return Reach(by=partial(self._attend, mask))

    def _attend(self, mask: Tensor, q_BTNh: Tensor, k_BGTh: Tensor, v_BGTh: Tensor) -> Tensor:
        k_BGKh, v_BGKh = crossing.gather(torch.stack([k_BGTh, v_BGTh]), self.wire, "cp", 3)
        q_BNTh = q_BTNh.transpose(1, 2)
        mixed_BNTh = F.scaled_dot_product_attention(
            q_BNTh, k_BGKh, v_BGKh, attn_mask=mask, enable_gqa=q_BNTh.shape[1] != k_BGKh.shape[1]
        )
        return mixed_BNTh.transpose(1, 2)
