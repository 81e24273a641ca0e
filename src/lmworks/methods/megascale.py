"""A decoder with parallel blocks and sliding windows, and LAMB for batches four times as large.

Jiang, Lin, Zhong, Huang, Chen, Zhang, Peng, Li, Xie, Nong et al., "MegaScale: Scaling Large Language Model Training to
More Than 10,000 GPUs", NSDI 2024, arXiv 2402.15627. LAMB: You, Li, Reddi, Hseu, Kumar, Bhojanapalli, Song, Demmel,
Keutzer, Hsieh, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", ICLR 2020, arXiv 1904.00962.

## What it does

Three changes of model and optimizer that are said to leave the loss as it is and to make a step cheaper: attention and
feed-forward layer run side by side, a token attends to the last w tokens only, and LAMB replaces Adam so that a batch
can be four times as large. Each is a setting of its own:

| change | setting |
| --- | --- |
| parallel block | `model.parallel_block = true` (model `decoder`) |
| sliding window | `model.sliding_window = 512`; `model.sliding_window_blocks` for some blocks only |
| LAMB | `optimizer.use = "lamb"` |

And a runtime. Its parts serve every run, with any model and optimizer:

| part | where |
| --- | --- |
| a driver and agents: beats, faults found, tests of nodes, restart | `lmworks guard` ([guide](../guides/guard.md)) |
| the same, tried by faults on purpose | `lmworks drill` ([guide](../guides/drill.md)) |
| checkpoints in two stages, written evenly, read once | table `checkpoints` ([guide](../guides/train.md)) |
| one reader for the ranks of a machine; rows prepared ahead | always, where ranks need the same rows |
| sends that nobody waits for; products in slices | `layout.sends = "early"`; `layout.tp_slices = 2` |
| spans, timeline, heat map, who did not arrive | `lmworks trace` ([guide](../guides/trace.md)) |
| rules for a run's health | watcher `health` ([page](../concepts/health.md)) |

## How it works

**Parallel block.** With n = norm(x), one RMSNorm per block instead of two:

    y = x + (attn(n) + ffn(n))            serial block:  a = x + attn(norm_1(x));  y = a + ffn(norm_2(a))

Attention and feed-forward layer share their input, so tensor parallelism needs one pair of collectives per block
instead of two. A block has D parameters less, and keeps 2 D values per token less for the backward pass. Its matrices,
and so its FLOPs, are those of the serial block.

**Sliding window.** Token i attends to token j where i - w < j <= i: itself and the w - 1 before it. Block l sees back
l (w - 1) tokens through the blocks below. A row of T tokens costs w (w + 1) / 2 + (T - w) w scores per head instead of
T (T + 1) / 2; `cost()` counts exactly these. With w >= T nothing changes. In decoding a block keeps the keys and values
of the last w - 1 tokens, in room for little more than w.

**LAMB.** Adam's direction with decay, and per tensor a step as long as the tensor itself times the rate:

    m <- beta1 m + (1 - beta1) g              m_hat = m / (1 - beta1^t)        t = 1, 2, ...
    v <- beta2 v + (1 - beta2) g^2            v_hat = v / (1 - beta2^t)
    r = m_hat / (sqrt(v_hat) + eps) + lambda theta
    theta <- theta - lr * phi(||theta||) / ||r|| * r

beta = (0.9, 0.95), eps = 1e-6, lambda = 0.1 by default; phi(z) = z, or clamped to `norm_bounds`. The trust ratio
phi(||theta||) / ||r|| is 1 where either norm is 0. Token and position tables, norms and biases take the same direction
without decay and with ratio 1. Every matrix of a block is one tensor. metrics.jsonl gets the mean, the smallest and the
largest ratio of each step (`lamb/trust_ratio_mean`, `_min`, `_max`).

**Why a larger batch.** A pipeline has p stages, each cut into v chunks; a step has m micro-batches, each of which takes
a stage the time t. A stage works m t per step, and waits (p - 1) t / v while the pipeline fills and drains: the wait is
b = (p - 1) / (v m) of the work. Four times the batch at the same micro-batch is 4 m micro-batches. The wait per step
stays, so the wait per token falls to a quarter, by 75 %. Time per token goes from 1 + b to 1 + b / 4.

## When to use it

- *Parallel block*: under tensor parallelism. On one device it saves a norm and an addition.
- *Sliding window*: where T is several times w; attention is then a visible share of a step. Information travels
  l (w - 1) tokens at most: take L (w - 1) well above the distances that matter.
- *LAMB*: when the batch must grow. At the batch where AdamW is tuned, AdamW has one knob less.
- *Rate of LAMB*: with phi(z) = z each matrix changes by the share `lr` of its own length per step. AdamW changes a
  matrix of fan-in D, whose values begin at about 1 / sqrt(D), by 0.2 to 0.4 lr_adamw sqrt(D) of its length at first,
  and by less as the matrix grows; LAMB's steps grow with it. So start below that, at lr = 0.1 lr_adamw sqrt(D), and try
  half and double. You et al. scale the rate by the square root of the batch, and warm up over the same share of the
  tokens. Steps fall to a quarter at equal tokens and four times the batch.
- *Rate of tables, norms and biases*: they take Adam's step, so LAMB's rate means nothing to them. Tune `plain_lr` by
  itself, from AdamW's rate upwards. Compare with an AdamW that has this second rate too: `lamb` with
  `trust_ratio = false`.
- Memory as AdamW: two float32 values per parameter, and two more while a step runs. LAMB adds two norms per matrix to
  AdamW's arithmetic.

## Differences

- Decay and trust ratio leave out tables, norms and biases, as is usual; the paper does not say. `decay_embeddings` and
  `adapt_embeddings` take the tables in. A tied table counts as a table, an untied head as a matrix.
- q, k and v are separate tensors here, each with a ratio of its own. Code that stores them as one matrix has one ratio.
- beta2 = 0.95 and lambda = 0.1 are those of language models, and of `adamw` here, so that the two can be compared;
  You et al. take 0.999 and 0.01 for BERT.
- The paper's decoder has LayerNorm and GELU; `decoder` has RMSNorm and SwiGLU. The family `neox` has a parallel block
  with two norms (GPT-NeoX), which is another block.
- The paper gives a larger saving of waiting time for a batch four times as large; the arithmetic above gives 75 %, and
  nothing more is claimed here.
- MegaScale is closed: nothing here was compared with its code. The input products of q, k, v, gate and up are not fused
  (benchmarks/log.md).

## Limits

- A window below 1 is refused: a token sees at least itself. The paper does not name its window.
- A model with parallel blocks cannot be exported: no Llama-shaped family of transformers has one.
- Parallel blocks are for models trained from the start. A serial model's weights do not fit: `ffn_norm` is missing.
- LAMB's norms are those of whole tensors in this process.
- Whether the three leave the loss as it is at the paper's size (13B, 175B) is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from lmworks.core.errors import Problem
from lmworks.core.recipe import NonNegativeFloat, PositiveFloat
from lmworks.train.optim import EMBEDDINGS, Beta, TorchUpdate, values_of
from lmworks.train.probe import Probe
from lmworks.train.slots import Optimizer, Update

Bounds = tuple[NonNegativeFloat, PositiveFloat]


@final
@dataclass(frozen=True, kw_only=True)
class Lamb(Optimizer):
    """Adam with a step per matrix as long as the matrix times the rate (You et al., 2020)."""

    lr: PositiveFloat
    """Peak rate: the share of its own length by which a matrix changes in a step. About 0.1 sqrt(D) times AdamW's."""
    plain_lr: PositiveFloat | None = None
    """Peak rate of what has no trust ratio: tables, norms, biases. Left out = lr, which is seldom right."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the first and second moment (You et al.: 0.9, 0.999)."""
    eps: PositiveFloat = 1e-6
    """Added to the root of the second moment (You et al.: 1e-6)."""
    weight_decay: NonNegativeFloat = 0.1
    """lambda: decay on matrices, part of the direction (You et al.: 0.01)."""
    decay_embeddings: bool = False
    """Whether token and position tables are decayed as well."""
    adapt_embeddings: bool = False
    """Whether token and position tables have a trust ratio as well."""
    trust_ratio: bool = True
    """false: every ratio is 1, which is AdamW; shows what the ratio itself does."""
    norm_bounds: Bounds | None = None
    """Smallest and largest ||theta|| that the ratio may take (phi); left out = as it is."""

    def build(self, model: nn.Module) -> Update:
        """The running optimizer over the model's trainable parameters."""
        return LambUpdate(LambOptimizer(lamb_groups(model, self), self))

    def state_bytes(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """m and v, and a count of each parameter's steps."""
        return 8 * values_of(shapes.values()) + 4 * len(shapes)

    def check(self, recipe: object) -> Iterator[Problem]:
        """Bounds must be in order, and have something to bound."""
        if self.norm_bounds is None:
            return
        low, high = self.norm_bounds
        if low > high:
            yield Problem(path="norm_bounds", text=f"[{low}, {high}] is empty; write the smaller one first")
        if not self.trust_ratio:
            yield Problem(path="norm_bounds", text="has no effect with trust_ratio = false; leave one of them out")


@final
class LambUpdate(Update):
    """A running LAMB, which notes the trust ratios of each step."""

    def __init__(self, optimizer: LambOptimizer) -> None:
        self._optimizer = optimizer
        self._inner = TorchUpdate([optimizer])

    def set_lr(self, factor: float) -> float:
        """Set every group's rate to `factor` times its own; returns the rate of the matrices."""
        return self._inner.set_lr(factor)

    def step(self, probe: Probe) -> None:
        """One update of every parameter that has a gradient."""
        self._inner.step(probe)
        ratios_K = self._optimizer.ratios_K
        if ratios_K is not None:
            probe.note("lamb/trust_ratio_mean", ratios_K.mean())
            probe.note("lamb/trust_ratio_min", ratios_K.min())
            probe.note("lamb/trust_ratio_max", ratios_K.max())

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self._inner.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """m, v and the number of steps under 'parameter name/state name'."""
        return self._inner.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` gave."""
        self._inner.load(state)


@final
class LambOptimizer(torch.optim.Optimizer):
    """The formula of the page over groups from `lamb_groups`. State is float32 (float64 for float64 parameters)."""

    def __init__(self, groups: list[dict[str, Any]], settings: Lamb) -> None:
        super().__init__(groups, {})
        self.settings = settings
        self.ratios_K: Tensor | None = None
        """Trust ratios of the last step, one per tensor that has one; None before a step, and where none has one."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # torch types a closure's loss
        """One update of every parameter that has a gradient."""
        self.ratios_K = None
        found = [ratios_K for group in self.param_groups if (ratios_K := self._step_group(group)) is not None]
        if found:
            self.ratios_K = torch.cat(found)

    def _step_group(self, group: dict[str, Any]) -> Tensor | None:
        """Update one group; gives its trust ratios, when it has any."""
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return None
        states = [self._state_of(p) for p in parameters]
        directions = self._directions(parameters, states)
        if group["weight_decay"]:
            torch._foreach_add_(directions, parameters, alpha=group["weight_decay"])
        if not (group["adapts"] and self.settings.trust_ratio):
            torch._foreach_add_(parameters, directions, alpha=-group["lr"])
            return None
        lengths_K = torch.stack(torch._foreach_norm(parameters)).to(directions[0].dtype)
        ratios_K = trust_ratios(lengths_K, torch.stack(torch._foreach_norm(directions)), self.settings.norm_bounds)
        torch._foreach_mul_(directions, list((-group["lr"] * ratios_K).unbind()))
        torch._foreach_add_(parameters, directions)
        return ratios_K

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            kind = torch.promote_types(parameter.dtype, torch.float32)
            state["step"] = torch.zeros(())
            state["m"] = torch.zeros_like(parameter, dtype=kind)
            state["v"] = torch.zeros_like(parameter, dtype=kind)
        return state

    def _directions(self, parameters: list[nn.Parameter], states: list[dict[str, Tensor]]) -> list[Tensor]:
        """m_hat / (sqrt(v_hat) + eps) of every parameter, after its moments have taken the new gradient."""
        (beta1, beta2), eps = self.settings.betas, self.settings.eps
        first, second = [state["m"] for state in states], [state["v"] for state in states]
        gradients = [p.grad.to(m.dtype) for p, m in zip(parameters, first, strict=True) if p.grad is not None]
        torch._foreach_add_([state["step"] for state in states], 1.0)
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        steps = [float(state["step"]) for state in states]
        roots = torch._foreach_sqrt(second)
        torch._foreach_div_(roots, [(1 - beta2**t) ** 0.5 for t in steps])
        torch._foreach_add_(roots, eps)
        directions: list[Tensor] = list(torch._foreach_div(first, [1 - beta1**t for t in steps]))
        torch._foreach_div_(directions, roots)
        return directions


def lamb_groups(model: nn.Module, settings: Lamb) -> list[dict[str, Any]]:
    """The trainable parameters by what falls on them: trust ratio, decay, both or neither; matrices first.

    Each group has 'params', 'names', 'adapts', 'weight_decay' and 'lr'.
    """
    kinds: dict[tuple[bool, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix, table = parameter.ndim >= 2, name.startswith(EMBEDDINGS)
            adapts = matrix and (settings.adapt_embeddings or not table)
            decays = matrix and (settings.decay_embeddings or not table)
            kinds.setdefault((adapts, decays), []).append((name, parameter))
    plain_lr = settings.lr if settings.plain_lr is None else settings.plain_lr
    return [
        {
            "params": [p for _, p in named],
            "names": [n for n, _ in named],
            "adapts": adapts,
            "weight_decay": settings.weight_decay if decays else 0.0,
            "lr": settings.lr if adapts else plain_lr,
        }
        for (adapts, decays), named in sorted(kinds.items(), key=lambda item: item[0], reverse=True)
    ]


def trust_ratios(lengths_K: Tensor, directions_K: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    """phi(||theta||) / ||r|| of K tensors from their norms (K), (K); 1 where either norm is 0."""
    bounded_K = lengths_K if bounds is None else lengths_K.clamp(*bounds)
    return torch.where((lengths_K > 0) & (directions_K > 0), bounded_K / directions_K, 1.0)
