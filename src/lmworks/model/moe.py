"""Mixture of experts: a feed-forward layer of which each token uses a few parts, chosen by a router.

    s = softmax(router x) or sigmoid(router x)                     (N, E) scores, in float32
    chosen = the K largest of s + expert_bias                      the bias decides who is chosen, nothing else
    w = s[chosen], divided by their sum where normalise_top_k, times scale
    y = sum over the chosen of w * down(silu(gate x) * up x)       + shared(x), where there is a shared expert

Letters: N tokens, E experts, K experts per token, M = N K rows, F width of an expert, D hidden, B rows, T tokens a row.

No token is dropped, whatever the load: tokens are sorted by expert, and each expert multiplies its own run of rows
(`grouped.py`). Between the sorting and the products stands one call, `exchange(x_MD, counts_E, experts)`. On one
process it calls the experts; a layout that divides them sends the rows to where their expert is and back.

Two ways to keep the load even, which may be used together:

- `aux_loss`: the load-balancing loss of Switch (arXiv 2101.03961, eq. 4) and GShard, for K experts per token and a row
  at a time, as in DeepSeek-V3 (arXiv 2412.19437, eq. 17 to 20):

      aux = sum over e of f_e P_e
      f_e = E / (K T) * tokens of the row that chose e             P_e = mean over the row of s_e / sum of s

  1 when the load is even; no gradient goes through f. f_e P_e is not linear in the tokens, so a mean over larger groups
  is another loss. Rows are the finest group, which makes the mean over all rows of a step the same for every split into
  micro-batches and ranks. Every token of a row counts, with a target or without: it loads experts like any other.
- `bias_rate`: loss-free balancing (arXiv 2408.15664). After an optimizer step, the bias of each expert that had less
  than the mean load rises by the rate, that of one with more falls. It has no gradient.

What an optimizer step has to do (`train/step.py`):

    with balanced(model, rows=rows of the step on all ranks):      around all forward and backward passes of the step
        ...
    optimizer step
    columns = after_update(model)                                  moves the biases; how even the load was

The aux loss is no component of the objective. Its gradient, weight / rows for each row, enters in the backward pass of
the layer that it belongs to (as in Megatron-LM). So it needs no place in what blocks and pipeline stages hand on, comes
in while FSDP has the layer's weights at hand, and recomputed blocks give it as any other gradient. Passes outside
of `balanced` (validation, text, a probe's extra gradients) neither count nor balance. Rows count alike, also where the
objective weighs them. `loss` in the metrics stays the objective's own, comparable with that of a dense model; what is
added to it is the column `experts/aux_loss`.

Loads are counted in the backward pass too: it runs once for each row that is trained on, also when the forward pass is
repeated by recomputation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lmworks.core.errors import Problem
from lmworks.core.recipe import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from lmworks.model import ops
from lmworks.model.grouped import grouped_linear, sorted_rows, unsorted_rows
from lmworks.model.layers import SwiGLU, empty
from lmworks.model.sizes import BlockSizes

SWITCH_WEIGHT = 0.01
"""The weight that Switch Transformer found for its load-balancing loss (arXiv 2101.03961, section 2.2)."""
TINY = 1e-20
"""Added to a sum of scores before it divides, as in DeepSeek-V3's own code: sigmoids may all be 0."""


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Blocks whose feed-forward layer is a mixture of experts."""

    count: PositiveInt
    """E: experts of a block (Mixtral 8x7B: 8)."""
    top_k: PositiveInt = 2
    """K: experts that each token uses (GShard and Mixtral: 2; Switch: 1)."""
    size: PositiveInt | None = None
    """F: width of each expert; left out = ffn_size, which the dense blocks have in any case."""
    shared_size: NonNegativeInt = 0
    """Width of an expert that every token uses besides (DeepSeekMoE, arXiv 2401.06066); 0 = none."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    """How the router's logits become scores: softmax over all experts (Switch, Mixtral), sigmoid (DeepSeek-V3)."""
    normalise_top_k: bool = True
    """Divide a token's weights by their sum (Mixtral, DeepSeek-V3)."""
    scale: PositiveFloat = 1.0
    """Times the weights, after that (DeepSeek-V3: 2.5)."""
    aux_loss: NonNegativeFloat | None = None
    """Weight of the load-balancing loss (DeepSeek-V3: 0.0001). Left out = 0.01 (Switch); 0 where bias_rate is given."""
    bias_rate: NonNegativeFloat | None = None
    """Step of the bias that balances without a loss (DeepSeek-V3: 0.001). 0 = the bias stays; left out = no bias."""
    first_dense: NonNegativeInt = 0
    """Blocks at the start that stay dense (DeepSeek-V3: 3)."""

    @property
    def aux_weight(self) -> float:
        """Weight of the load-balancing loss, filled in."""
        if self.aux_loss is not None:
            return self.aux_loss
        return SWITCH_WEIGHT if self.bias_rate is None else 0.0

    def problems(self, n_layers: int) -> Iterator[Problem]:
        """What cannot be built."""
        if self.top_k > self.count:
            text = f"is {self.top_k}, of {self.count} experts; the most is {self.count}"
            yield Problem(path="experts.top_k", text=text)
        if self.first_dense >= n_layers:
            text = f"is {self.first_dense} of n_layers = {n_layers}: no block has experts. The most is {n_layers - 1}"
            yield Problem(path="experts.first_dense", text=text)

    def in_block(self, index: int, sizes: BlockSizes) -> BlockSizes:
        """The sizes of one block, with its experts."""
        if index < self.first_dense:
            return sizes
        return replace(
            sizes,
            ffn_size=self.size or sizes.ffn_size,
            experts=self.count,
            top_k=self.top_k,
            shared_size=self.shared_size,
        )

    def shapes(self, prefix: str, width: int, sizes: BlockSizes) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every parameter of one layer."""
        yield f"{prefix}.router.weight", (self.count, width)
        if self.bias_rate is not None:
            yield f"{prefix}.router.expert_bias", (self.count,)
        yield f"{prefix}.experts.gate_proj", (self.count, sizes.ffn_size, width)
        yield f"{prefix}.experts.up_proj", (self.count, sizes.ffn_size, width)
        yield f"{prefix}.experts.down_proj", (self.count, width, sizes.ffn_size)
        if self.shared_size:
            yield f"{prefix}.shared.gate_proj.weight", (self.shared_size, width)
            yield f"{prefix}.shared.up_proj.weight", (self.shared_size, width)
            yield f"{prefix}.shared.down_proj.weight", (width, self.shared_size)

    def saved_values_per_token(self, width: int, sizes: BlockSizes) -> int:
        """Values that one layer keeps per token; an index is two (int64).

        Scores; chosen experts, order and its inverse; weights, and what they were divided by; for each chosen expert
        the token and its result, gate, silu(gate), up, their product; the shared expert's four.
        """
        divided = self.top_k + 1 if self.normalise_top_k else 0
        per_choice = 6 + 1 + 2 * width + 4 * sizes.ffn_size
        return self.count + divided + self.top_k * per_choice + 4 * self.shared_size

    def untrainable(self) -> Iterator[Problem]:
        """What can be built, but not learned."""
        if self.top_k == 1 and self.normalise_top_k and self.count > 1:
            text = "makes the weight of the one chosen expert 1, so the router never learns: set it to false"
            yield Problem(path="experts.normalise_top_k", text=text)


class Router(nn.Module):
    """Scores of every expert for every token, in float32 (float64 stays), whatever the compute precision."""

    def __init__(self, width: int, experts: Experts) -> None:
        super().__init__()
        self.weight = empty(experts.count, width)
        self.scoring = experts.scoring
        self.expert_bias = None if experts.bias_rate is None else empty(experts.count).requires_grad_(False)
        """Saved, loaded and exported as any parameter; no optimizer trains it."""

    def forward(self, x_ND: Tensor) -> Tensor:
        """(N, D) -> (N, E)."""
        wide = torch.float64 if x_ND.dtype == torch.float64 else torch.float32
        logits_NE = ops.linear(x_ND.to(wide), self.weight, None)
        return logits_NE.softmax(-1) if self.scoring == "softmax" else logits_NE.sigmoid()

    def choose(self, scores_NE: Tensor, top_k: int) -> Tensor:
        """(N, K) int64: the experts of each token."""
        wanted_NE = scores_NE.detach()
        if self.expert_bias is not None:
            wanted_NE = wanted_NE + self.expert_bias
        return wanted_NE.topk(top_k, dim=-1).indices


class ExpertWeights(nn.Module):
    """The matrices of several experts: those of a whole layer, or a rank's share of them."""

    def __init__(self, count: int, width: int, size: int) -> None:
        super().__init__()
        self.gate_proj = empty(count, size, width)
        self.up_proj = empty(count, size, width)
        self.down_proj = empty(count, width, size)

    def forward(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
        """(M, D) rows sorted by expert, and how many each has -> (M, D) in the same order."""
        gate_MF = grouped_linear(x_MD, self.gate_proj, counts_E)
        up_MF = grouped_linear(x_MD, self.up_proj, counts_E)
        return grouped_linear(ops.swiglu(gate_MF, up_MF), self.down_proj, counts_E)


Exchange = Callable[[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]], Tensor]
"""(M, D) rows sorted by expert, (E,) int64 rows of each expert, experts that are here -> (M, D) in the same order."""


def at_home(x_MD: Tensor, counts_E: Tensor, experts: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The exchange of one process: every expert is here."""
    return experts(x_MD, counts_E)


def same(counts_BE: Tensor) -> Tensor:
    """The counts of a row whose tokens are all here."""
    return counts_BE


class MoEFFN(nn.Module):
    """The feed-forward layer of a block with experts."""

    def __init__(self, width: int, size: int, experts: Experts) -> None:
        super().__init__()
        self.settings = experts
        self.router = Router(width, experts)
        self.experts = ExpertWeights(experts.count, width, size)
        self.shared = SwiGLU(width, experts.shared_size) if experts.shared_size else None
        self.exchange: Exchange = at_home
        """A layout that divides the experts replaces it."""
        self.over_row: Callable[[Tensor], Tensor] = same
        """Adds up (B, E) counts of tokens over whoever holds other tokens of the same rows; no gradient passes it."""
        self.row_share: float | None = None
        """What a row's aux loss weighs in the step that is being made; None outside of `balanced`."""
        self.load_E: Tensor | None = None
        """Tokens that each expert had in this step's backward passes, here. int64."""
        self.aux: Tensor | None = None
        """The sum over these rows of row_share * aux."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x_ND, top_k = x_BTD.flatten(0, 1), self.settings.top_k
        scores_NE = self.router(x_ND)
        chosen_NK = self.router.choose(scores_NE, top_k)
        counts_BE = _count(chosen_NK.view(x_BTD.shape[0], -1), self.settings.count)
        order_M = chosen_NK.flatten().argsort(stable=True)
        inverse_M = torch.empty_like(order_M)
        inverse_M[order_M] = torch.arange(order_M.shape[0], device=order_M.device)
        y_MD = self.exchange(sorted_rows(x_ND, order_M, inverse_M), counts_BE.sum(0), self.experts)
        y_NKD = unsorted_rows(y_MD, order_M, inverse_M).view(*chosen_NK.shape, -1)
        weights_NK = self._weights(scores_NE, chosen_NK).to(y_NKD.dtype)
        y_BTD: Tensor = (y_NKD * weights_NK[..., None]).sum(1).view_as(x_BTD)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD)
        if self.row_share is None or not torch.is_grad_enabled():
            return y_BTD
        return self._balanced(y_BTD, scores_NE, counts_BE, self.row_share)

    def stay_eager(self) -> None:
        """Leave this layer out of what is compiled: how many rows an expert gets is known only when they are there."""
        self.forward = torch.compiler.disable(self.forward)  # type: ignore[method-assign, no-untyped-call]  # torch's own

    def _weights(self, scores_NE: Tensor, chosen_NK: Tensor) -> Tensor:
        """(N, K): how much of each chosen expert a token takes."""
        weights_NK = scores_NE.gather(1, chosen_NK)
        if self.settings.normalise_top_k:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + TINY)
        return weights_NK if self.settings.scale == 1.0 else weights_NK * self.settings.scale

    def _balanced(self, y_BTD: Tensor, scores_NE: Tensor, counts_BE: Tensor, share: float) -> Tensor:
        """y as it is, with a backward pass that counts the load and adds the gradient of the aux loss."""
        total = None
        if self.settings.aux_weight:
            shares_BTE = self._shares(scores_NE).view(*y_BTD.shape[:2], -1)
            total = aux_loss(shares_BTE, self.over_row(counts_BE), self.settings.top_k).sum()
        result: Tensor = _Balance.apply(y_BTD, total, counts_BE.sum(0), self, share)  # type: ignore[no-untyped-call]
        return result

    def _shares(self, scores_NE: Tensor) -> Tensor:
        """(N, E): scores that add up to 1."""
        if self.settings.scoring == "softmax":
            return scores_NE
        return scores_NE / (scores_NE.sum(-1, keepdim=True) + TINY)

    def book(self, load_E: Tensor, aux: Tensor | None) -> None:
        """Add one backward pass to what the step has seen."""
        self.load_E = load_E if self.load_E is None else self.load_E + load_E
        if aux is not None:
            self.aux = aux if self.aux is None else self.aux + aux


def _count(chosen_BM: Tensor, experts: int) -> Tensor:
    """(B, E) int64: how often each expert was chosen in each row."""
    counts_BE = torch.zeros(chosen_BM.shape[0], experts, dtype=torch.int64, device=chosen_BM.device)
    return counts_BE.scatter_add_(1, chosen_BM, torch.ones_like(chosen_BM))


def aux_loss(shares_BTE: Tensor, counts_BE: Tensor, top_k: int) -> Tensor:
    """(B,): the load-balancing loss of each row. `shares` add up to 1 for each token.

    Where a row's tokens are divided, `counts` are those of the whole row and the results add up to its loss.
    """
    choices_B1 = counts_BE.sum(1, keepdim=True)  # K T
    load_BE = counts_BE * counts_BE.shape[1] / choices_B1
    mean_BE = shares_BTE.sum(1) * top_k / choices_B1
    return (load_BE * mean_BE).sum(1)


class _Balance(torch.autograd.Function):
    """The identity. Its backward pass books the load and gives the aux loss its gradient."""

    @staticmethod
    def forward(ctx: Any, y_BTD: Tensor, total: Tensor | None, load_E: Tensor, layer: MoEFFN, share: float) -> Tensor:
        ctx.layer, ctx.share, ctx.load_E = layer, share, load_E
        ctx.total = None if total is None else total.detach()
        return y_BTD.view_as(y_BTD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        if ctx.total is None:
            ctx.layer.book(ctx.load_E, None)
            return grads[0], None, None, None, None
        ctx.layer.book(ctx.load_E, ctx.total * ctx.share)
        weight = ctx.share * ctx.layer.settings.aux_weight
        return grads[0], torch.full_like(ctx.total, weight), None, None, None


# --- what a step calls -------------------------------------------------------------------------------------------


def layers_with_experts(model: nn.Module) -> list[MoEFFN]:
    """Those of a model or a stage, in the order of its blocks."""
    return [module for module in model.modules() if isinstance(module, MoEFFN)]


@contextmanager
def balanced(model: nn.Module, *, rows: float) -> Iterator[None]:
    """All forward and backward passes of one optimizer step over `rows` rows, those of other ranks included."""
    layers = layers_with_experts(model)
    for layer in layers:
        layer.row_share, layer.load_E, layer.aux = 1.0 / rows, None, None
    try:
        yield
    finally:
        for layer in layers:
            layer.row_share = None


@torch.no_grad()
def after_update(model: nn.Module, total: Callable[[Tensor], Tensor] = same) -> dict[str, Tensor]:
    """Move the biases by the load since `balanced` began; what to tell of it. Once after every optimizer step.

    `total` adds up a tensor over the ranks that had other rows, or other tokens of them. Columns:

    experts/max_load    largest load of an expert / mean load, in the block where this is largest; 1 is even
    experts/aux_loss    what the aux loss adds to the step's loss, over all blocks
    """
    layers = layers_with_experts(model)
    if not layers:
        return {}
    told = total(torch.stack([_told(layer) for layer in layers]))
    load_LE, aux_L = told[:, :-1], told[:, -1]
    mean_L1 = load_LE.mean(1, keepdim=True)
    for layer, load_E, mean in zip(layers, load_LE, mean_L1, strict=True):
        layer.load_E = layer.aux = None
        bias_E = layer.router.expert_bias
        if bias_E is not None:
            bias_E.add_((mean - load_E).sign().to(bias_E.dtype), alpha=layer.settings.bias_rate or 0.0)
    columns = {"experts/max_load": (load_LE / mean_L1).nan_to_num().max()}
    if layers[0].settings.aux_weight:
        columns["experts/aux_loss"] = aux_L.sum() * layers[0].settings.aux_weight
    return columns


def _told(layer: MoEFFN) -> Tensor:
    """(E + 1,) float64: the load, exact up to 2^53 tokens, and the mean aux loss."""
    told = torch.zeros(layer.settings.count + 1, dtype=torch.float64, device=layer.router.weight.device)
    if layer.load_E is not None:
        told[:-1] = layer.load_E
    if layer.aux is not None:
        told[-1] = layer.aux
    return told
