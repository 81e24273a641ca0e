"""A decoder's blocks on eight-bit floats."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from lmworks.core.errors import Problem, UsageError
from lmworks.maths.coded import GROUP
from lmworks.methods.coat.halves import FeedForward, NormProducts, Product
from lmworks.model import ops
from lmworks.model.attention import Frame
from lmworks.model.cache import BlockCache
from lmworks.model.decoder import Block, DecoderConfig
from lmworks.model.layers import Linear, SwiGLU, is_plain
from lmworks.model.sizes import BlockBytes, Held
from lmworks.train.ledger import Forward, Ledger
from lmworks.train.slots import Saved


@final
@dataclass(frozen=True, kw_only=True)
class CoatActivations(Saved):
    """Products of blocks on eight-bit floats, which are also all that is kept for the backward pass (Xi et al., 2024).

    Passes without gradient (validation, samples) and exports use the weights as they are.
    """

    def passes(self, block: nn.Module, name: str, books: Ledger | None = None) -> Forward:
        """Once, on codes. Raises UsageError for a block whose products are not plain ones."""
        return coated(block, name)

    def held(self, blocks: Sequence[BlockBytes]) -> Sequence[Held] | None:
        """The table of the page, with what attention keeps; unknown for a mixture of experts."""
        found = []
        for block in blocks:
            if block.sizes is None or block.sizes.experts:
                return None
            codes = 2 * (2.125 * block.width + 4) + 4.375 * block.sizes.ffn_size  # 4: 1 / rms of a row
            found.append(Held(waiting=block.attention + round(block.tokens * codes), working=0))
        return found

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Other families, divided matrices, and sizes that are no whole groups."""
        shape = getattr(recipe.model, "shape", recipe.model)
        if not isinstance(shape, DecoderConfig):
            yield Problem(
                path="", text="coat knows the blocks of model.use = 'decoder'. Legal here: keep, recompute, offload"
            )
            return
        if recipe.precision.startswith("float8"):
            text = "coat's products are on eight-bit floats themselves. Legal: precision = 'bf16', or another policy"
            yield Problem(path="", text=text)
        if getattr(recipe.layout, "tp", 1) > 1:
            text = "coat's products are not divided over tp. Legal: layout.tp = 1, with dp_shard or pp in its place"
            yield Problem(path="", text=text)
        for name, size in sizes_of(shape).items():
            if size % GROUP:
                text = f"coat needs multiples of {GROUP}; model.{name} makes rows of {size}"
                yield Problem(path="", text=f"{text}: take {-(-size // GROUP) * GROUP}")
        tokens = (recipe.micro_batch_size or recipe.batch_size) * recipe.data.sequence_length
        if tokens % GROUP:
            text = f"coat needs a multiple of {GROUP} tokens in a micro-batch, here are {tokens}"
            yield Problem(path="", text=f"{text}: take data.sequence_length = {-(-tokens // GROUP) * GROUP}")


def sizes_of(shape: DecoderConfig) -> dict[str, int]:
    """The widths that products of a block have, by the setting that makes them; of several blocks the worst."""
    blocks = shape.blocks()
    heads = {block.n_heads * block.head_dim for block in blocks} | {b.n_kv_heads * b.head_dim for b in blocks}
    return {
        "hidden_size": shape.hidden_size,
        "n_heads": math.gcd(*heads),
        "ffn_size": math.gcd(*(block.ffn_size for block in blocks)),
    }


def coated(block: nn.Module, name: str) -> Forward:
    """A block's forward with products on codes: (B, T, D) -> (B, T, D). A mixture of experts stays as it is."""
    assert isinstance(block, Block), "check has refused other families"
    attn, ffn, plain = block.attn, block.ffn, block.forward
    matrices = [attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj]
    matrices += [ffn.gate_proj, ffn.up_proj, ffn.down_proj] if isinstance(ffn, SwiGLU) else []
    if not all(is_plain(matrix) for matrix in matrices):
        raise UsageError(
            f"block {name} has a divided or adapted product, which coat would leave out",
            where="saved",
            next_step="take saved.use = keep, recompute or offload",
        )

    def forward(x_BTD: Tensor, frame: Frame, cache: BlockCache | None = None) -> Tensor:
        if not torch.is_grad_enabled() or cache is not None or ops.plain_forms_asked():
            return plain(x_BTD, frame, cache)
        mixed_BTD = _attention(block, x_BTD, frame)
        if block.ffn_norm is None:
            return x_BTD + (mixed_BTD + _feed_forward(block, x_BTD))
        x_BTD = x_BTD + mixed_BTD
        return x_BTD + _feed_forward(block, x_BTD)

    return forward


def _attention(block: Block, x_BTD: Tensor, frame: Frame) -> Tensor:
    attn, norm = block.attn, block.attn_norm
    readers = (attn.q_proj, attn.k_proj, attn.v_proj)
    weights = [reader.weight for reader in readers]
    outs = NormProducts.apply(x_BTD.flatten(0, 1), norm.weight, norm.eps, *weights)  # type: ignore[no-untyped-call]
    rows = x_BTD.shape[:2]
    q, k, v = (_biased(out, reader).view(*rows, -1) for out, reader in zip(outs, readers, strict=True))
    mixed_ME = attn.mix(q, k, v, frame).flatten(0, 1)
    out_MD = Product.apply(mixed_ME, attn.o_proj.weight)  # type: ignore[no-untyped-call]
    return _biased(out_MD, attn.o_proj).view(x_BTD.shape)


def _feed_forward(block: Block, x_BTD: Tensor) -> Tensor:
    ffn, norm = block.ffn, block.ffn_norm or block.attn_norm
    if not isinstance(ffn, SwiGLU):
        mixed: Tensor = ffn(norm(x_BTD))
        return mixed
    weights = ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight
    out_MD: Tensor = FeedForward.apply(x_BTD.flatten(0, 1), norm.weight, norm.eps, *weights)  # type: ignore[no-untyped-call]
    return out_MD.view(x_BTD.shape)


def _biased(out: Tensor, linear: Linear) -> Tensor:
    bias: Tensor | None = linear.bias
    return out if bias is None else out + bias.to(out.dtype)
