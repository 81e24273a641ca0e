"""Sizes per block, and what a shape costs, from settings alone: no tensor is made here.

Letters (one legend for the whole project): V vocabulary, D hidden, L blocks, G key/value groups, R query heads per
group, N = G*R query heads, h head_dim, F FFN width, B batch, T sequence, K keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from lmworks.core.cost import Cost
from lmworks.core.errors import Problem, RecipeError
from lmworks.model.tiles import kept_scores

PerBlock = int | tuple[int, ...]
"""One size for all blocks, or one per block."""


@dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """The sizes of one block."""

    n_heads: int
    """N: query heads."""
    n_kv_heads: int
    """G: key/value heads. Query head j reads group j // (N / G)."""
    head_dim: int
    """h: values per head."""
    ffn_size: int
    """F: width of the feed-forward layer; of each expert, where the block has experts."""
    window: int | None = None
    """How many tokens a token sees, itself included; None = all before it."""
    experts: int = 0
    """E: experts; 0 = a dense block."""
    top_k: int = 0
    """K: experts that each token uses."""
    shared_size: int = 0
    """Width of the expert that every token uses besides; 0 = none."""


@dataclass(frozen=True, kw_only=True)
class BlockBytes:
    """What a block could keep of one micro-batch on one rank, in bytes, told from sizes."""

    number: int
    """Of the block in the whole model."""
    whole: int
    """All that autograd saves, its input included."""
    entrance: int
    """Its input alone."""
    products: int
    """What its linear layers and fused attention give."""
    attention: int = 0
    """What attention keeps between its products: queries, keys, values, their norms, scores and the result."""
    tokens: int = 0
    """Of the micro-batch on this rank."""
    width: int = 0
    """D, of the residual stream."""
    sizes: BlockSizes | None = None
    """Heads and feed-forward width, as this rank holds them."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes that a policy holds in memory for one block and micro-batch."""

    waiting: int
    """From the end of its forward pass to the start of its backward pass."""
    working: int
    """On top of that while its backward pass is at work."""


class Shape(Protocol):
    """What every model config can tell without building anything."""

    @property
    def vocab_size(self) -> int | None:
        """V, or None while the tokenizer has not been asked."""

    @property
    def n_layers(self) -> int:
        """L."""

    @property
    def hidden_size(self) -> int:
        """D."""

    @property
    def tied(self) -> bool:
        """Whether the head is the token table."""

    def blocks(self) -> tuple[BlockSizes, ...]:
        """One entry per block."""

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every parameter, in the order of the forward pass; a tied head is not listed."""

    def saved_values_per_token(self, block: BlockSizes) -> int:
        """Values one block keeps per token for the backward pass, attention's scores apart."""


def spread(value: PerBlock, n_layers: int, name: str, problems: list[Problem]) -> tuple[int, ...]:
    """`value` for each of the blocks. A list of the wrong length is added to `problems`."""
    if isinstance(value, int):
        return (value,) * n_layers
    if len(value) != n_layers:
        problems.append(
            Problem(
                path=f"{name}",
                text=f"has {len(value)} entries for n_layers = {n_layers}; give one number, or one per block",
            )
        )
        return (*value, *([value[-1] if value else 1] * n_layers))[:n_layers]
    return tuple(value)


def block_sizes(
    *,
    n_layers: int,
    hidden_size: int,
    n_heads: PerBlock,
    n_kv_heads: PerBlock | None,
    head_dim: int | None,
    ffn_size: PerBlock,
    windows: Sequence[int | None] | None = None,
) -> tuple[tuple[BlockSizes, ...], list[Problem]]:
    """The sizes of every block, and everything that is wrong with them."""
    problems: list[Problem] = []
    heads = spread(n_heads, n_layers, "n_heads", problems)
    groups = heads if n_kv_heads is None else spread(n_kv_heads, n_layers, "n_kv_heads", problems)
    widths = spread(ffn_size, n_layers, "ffn_size", problems)
    if head_dim is None:
        head_dim = _default_head_dim(hidden_size, heads, problems)
    blocks = []
    for index in range(n_layers):
        if heads[index] % groups[index]:
            below = max(g for g in range(1, groups[index] + 1) if heads[index] % g == 0)
            problems.append(
                Problem(
                    path="n_kv_heads",
                    text=f"block {index} has {heads[index]} query heads, which {groups[index]} key/value heads do not "
                    f"divide; the nearest number that does is {below}",
                )
            )
        blocks.append(
            BlockSizes(
                n_heads=heads[index],
                n_kv_heads=groups[index],
                head_dim=head_dim,
                ffn_size=widths[index],
                window=windows[index] if windows is not None else None,
            )
        )
    return tuple(blocks), problems


def _default_head_dim(hidden_size: int, heads: tuple[int, ...], problems: list[Problem]) -> int:
    """hidden_size / n_heads, where that is a whole number and the same in every block."""
    if len(set(heads)) > 1:
        problems.append(Problem(path="head_dim", text="must be given when n_heads differs from block to block"))
        return hidden_size // max(heads)
    if heads and hidden_size % heads[0]:
        near = max(n for n in range(1, heads[0] + 1) if hidden_size % n == 0)
        problems.append(
            Problem(
                path="n_heads",
                text=f"{heads[0]} heads do not divide hidden_size = {hidden_size}; use {near} heads, or give head_dim",
            )
        )
    return hidden_size // heads[0] if heads else hidden_size


def refuse(problems: Sequence[Problem]) -> None:
    """Raise RecipeError when there is a problem."""
    if problems:
        raise RecipeError(problems, source="the model's settings")


def cost(config: Shape, *, sequence: int, bytes_per_value: int = 4) -> Cost:
    """Exact counts of a shape, with activations and cache held at `bytes_per_value` (4 = float32, 2 = bfloat16).

    Forward FLOPs per token = 2 x (values of every matrix that multiplies: all 2-D block weights, the experts that a
    token uses, the head) + 4 x N x h x (mean number of keys a token sees) for the two products of attention. A causal
    token at place t of T sees t + 1 keys, (T + 1) / 2 on average; with a window w it sees min(t + 1, w). A block with a
    window caches the keys of w tokens at most: w / T of one without, per token.

    Activations are those that the blocks keep in eager mode on a CPU, to the value in float32. In bfloat16 the scales
    of norms are float32, and a cast of every matrix comes on top, once a forward pass. Fused kernels of a GPU and
    compiled blocks keep other values.
    """
    if config.vocab_size is None:
        raise RecipeError(
            [Problem(path="vocab_size", text="is not known yet; give it, or let the tokenizer set it")],
            source="the model's settings",
        )
    tables = {"embed.weight", "positions.weight"}
    blocks = config.blocks()
    parameters = matrices = looked_up = idle = 0
    for name, shape in config.shapes():
        values = math.prod(shape)
        parameters += values
        idle += values - active_values(name, shape, blocks)
        if name == "positions.weight" or (name == "embed.weight" and not config.tied):
            looked_up += values
        if len(shape) >= 2 and name not in tables:
            matrices += active_values(name, shape, blocks)
    if config.tied:
        matrices += config.vocab_size * config.hidden_size
    attention = sum(4.0 * block.n_heads * block.head_dim * mean_keys(sequence, block.window) for block in blocks)
    saved = sum(
        config.saved_values_per_token(block) + block.n_heads * saved_scores(sequence, block.window) for block in blocks
    )
    cached = sum(
        2 * block.n_kv_heads * block.head_dim * min(1.0, (block.window or sequence) / sequence) for block in blocks
    )
    return Cost(
        parameters=parameters,
        idle_parameters=idle,
        embedding_parameters=looked_up,
        forward_flops_per_token=2.0 * matrices + attention,
        activation_bytes_per_token=float(saved * bytes_per_value),
        cache_bytes_per_token=float(cached * bytes_per_value),
    )


def forward_share(config: Shape, *, start: int, sequence: int) -> float:
    """The share of a forward pass's FLOPs, as `cost` counts them, that blocks `start` .. and the head take."""
    blocks = config.blocks()
    prefixes = tuple(f"blocks.{index}." for index in range(start, len(blocks)))
    matrices = (config.vocab_size or 0) * config.hidden_size
    matrices += sum(
        active_values(name, s, blocks) for name, s in config.shapes() if len(s) >= 2 and name.startswith(prefixes)
    )
    attention = sum(4.0 * b.n_heads * b.head_dim * mean_keys(sequence, b.window) for b in blocks[start:])
    return (2.0 * matrices + attention) / cost(config, sequence=sequence).forward_flops_per_token


def active_values(name: str, shape: tuple[int, ...], blocks: Sequence[BlockSizes]) -> int:
    """Values of a parameter that one token uses: of experts, which are the 3-D ones, K of E."""
    if len(shape) < 3:
        return math.prod(shape)
    return blocks[int(name.split(".")[1])].top_k * math.prod(shape[1:])


def mean_keys(sequence: int, window: int | None) -> float:
    """Keys a causal token sees on average over a row of `sequence` tokens."""
    if window is None or window >= sequence:
        return (sequence + 1) / 2
    return (window * (window + 1) / 2 + (sequence - window) * window) / sequence


def biased_block_shapes(prefix: str, width: int, sizes: BlockSizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every parameter of a GPT-2 or GPT-NeoX block: biases everywhere, two LayerNorms."""
    query, keys = sizes.n_heads * sizes.head_dim, sizes.n_kv_heads * sizes.head_dim
    linears = {
        "attn.q_proj": (query, width),
        "attn.k_proj": (keys, width),
        "attn.v_proj": (keys, width),
        "attn.o_proj": (width, query),
        "ffn.up_proj": (sizes.ffn_size, width),
        "ffn.down_proj": (width, sizes.ffn_size),
    }
    for norm, part in (("attn_norm", "attn."), ("ffn_norm", "ffn.")):
        yield f"{prefix}.{norm}.weight", (width,)
        yield f"{prefix}.{norm}.bias", (width,)
        for name, matrix in linears.items():
            if name.startswith(part):
                yield f"{prefix}.{name}.weight", matrix
                yield f"{prefix}.{name}.bias", matrix[:1]


def biased_saved_values(width: int, block: BlockSizes, *, norm_inputs: int) -> int:
    """Values a GPT-2 or GPT-NeoX block keeps per token, attention's scores apart.

    The two norms' inputs (one where they share it), outputs, means and scales; q, k, v, mixed heads; GELU's input and
    output.
    """
    query, keys = block.n_heads * block.head_dim, block.n_kv_heads * block.head_dim
    return (norm_inputs + 2) * width + 4 + 2 * query + 2 * keys + 2 * block.ffn_size


def saved_scores(sequence: int, window: int | None) -> float:
    """Values that attention keeps per token and head: the scores of its tiles, or one log-sum-exp in a fused kernel."""
    return kept_scores(sequence, window) / sequence or 1.0
