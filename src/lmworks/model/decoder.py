"""The Llama-shaped decoder: one file to read.

    x = embed[tokens]                                              (B, T, D)
    for each block:
        x = x + attn(attn_norm(x))                                 grouped-query attention, rotary positions
        x = x + ffn(ffn_norm(x))                                   down(silu(gate) * up), or several of them: `moe.py`
    hidden = norm(x)                                               (B, T, D); logits = hidden @ head^T

With `parallel_block` a block is  n = attn_norm(x);  x = x + (attn(n) + ffn(n)):  one norm, one addition, no ffn_norm.

Shapes: B batch, T sequence, K keys, V vocabulary, D hidden, L blocks, N query heads, G key/value heads, h head_dim,
F FFN width, E experts. Sizes are per block: n_heads, n_kv_heads and ffn_size may be lists with one entry per block.
It covers Llama 1-3, SmolLM2, Mistral (window), Qwen2 (qkv_bias), Qwen3 (qk_norm), and with `experts` Mixtral and
Qwen3-MoE. A family that does not fit has its own file (`gpt2.py`, `neox.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

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
from lmworks.model.layers import Embedding, RMSNorm, SwiGLU
from lmworks.model.moe import Experts, MoEFFN
from lmworks.model.rotary import RopeScaling, Rotary
from lmworks.model.sizes import BlockSizes

Positive = Annotated[int, Ge(1)]
Sizes = Positive | tuple[Positive, ...]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A Llama-shaped decoder."""

    vocab_size: Positive | None = None
    """V: rows of the token table. Left out = the tokenizer's."""
    n_layers: Positive
    """L: number of blocks."""
    hidden_size: Positive
    """D: width of the residual stream."""
    n_heads: Sizes
    """N: query heads, one number or one per block."""
    n_kv_heads: Sizes | None = None
    """G: key/value heads, one number or one per block; left out = as many as query heads."""
    head_dim: Positive | None = None
    """h: values per head; left out = hidden_size / n_heads."""
    ffn_size: Sizes
    """F: width of the feed-forward layer, one number or one per block."""
    norm_eps: Annotated[float, Gt(0)] = 1e-5
    """Added to the mean square in RMSNorm."""
    tied: bool = False
    """The head is the token table."""
    max_position: Positive = 2048
    """Longest context the shape is meant for. Rotary positions have no table, so nothing breaks beyond it."""
    rope_theta: Annotated[float, Gt(0)] = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Llama-3 scaling of the rotary frequencies."""
    qk_norm: bool = False
    """RMSNorm on every query and key head before rotation (Qwen3)."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections (Qwen2)."""
    sliding_window: Positive | None = None
    """Tokens a token sees, itself included; left out = all before it (Mistral 0.1: 4096)."""
    sliding_window_blocks: tuple[Annotated[int, Ge(0)], ...] | None = None
    """Blocks that use the window; left out = all of them."""
    parallel_block: bool = False
    """x + attn(n) + ffn(n) with n = attn_norm(x): both halves read one norm, and blocks have no ffn_norm."""
    experts: Experts | None = None
    """A mixture of experts in the place of the feed-forward layer."""

    def blocks(self) -> tuple[BlockSizes, ...]:
        """The sizes of every block. Raises RecipeError with everything that is wrong with them."""
        blocks, problems = self._sizes()
        shape.refuse(problems)
        return blocks

    def _sizes(self) -> tuple[tuple[BlockSizes, ...], list[Problem]]:
        windowed = range(self.n_layers) if self.sliding_window_blocks is None else self.sliding_window_blocks
        blocks, problems = shape.block_sizes(
            n_layers=self.n_layers,
            hidden_size=self.hidden_size,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            head_dim=self.head_dim,
            ffn_size=self.ffn_size,
            windows=[self.sliding_window if index in windowed else None for index in range(self.n_layers)],
        )
        if self.sliding_window_blocks is not None and self.sliding_window is None:
            problems.append(Problem(path="sliding_window_blocks", text="has no effect without sliding_window"))
        if self.sliding_window is not None and self.sliding_window < 1:
            text = (
                f"is {self.sliding_window}; a token sees at least itself: give 1 or more, or leave it out for no window"
            )
            problems.append(Problem(path="sliding_window", text=text))
        outside = [index for index in windowed if index >= self.n_layers]
        if outside:
            text = f"names block {outside[0]}; with n_layers = {self.n_layers} the last is {self.n_layers - 1}"
            problems.append(Problem(path="sliding_window_blocks", text=text))
        if blocks[0].head_dim % 2:
            text = f"is {blocks[0].head_dim}; rotary positions turn pairs, so use {blocks[0].head_dim + 1}"
            problems.append(Problem(path="head_dim", text=text))
        if self.experts is not None:
            problems += self.experts.problems(self.n_layers)
            blocks = tuple(self.experts.in_block(index, sizes) for index, sizes in enumerate(blocks))
        return blocks, problems

    def check(self, recipe: object) -> Iterator[Problem]:
        """What is wrong with the settings as a whole."""
        yield from self._sizes()[1]
        if self.experts is not None:
            yield from self.experts.untrainable()

    def with_vocab(self, vocab_size: int) -> DecoderConfig:
        """The same shape for another vocabulary."""
        return replace(self, vocab_size=vocab_size)

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every parameter."""
        width = self.hidden_size
        yield "embed.weight", (self.vocab_size or 0, width)
        for index, sizes in enumerate(self.blocks()):
            yield from _block_shapes(f"blocks.{index}", self, sizes)
        yield "norm.weight", (width,)
        if not self.tied:
            yield "head.weight", (self.vocab_size or 0, width)

    def saved_values_per_token(self, block: BlockSizes) -> int:
        """Values one block keeps per token, attention's scores apart: what its norms, products and kernels were given.

        Input, output and scale of each norm; q, k, v and the mixed heads; gate, silu(gate), up, and their product.
        """
        norms = 1 if self.parallel_block else 2
        query, keys = block.n_heads * block.head_dim, block.n_kv_heads * block.head_dim
        normed = query + keys + block.n_heads + block.n_kv_heads if self.qk_norm else 0
        ffn = 4 * block.ffn_size
        if self.experts is not None and block.experts:
            ffn = self.experts.saved_values_per_token(self.hidden_size, block)
        return norms * (2 * self.hidden_size + 1) + 2 * query + 2 * keys + normed + ffn

    def cost(self, *, sequence: int, bytes_per_value: int = 4) -> Cost:
        """Parameters, FLOPs and bytes of this shape at `sequence` tokens, without building it."""
        return shape.cost(self, sequence=sequence, bytes_per_value=bytes_per_value)

    def build(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        param_dtype: torch.dtype = torch.float32,
    ) -> Decoder:
        """The network without values (NaN): computes in `dtype`, keeps parameters in `param_dtype`.

        `device="meta"` allocates nothing; materialise with `to_empty`, then `initialise(model, seed)`.
        """
        with torch.device(device):
            return Decoder(self, dtype=dtype).to(param_dtype)


def _block_shapes(prefix: str, config: DecoderConfig, sizes: BlockSizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every parameter of one block."""
    width, head = config.hidden_size, sizes.head_dim
    query, keys = sizes.n_heads * head, sizes.n_kv_heads * head
    yield f"{prefix}.attn_norm.weight", (width,)
    for name, rows in (("q_proj", query), ("k_proj", keys), ("v_proj", keys)):
        yield f"{prefix}.attn.{name}.weight", (rows, width)
        if config.qkv_bias:
            yield f"{prefix}.attn.{name}.bias", (rows,)
    yield f"{prefix}.attn.o_proj.weight", (width, query)
    if config.qk_norm:
        yield f"{prefix}.attn.q_norm.weight", (head,)
        yield f"{prefix}.attn.k_norm.weight", (head,)
    if not config.parallel_block:
        yield f"{prefix}.ffn_norm.weight", (width,)
    if config.experts is not None and sizes.experts:
        yield from config.experts.shapes(f"{prefix}.ffn", width, sizes)
        return
    yield f"{prefix}.ffn.gate_proj.weight", (sizes.ffn_size, width)
    yield f"{prefix}.ffn.up_proj.weight", (sizes.ffn_size, width)
    yield f"{prefix}.ffn.down_proj.weight", (width, sizes.ffn_size)


class Block(nn.Module):
    """One block: attention and feed-forward, one behind the other with a norm each, or side by side behind one norm."""

    def __init__(self, config: DecoderConfig, sizes: BlockSizes) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = Attention(
            config.hidden_size,
            sizes,
            qkv_bias=config.qkv_bias,
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
        )
        self.ffn_norm = None if config.parallel_block else RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.ffn: SwiGLU | MoEFFN
        if config.experts is not None and sizes.experts:
            self.ffn = MoEFFN(config.hidden_size, sizes.ffn_size, config.experts)
        else:
            self.ffn = SwiGLU(config.hidden_size, sizes.ffn_size)

    def forward(self, x_BTD: Tensor, frame: Frame, cache: BlockCache | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        if frame.halves is not None:
            return turns.forward(self, x_BTD, frame.halves)
        normed_BTD: Tensor = self.attn_norm(x_BTD)
        return self.behind(x_BTD, normed_BTD, self.attn(normed_BTD, frame, cache))

    def behind(self, x_BTD: Tensor, normed_BTD: Tensor, mixed_BTD: Tensor) -> Tensor:
        """What follows attention, which got `normed_BTD` and gave `mixed_BTD`."""
        if self.ffn_norm is None:
            side_by_side: Tensor = x_BTD + (mixed_BTD + self.ffn(normed_BTD))
            return side_by_side
        x_BTD = x_BTD + mixed_BTD
        one_by_one: Tensor = x_BTD + self.ffn(self.ffn_norm(x_BTD))
        return one_by_one

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As nn.Module's, experts left out."""
        if isinstance(self.ffn, MoEFFN):
            self.ffn.stay_eager()
        super().compile(*args, **kwargs)


class Decoder(Backbone):
    """The network of a DecoderConfig. `forward`, `logits` and the cache are the Backbone's."""

    def __init__(self, config: DecoderConfig, *, dtype: torch.dtype) -> None:
        blocks = config.blocks()
        super().__init__(
            config,
            embed=Embedding(config.vocab_size or 0, config.hidden_size, dtype=dtype),
            blocks=[Block(config, sizes) for sizes in blocks],
            norm=RMSNorm(config.hidden_size, eps=config.norm_eps),
            dtype=dtype,
            rotary=Rotary(theta=config.rope_theta, width=blocks[0].head_dim, scaling=config.rope_scaling),
        )
