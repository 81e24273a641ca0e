"""One new token per row, fast: the decoder's own formula for T = 1, with fewer and larger products.

A step of one token reads every weight once and does little else, so its time is that of reading the weights plus that
of starting operations. Here q, k, v are one product, gate and up are one product, and a block starts far fewer
operations than the training path does. The result is that of `Decoder.forward` (test: equal logits).

Shapes: B rows, D hidden, N query heads, G key/value heads, h head_dim, F FFN width, K keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmworks.model.cache import KVCache
from lmworks.model.decoder import Block, Decoder, DecoderConfig
from lmworks.model.layers import SwiGLU, is_plain
from lmworks.model.sizes import BlockSizes


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """One block's weights as a step reads them."""

    sizes: BlockSizes
    attn_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    ffn_norm: Tensor | None
    """None in a parallel block."""
    gate_up: Tensor
    down: Tensor


class DecoderStep:
    """Runs a Decoder for one token per row behind a cache, with products in `dtype` and everything else in float32.

    Attention runs in the cache's precision: `settle_cache` makes it float32 on a CPU, where attention over few rows of
    half-precision keys is several times slower than over float32 ones.
    The weights are copied once, cast and joined. With `take=True` the copies replace the model's own (same values), so
    nothing is held twice; the model can then no longer be trained.
    """

    def __init__(self, model: Decoder, *, dtype: torch.dtype, take: bool = False) -> None:
        config = model.config
        assert isinstance(config, DecoderConfig)
        self.dtype = dtype
        self.eps = config.norm_eps
        self.rotary = model.rotary
        with torch.inference_mode(False), torch.no_grad():
            self.blocks = [_weights(block, dtype, take) for block in model.blocks.values() if isinstance(block, Block)]
            self.embed = model.embed.weight.detach() if model.embed is not None else torch.empty(0)
            self.norm = _norm(model.norm.weight) if model.norm is not None else torch.empty(0)
            self.head = model.head_weight().detach().to(dtype)

    def logits(self, tokens_B: Tensor, positions_B: Tensor, cache: KVCache, mask_BK: Tensor | None) -> Tensor:
        """(B, V) float32 logits behind one new token per row; the cache grows by one. mask: True = may be seen."""
        assert self.rotary is not None
        x_BD = F.embedding(tokens_B, self.embed).float()
        cos_B1h, sin_B1h = self.rotary.tables(positions_B[:, None])
        for name, block in zip(cache.blocks, self.blocks, strict=True):
            normed_BD = self._normed(x_BD, block.attn_norm)
            mixed_BD = self._attention(normed_BD, block, cos_B1h, sin_B1h, cache, name, mask_BK)
            if block.ffn_norm is None:
                x_BD = x_BD + (mixed_BD + self._ffn(normed_BD, block))
            else:
                x_BD = x_BD + mixed_BD
                x_BD = x_BD + self._ffn(self._normed(x_BD, block.ffn_norm), block)
        cache.length += 1
        return F.linear(self._normed(x_BD, self.norm), self.head).float()

    def _normed(self, x_BD: Tensor, weight_D: Tensor) -> Tensor:
        return F.rms_norm(x_BD, (x_BD.shape[-1],), weight_D, self.eps).to(self.dtype)

    def _attention(
        self,
        x_BD: Tensor,
        block: _Weights,
        cos_B1h: Tensor,
        sin_B1h: Tensor,
        cache: KVCache,
        name: str,
        mask_BK: Tensor | None,
    ) -> Tensor:
        """(B, D) float32: what attention adds. cos, sin: as `ops.rotate` takes them."""
        n_heads, groups, head_dim = block.sizes.n_heads, block.sizes.n_kv_heads, block.sizes.head_dim
        heads_BHh = F.linear(x_BD, block.qkv, block.qkv_bias).view(x_BD.shape[0], -1, head_dim)
        qk_BHh = heads_BHh[:, : n_heads + groups].float()
        if block.q_norm is not None and block.k_norm is not None:
            q_BNh = F.rms_norm(qk_BHh[:, :n_heads], (head_dim,), block.q_norm, self.eps)
            k_BGh = F.rms_norm(qk_BHh[:, n_heads:], (head_dim,), block.k_norm, self.eps)
            qk_BHh = torch.cat((q_BNh, k_BGh), 1)
        held = cache.blocks[name]
        qk_BHh = (qk_BHh * cos_B1h).addcmul_(qk_BHh.roll(head_dim // 2, -1), sin_B1h).to(held.keys.dtype)
        k_BGKh, v_BGKh = held.append(qk_BHh[:, None, n_heads:], heads_BHh[:, None, n_heads + groups :])
        # The R heads of a group stand as R rows of one query.
        q_BGRh = qk_BHh[:, :n_heads].reshape(x_BD.shape[0], groups, -1, head_dim)
        mask = None if mask_BK is None else mask_BK[:, None, None, -k_BGKh.shape[2] :]
        mixed_BGRh = F.scaled_dot_product_attention(q_BGRh, k_BGKh, v_BGKh, attn_mask=mask)
        return F.linear(mixed_BGRh.flatten(1).to(self.dtype), block.out).float()

    def _ffn(self, x_BD: Tensor, block: _Weights) -> Tensor:
        """(B, D) float32: what the feed-forward layer adds."""
        gate_BF, up_BF = F.linear(x_BD, block.gate_up).chunk(2, -1)
        return F.linear(F.silu(gate_BF).mul_(up_BF), block.down).float()


def can_step(model: nn.Module) -> TypeGuard[Decoder]:
    """Whether this is a whole, unchanged Decoder: no adapter, hook or wrapper that a step would pass by."""
    if not isinstance(model, Decoder) or model.embed is None or model.norm is None:
        return False
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    dense = all(type(block) is Block and type(block.ffn) is SwiGLU for block in model.blocks.values())
    return dense and all(is_plain(layer) for layer in layers)


def settle_cache(cache: KVCache) -> None:
    """Bring a cache that the prompt filled into the precision in which steps are fast."""
    for block in cache.blocks.values():
        if block.keys.device.type == "cpu" and block.keys.dtype in (torch.bfloat16, torch.float16):
            block.keys, block.values = block.keys.float(), block.values.float()


def _norm(weight: Tensor) -> Tensor:
    return weight.detach().float()


def _weights(block: Block, dtype: torch.dtype, take: bool) -> _Weights:
    """Copy one block's weights, cast and joined."""
    attn, ffn = block.attn, block.ffn
    assert isinstance(ffn, SwiGLU), "can_step was asked"
    projections = [attn.q_proj, attn.k_proj, attn.v_proj]
    biases = [layer.get_parameter("bias").detach().to(dtype) for layer in projections if "bias" in _names(layer)]
    return _Weights(
        sizes=attn.sizes,
        attn_norm=_norm(block.attn_norm.weight),
        qkv=_joined(projections, dtype, take),
        qkv_bias=torch.cat(biases) if biases else None,
        q_norm=None if attn.q_norm is None else _norm(attn.q_norm.weight),
        k_norm=None if attn.k_norm is None else _norm(attn.k_norm.weight),
        out=attn.o_proj.weight.detach().to(dtype),
        ffn_norm=None if block.ffn_norm is None else _norm(block.ffn_norm.weight),
        gate_up=_joined([ffn.gate_proj, ffn.up_proj], dtype, take),
        down=ffn.down_proj.weight.detach().to(dtype),
    )


def _names(layer: nn.Module) -> set[str]:
    return {name for name, _ in layer.named_parameters()}


def _joined(layers: Sequence[nn.Linear], dtype: torch.dtype, take: bool) -> Tensor:
    """The matrices below each other, in one tensor; with `take`, each becomes a view of its part."""
    joined = torch.cat([layer.weight.detach().to(dtype) for layer in layers])
    if take and layers[0].weight.dtype == dtype:
        start = 0
        for layer in layers:
            rows = layer.weight.shape[0]
            layer.weight.data = joined[start : start + rows]
            start += rows
    return joined
