"""GPT-2: learned positions, LayerNorm, biases everywhere, GELU in its tanh form.

    x = embed[tokens] + positions[places]
    for each block:  x = x + attn(attn_norm(x));  x = x + ffn(ffn_norm(x))
    hidden = norm(x)

Shapes as in `decoder.py`. q, k and v are stored apart, each (N h, D).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from lmworks.core.cost import Cost
from lmworks.core.errors import Problem
from lmworks.model import sizes as shape
from lmworks.model import turns
from lmworks.model.attention import Attention, Frame
from lmworks.model.backbone import Backbone
from lmworks.model.cache import BlockCache
from lmworks.model.layers import Embedding, LayerNorm, PlainFFN
from lmworks.model.sizes import BlockSizes

Positive = Annotated[int, Ge(1)]
Sizes = Positive | tuple[Positive, ...]


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """A GPT-2-shaped decoder."""

    vocab_size: Positive | None = None
    """V: rows of the token table. Left out = the tokenizer's."""
    n_layers: Positive
    """L: number of blocks."""
    hidden_size: Positive
    """D: width of the residual stream."""
    n_heads: Sizes
    """N: attention heads, one number or one per block."""
    n_kv_heads: Sizes | None = None
    """G: key/value heads; left out = as many as query heads, as in every published GPT-2."""
    head_dim: Positive | None = None
    """h: values per head; left out = hidden_size / n_heads."""
    ffn_size: Sizes
    """F: width of the feed-forward layer, one number or one per block."""
    norm_eps: Annotated[float, Gt(0)] = 1e-5
    """Added to the variance in LayerNorm."""
    tied: bool = True
    """The head is the token table."""
    max_position: Positive = 1024
    """Rows of the position table: the longest context."""

    def blocks(self) -> tuple[BlockSizes, ...]:
        """The sizes of every block. Raises RecipeError with everything that is wrong with them."""
        blocks, problems = self._sizes()
        shape.refuse(problems)
        return blocks

    def _sizes(self) -> tuple[tuple[BlockSizes, ...], list[Problem]]:
        return shape.block_sizes(
            n_layers=self.n_layers,
            hidden_size=self.hidden_size,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            head_dim=self.head_dim,
            ffn_size=self.ffn_size,
        )

    def check(self, recipe: object) -> Iterator[Problem]:
        """What is wrong with the settings as a whole, and rows of the recipe's data that have no position."""
        yield from self._sizes()[1]
        yield from rows_too_long(recipe, self.max_position, path="max_position")

    def with_vocab(self, vocab_size: int) -> GPT2Config:
        """The same shape for another vocabulary."""
        return replace(self, vocab_size=vocab_size)

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every parameter."""
        yield "embed.weight", (self.vocab_size or 0, self.hidden_size)
        yield "positions.weight", (self.max_position, self.hidden_size)
        for index, sizes in enumerate(self.blocks()):
            yield from shape.biased_block_shapes(f"blocks.{index}", self.hidden_size, sizes)
        yield from (("norm.weight", (self.hidden_size,)), ("norm.bias", (self.hidden_size,)))
        if not self.tied:
            yield "head.weight", (self.vocab_size or 0, self.hidden_size)

    def saved_values_per_token(self, block: BlockSizes) -> int:
        """Values one block keeps per token, attention's scores apart."""
        return shape.biased_saved_values(self.hidden_size, block, norm_inputs=2)

    def cost(self, *, sequence: int, bytes_per_value: int = 4) -> Cost:
        """Parameters, FLOPs and bytes of this shape at `sequence` tokens, without building it."""
        return shape.cost(self, sequence=sequence, bytes_per_value=bytes_per_value)

    def build(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        param_dtype: torch.dtype = torch.float32,
    ) -> GPT2:
        """The network without values (NaN): computes in `dtype`, keeps parameters in `param_dtype`."""
        with torch.device(device):
            return GPT2(self, dtype=dtype).to(param_dtype)


def rows_too_long(recipe: object, rows: int, *, path: str) -> Iterator[Problem]:
    """A problem when the recipe trains on rows that are longer than a position table of `rows`."""
    length = getattr(getattr(recipe, "data", None), "sequence_length", None)
    if isinstance(length, int) and length > rows:
        text = f"the position table has {rows} rows, data.sequence_length is {length}; use {rows} or less there"
        yield Problem(path=path, text=text)


class Block(nn.Module):
    """Attention and feed-forward, each behind its LayerNorm, each added to the residual stream."""

    def __init__(self, config: GPT2Config, sizes: BlockSizes) -> None:
        super().__init__()
        self.attn_norm = LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = Attention(config.hidden_size, sizes, qkv_bias=True, out_bias=True)
        self.ffn_norm = LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.ffn = PlainFFN(config.hidden_size, sizes.ffn_size, approximate="tanh")

    def forward(self, x_BTD: Tensor, frame: Frame, cache: BlockCache | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        if frame.halves is not None:
            return turns.forward(self, x_BTD, frame.halves)
        normed_BTD: Tensor = self.attn_norm(x_BTD)
        return self.behind(x_BTD, normed_BTD, self.attn(normed_BTD, frame, cache))

    def behind(self, x_BTD: Tensor, normed_BTD: Tensor, mixed_BTD: Tensor) -> Tensor:
        """What follows attention, which gave `mixed_BTD`."""
        x_BTD = x_BTD + mixed_BTD
        result: Tensor = x_BTD + self.ffn(self.ffn_norm(x_BTD))
        return result


class GPT2(Backbone):
    """The network of a GPT2Config. `forward`, `logits` and the cache are the Backbone's."""

    def __init__(self, config: GPT2Config, *, dtype: torch.dtype) -> None:
        super().__init__(
            config,
            embed=Embedding(config.vocab_size or 0, config.hidden_size, dtype=dtype),
            positions=Embedding(config.max_position, config.hidden_size, dtype=dtype),
            blocks=[Block(config, sizes) for sizes in config.blocks()],
            norm=LayerNorm(config.hidden_size, eps=config.norm_eps),
            dtype=dtype,
        )
