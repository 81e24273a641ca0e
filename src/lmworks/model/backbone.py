"""The loop over blocks: what the families have in common."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lmworks.core.errors import UsageError
from lmworks.model import ops
from lmworks.model.attention import Frame, reach
from lmworks.model.cache import BlockCache, KVCache, room_for
from lmworks.model.head import Vocabulary
from lmworks.model.layers import Embedding, LayerNorm, Linear, RMSNorm
from lmworks.model.rotary import Rotary
from lmworks.model.sizes import Shape


@dataclass(frozen=True, kw_only=True)
class Midway:
    """A forward pass that has stopped in front of a block. `Backbone.rest` goes on with it, as often as one likes."""

    x_BTD: Tensor
    """The residual stream, in the compute precision."""
    frame: Frame
    block: int
    """The next block to run; n_layers: only the final norm is left."""

    def to(self, dtype: torch.dtype) -> Midway:
        """The same place in another precision: the blocks that follow compute in it."""
        return replace(self, x_BTD=self.x_BTD.to(dtype))


class Backbone(nn.Module):
    """Token ids to hidden states. A pipeline stage is the same class with parts taken away by `keep_stage`.

    The residual stream is in the compute precision (`dtype`), bfloat16 included, as in the field's own training runs:
    it halves the traffic of every block, norms and softmax still work in float32, and a block's output is a product
    that was rounded to bfloat16 anyway.
    """

    def __init__(
        self,
        config: Shape,
        *,
        embed: Embedding,
        blocks: list[nn.Module],
        norm: RMSNorm | LayerNorm,
        dtype: torch.dtype,
        positions: Embedding | None = None,
        rotary: Rotary | None = None,
    ) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise UsageError("the model's vocab_size is not known yet", next_step="call with_vocab, or give vocab_size")
        self.config = config
        self.dtype = dtype
        self.rotary = rotary
        self.takes_tokens = True
        self.compiled_blocks = False
        """Set by `compile_blocks`: reaches are then those of the plain forms, which compiled blocks run."""
        self.vocabulary = Vocabulary()
        """What is done with the head's matrix; a layout may replace it."""
        self.reach = reach
        """Who attends to whom; a layout that divides the tokens of a row replaces it."""
        self.in_turns = False
        """Whether blocks take the two halves of the rows in turns; for a layout whose attention is waited for."""
        self.embed: Embedding | None = embed
        self.positions: Embedding | None = positions
        self.blocks = nn.ModuleDict({str(index): block for index, block in enumerate(blocks)})
        self.norm: RMSNorm | LayerNorm | None = norm
        self.head: Linear | None = None if config.tied else Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T) token ids -> (B, T, D) hidden states after the final norm, in the compute precision.

        A stage without an embedding takes the (B, T, D) states of the stage before; one without a norm gives its states
        as they are. `positions_BT` default to 0..T-1 behind the cache. Tokens attend to tokens of the same id in
        `documents_BT` only; None = one document per row. `cache` grows by T tokens.
        """
        x_BTD, frame = self._enter(tokens_BT, positions_BT, documents_BT, cache)
        for name, block in self.blocks.items():
            x_BTD = block(x_BTD, frame, cache.blocks[name] if cache is not None else None)
        if cache is not None:
            cache.length += tokens_BT.shape[1]
        return x_BTD if self.norm is None else self.norm(x_BTD)

    def until(
        self,
        block: int,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
    ) -> Midway:
        """The forward pass up to the input of `block` (0 .. n_layers). `rest` of it is what `forward` gives."""
        if not 0 <= block <= self.config.n_layers:
            raise ValueError(f"block is one of 0 .. {self.config.n_layers}, got {block}")
        x_BTD, frame = self._enter(tokens_BT, positions_BT, documents_BT, None)
        for name, module in self.blocks.items():
            if int(name) < block:
                x_BTD = module(x_BTD, frame, None)
        return Midway(x_BTD=x_BTD, frame=frame, block=block)

    def rest(self, midway: Midway) -> Tensor:
        """The blocks from `midway.block` on and the final norm: (B, T, D) hidden states, in the precision of midway."""
        x_BTD = midway.x_BTD
        for name, module in self.blocks.items():
            if int(name) >= midway.block:
                x_BTD = module(x_BTD, midway.frame, None)
        return x_BTD if self.norm is None else self.norm(x_BTD)

    def _enter(
        self, tokens_BT: Tensor, positions_BT: Tensor | None, documents_BT: Tensor | None, cache: KVCache | None
    ) -> tuple[Tensor, Frame]:
        """The input of the first block, and what all blocks share."""
        batch, new = tokens_BT.shape[:2]
        cached = cache.length if cache is not None else 0
        if positions_BT is None:
            self._check_length(cached + new)
            positions_BT = torch.arange(cached, cached + new, device=tokens_BT.device)[None]
        new = positions_BT.shape[1]  # hidden states of an earlier stage may hold a part of the tokens only
        x_BTD = self.embed(tokens_BT) if self.embed is not None and self.takes_tokens else tokens_BT
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(positions_BT)
        with ops.plain_forms() if self.compiled_blocks else nullcontext():
            return x_BTD, self._frame(batch, new, positions_BT, documents_BT, cache)

    def _check_length(self, tokens: int) -> None:
        """A learned position table ends somewhere; rotary positions do not."""
        if self.positions is not None and tokens > self.positions.weight.shape[0]:
            raise UsageError(
                f"{tokens} tokens are longer than the model's position table",
                legal=f"at most {self.positions.weight.shape[0]} tokens (max_position)",
                next_step="shorten the text, or train a model with a larger max_position",
            )

    def _frame(
        self, batch: int, new: int, positions_BT: Tensor, documents_BT: Tensor | None, cache: KVCache | None
    ) -> Frame:
        """Tables and reaches, worked out once and shared by the blocks."""
        if self.in_turns and batch > 1 and cache is None:
            first = (batch + 1) // 2  # as torch's chunk
            parts = [None, None] if documents_BT is None else [documents_BT[:first], documents_BT[first:]]
            places = [positions_BT] * 2 if len(positions_BT) == 1 else [positions_BT[:first], positions_BT[first:]]
            rows = (first, batch - first)
            one, other = (self._whole(n, new, p, d, cache) for n, p, d in zip(rows, places, parts, strict=True))
            return Frame(rope=None, reaches={}, halves=(one, other))
        return self._whole(batch, new, positions_BT, documents_BT, cache)

    def _whole(
        self, batch: int, new: int, positions_BT: Tensor, documents_BT: Tensor | None, cache: KVCache | None
    ) -> Frame:
        """The frame of rows that go through a block together."""
        cached = cache.length if cache is not None else 0
        if cache is not None:
            documents_BT = cache.note_documents(documents_BT, batch, new)
        reaches = {
            window: self.reach(
                batch=batch,
                new=new,
                cached=cached,
                window=window,
                documents_BK=documents_BT,
                device=positions_BT.device,
                dtype=self.dtype,
            )
            for window in sorted({b.window for b in self.config.blocks()}, key=lambda window: window or 0)
        }
        rope = self.rotary.tables(positions_BT) if self.rotary is not None else None
        return Frame(rope=rope, reaches=reaches)

    def compile_blocks(self) -> None:
        """Compile each block on its own, when it first runs. Names of parameters stay as they are."""
        self.compiled_blocks = True
        for block in self.blocks.values():
            block.compile()

    def head_weight(self) -> Tensor:
        """(V, D): the matrix that turns hidden states into logits, the token table itself when tied."""
        table = self.embed if self.config.tied else self.head
        if table is None:
            raise UsageError(
                "this pipeline stage holds no head",
                legal="the stage that keeps the head, and the token table where it is tied",
            )
        return table.weight

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """(..., D) -> (..., V) float32 logits; the product runs in the precision of `hidden_BTD`."""
        return self.vocabulary.logits(hidden_BTD, self.head_weight())

    def cross_entropy_sum(self, hidden_BTD: Tensor, targets_BT: Tensor, weights_B: Tensor | None = None) -> Tensor:
        """Sum of -log p(target) over the targets that are not IGNORE, each times its row's weight; a scalar in nats."""
        shares_N = None if weights_B is None else weights_B[:, None].expand_as(targets_BT).flatten()
        return self.vocabulary.cross_entropy_sum(
            hidden_BTD.flatten(0, 1), self.head_weight(), targets_BT.flatten(), shares_N=shares_N
        )

    def cross_entropy_each(self, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """-log p(target) of each token (B, T), no gradient; 0 where the target is IGNORE."""
        losses_N = self.vocabulary.cross_entropy_each(
            hidden_BTD.flatten(0, 1), self.head_weight(), targets_BT.flatten()
        )
        return losses_N.view_as(targets_BT)

    def sampled_targets(self, hidden_BTD: Tensor, generator: torch.Generator) -> Tensor:
        """One token drawn from each softmax(logits): (B, T) int64, no gradient."""
        drawn_N = self.vocabulary.sampled_targets(hidden_BTD.flatten(0, 1), self.head_weight(), generator)
        return drawn_N.view(hidden_BTD.shape[:2])

    def new_cache(self, batch: int, length: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for `batch` rows of up to `length` tokens; `dtype` defaults to the compute precision.

        A block with a window gets room for little more than the window, however long the text.
        """
        device = next(self.parameters()).device
        blocks = {}
        for name, sizes in ((name, self.config.blocks()[int(name)]) for name in self.blocks):
            shape = (batch, sizes.n_kv_heads, room_for(length, sizes.window), sizes.head_dim)
            keys, values = (torch.zeros(shape, dtype=dtype or self.dtype, device=device) for _ in range(2))
            blocks[name] = BlockCache(keys, values, sizes.window)
        return KVCache(blocks, length)

    def keep_stage(self, blocks: range, *, first: bool, last: bool) -> None:
        """Take away what a pipeline stage does not hold. Names stay as they are.

        `first` keeps the token and position tables, `last` the norm and the head (and a tied token table).
        """
        for name in [name for name in self.blocks if int(name) not in blocks]:
            del self.blocks[name]
        self.takes_tokens = first
        if not first:
            self.positions = None
            self.embed = self.embed if last and self.config.tied else None
        if not last:
            self.norm = None
            self.head = None
