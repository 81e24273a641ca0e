"""Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training.

Hong Liu, Zhiyuan Li, David Hall, Percy Liang, Tengyu Ma. ICLR 2024, arXiv 2305.14342.

## What it does

An optimizer with the memory of Adam and nearly its cost. It divides momentum by an estimate of the curvature of each
coordinate, and clips the result. So a flat coordinate moves as fast as a steep one, and no coordinate moves further
than the learning rate.

## How it works

Step t, counted from 1. θ weights, g gradient of the step, m momentum, h curvature (m and h start at 0), η learning
rate, λ weight decay, β1 = 0.96, β2 = 0.99, ε = 1e-12, k = 10 steps between estimates, γ how much curvature weighs.

    m ← β1 m + (1 - β1) g
    h ← β2 h + (1 - β2) ĥ           when t mod k = 1 (every step when k = 1); else h stays
    θ ← θ - η λ θ                    matrices only
    θ ← θ - η clip(m / max(γ h, ε), -1, 1)

ĥ is estimated at the weights before the update, so the first step has an estimate. Where h <= 0 the step is η sign(m).
No square root, no second moment of g, no bias correction: at first h is 1 % of its estimate, most coordinates are
clipped, and the update is that of sign momentum; plan a warm-up.

`estimator = "gauss-newton"` (Sophia-G): targets are drawn anew from the model's own softmax, ĝ is the gradient of the
mean loss against them, and ĥ = B ĝ², with B the number of targets that count; masked ones do not. On average ĥ is the
diagonal of the Gauss-Newton matrix. It is never negative.

`estimator = "hutchinson"` (Sophia-H): ĥ = u (∇²L u) in every coordinate, one Hessian-vector product for a random u:
gaussian, or rademacher (±1, less variance). On average ĥ is the diagonal of the Hessian. It may be negative.

Both use a share of the step's rows (1/2 for gauss-newton, 1/15 for hutchinson: the paper's 240 and 32 of 480), taken at
even distances. Their random numbers are saved in checkpoints. Micro-batches are summed before anything is squared.

Columns of metrics.jsonl: `sophia/win_rate`, the share of coordinates with |m| < γ h, which take a step below η;
`sophia/clipped`, the share with |m| >= max(γ h, ε), which take a step of exactly η (of each block with `per_block`).
On steps with an estimate: `sophia/h_norm`, the L2 norm of h; `sophia/estimate_rows`; and `sophia/estimate_cost`, the
work of the estimate divided by the step's own, which is in `flops` as well.

## When to use it

- `lr` is the largest step of a coordinate. Start slightly below AdamW's rate, or 3 to 5 times Lion's; for GPT-2 sizes
  at AdamW's. The authors' rates: 6e-4 (125M), 7e-4 (355M), 3e-4 (770M), against 6e-4, 3e-4, 2e-4 for AdamW.
- `weight_decay` about twice AdamW's; the authors take 0.2.
- `gamma`: watch `sophia/win_rate`. It should peak early, then stay in 0.1 to 0.5; a larger gamma raises it (hutchinson:
  up to the share of h > 0). The authors take 0.05, 0.08, 0.05 for the sizes above, 0.01 for hutchinson, with 0.5M
  tokens a batch. Noise in m falls with the root of those, so small batches want more. Below 30M none is published.
- `watchers = [{ use = "sophia-health" }]` says so when win_rate has been outside 0.05 to 0.6 for 500 steps.
- When the loss blows up: lower lr a little, or raise gamma.

Memory: two float32 numbers per weight, as AdamW, and two more during the update; hutchinson also keeps the graph of a
backward pass. Work on top of a step, by default: gauss-newton 4 forward passes over half the rows in every tenth step,
7 % (targets are drawn in a pass of their own, so that objectives stay simple); hutchinson 9 over a fifteenth, 2 %.

## Differences

- The published code estimates after steps 10, 20, ..., on as many new rows as a step has. The paper, and we, estimate
  before the updates of steps 1, 11, ..., on a share of the step's own rows.
- It clips ĝ to norm 1 before it squares, which makes h too small whenever the clip bites. We do not clip ĝ. The
  momentum's gradient is clipped by the recipe's `gradient` stages, as there.
- It keeps h without B and divides by ρ B h + 1e-15, B a constant of 480 * 1024 tokens. Ours is the same with γ = ρ, B
  in h, and B counted in the rows that were used. Rates mean the same in both.
- It has gauss-newton only. levanter has hutchinson only, and corrects the bias of m, which the paper does not.
- Weight decay falls on matrices, and on embedding tables only with `decay_embeddings`.
- The authors scale attention by 1 / (block + 1) for all optimizers. Here an optimizer does not touch the model.

## Limits

- gauss-newton needs targets that can be drawn from the model, and one kind of unit; other objectives are refused.
- hutchinson differentiates twice. Attention then runs by its plain formula, and compiled blocks are refused.
- An estimate that runs out of GPU memory is made on half the rows, from then on; B follows. Rows without a valid target
  give none: h stays. One that is not finite ends the run before the update.
- Weights that are frozen, or have a sparse gradient or none, are passed over and have no state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast, final

import torch
from annotated_types import Interval
from torch import Tensor, nn

from lmworks.core.errors import NonFinite, Problem, UsageError
from lmworks.core.recipe import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from lmworks.data.load import Batch
from lmworks.model.backbone import Backbone
from lmworks.train.optim import Beta, TorchUpdate, parameter_groups, values_of
from lmworks.train.probe import Probe
from lmworks.train.slots import Change, Optimizer, State, StepRecord, Update, Watcher, Watching

Directions = Literal["gaussian", "rademacher"]
Share = Annotated[float, Interval(gt=0, le=1)]
Estimate = list[Tensor] | None
Weights = Sequence[nn.Parameter]

GAMMA = {"gauss-newton": 0.05, "hutchinson": 0.01}
SHARE = {"gauss-newton": 240 / 480, "hutchinson": 32 / 480}


@final
@dataclass(frozen=True, kw_only=True)
class Sophia(Optimizer):
    """Momentum over a running estimate of the diagonal curvature, clipped in every coordinate (Liu et al., 2024)."""

    lr: PositiveFloat
    """Peak learning rate, the largest step of a coordinate; the schedule multiplies it."""
    estimator: Literal["gauss-newton", "hutchinson"] = "gauss-newton"
    """Squared gradients of targets drawn from the model (Sophia-G), or Hessian-vector products (Sophia-H)."""
    gamma: NonNegativeFloat | None = None
    """Weight of the curvature; larger clips fewer coordinates. Left out: 0.05 for gauss-newton, 0.01 for hutchinson."""
    every: PositiveInt = 10
    """Steps from one estimate of the curvature to the next (k)."""
    share: Share | None = None
    """Part of the step's rows that an estimate uses, at least one row. Left out: 1/2 for gauss-newton, 1/15 for
    hutchinson."""
    directions: Directions | None = None
    """Random directions of hutchinson. Left out: gaussian, as in the paper."""
    betas: tuple[Beta, Beta] = (0.96, 0.99)
    """Decay of the momentum and of the curvature."""
    eps: PositiveFloat = 1e-12
    """The least divisor."""
    weight_decay: NonNegativeFloat = 0.2
    """Decoupled weight decay on matrices."""
    decay_embeddings: bool = False
    """Whether token and position tables are decayed as well."""
    per_block: bool = False
    """Also write the clipped share of each block."""

    def build(self, model: Backbone) -> Update:
        """The running optimizer over the model's trainable parameters."""
        groups = parameter_groups(model, self.weight_decay, decay_embeddings=self.decay_embeddings)
        return Curved(self, [group for group in groups if group["params"]])

    def state_bytes(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Momentum and curvature, and three counts."""
        return 8 * values_of(shapes.values()) + 24

    def check(self, recipe: Any) -> Iterator[Problem]:
        """An estimator that the objective or the model cannot serve, and a setting without effect."""
        if self.estimator == "gauss-newton":
            if not recipe.objective.predicts:
                text = "draws targets from the model's own distribution, and this objective predicts none"
                yield Problem(path="estimator", text=f'gauss-newton {text}. Take estimator = "hutchinson"')
            if self.directions is not None:
                yield Problem(path="directions", text='has no effect without estimator = "hutchinson"')
        elif recipe.compile:
            text = "differentiates twice, which compiled blocks cannot. Take compile = false, or gauss-newton"
            yield Problem(path="estimator", text=f"hutchinson {text}")


@final
@dataclass(frozen=True, kw_only=True)
class SophiaHealth(Watching):
    """Say so when Sophia's win_rate stays outside its healthy range, and where to move gamma."""

    low: Fraction = 0.05
    """Below this nearly all coordinates are clipped."""
    high: Fraction = 0.6
    """Above this nearly no coordinate moves by the learning rate."""
    patience: PositiveInt = 500
    """Steps on the same side that are borne."""

    def start(self) -> Watcher:
        """A watcher that has seen no step yet."""
        return _Health(self)

    def check(self, recipe: Any) -> Iterator[Problem]:
        """A range that is none, and another optimizer."""
        if self.low >= self.high:
            yield Problem(path="low", text=f"{self.low} is not below high = {self.high}")
        if not isinstance(recipe.optimizer.core(), Sophia):
            yield Problem(path="", text='has no effect: it watches optimizer = { use = "sophia" }')


@final
class Curved(Update):
    """Asks for an estimate when one is due, then lets SophiaOptimizer step."""

    def __init__(self, settings: Sophia, groups: list[dict[str, Any]]) -> None:
        self._settings = settings
        gamma = GAMMA[settings.estimator] if settings.gamma is None else settings.gamma
        self._share = settings.share or SHARE[settings.estimator]
        self._inner = SophiaOptimizer(groups, lr=settings.lr, betas=settings.betas, gamma=gamma, eps=settings.eps)
        self._by_name = TorchUpdate([self._inner])
        self._own = {"step": 0, "last_estimate": 0, "most_rows": 0}
        """Steps made; the step of the last estimate; rows that memory has room for, 0 while it was never short."""

    def set_lr(self, factor: float) -> float:
        """Set the rate to `factor` times its own, and return it."""
        return self._by_name.set_lr(factor)

    def step(self, probe: Probe) -> None:
        """One update, after an estimate when one is due. Raises NonFinite, with nothing changed, for a bad estimate."""
        self._own["step"] += 1
        if (self._own["step"] - 1) % self._settings.every == 0:
            assert probe.batch is not None, "the step tells the probe its rows"
            self._look(probe, probe.batch)
        self._by_name.step(probe)
        self._note(probe)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self._by_name.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """momentum and curvature under each parameter's name, and the counts under 'sophia'."""
        counts = {f"sophia/{name}": torch.tensor(value) for name, value in self._own.items()}
        return {**self._by_name.state(), **counts}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` gave."""
        self._own = {name: int(state[f"sophia/{name}"]) for name in self._own}
        self._by_name.load({name: value for name, value in state.items() if not name.startswith("sophia/")})

    def _look(self, probe: Probe, batch: Batch) -> None:
        """Take an estimate into h, unless no target counts."""
        parameters, booked = self._inner.stepping(), probe.booked
        rows, found = self._estimate(probe, batch, parameters)
        if found is None:
            return
        if not bool(torch.stack([estimate.isfinite().all() for estimate in found]).all()):
            what = f"the {self._settings.estimator} estimate of the curvature is not finite; the update was not made"
            raise NonFinite(what, next_step="start anew with a lower rate: --resume never --set optimizer.lr=...")
        probe.note("sophia/h_norm", self._inner.remember(parameters, found))
        self._own["last_estimate"] = self._own["step"]
        probe.note("sophia/estimate_rows", rows)
        probe.note("sophia/estimate_cost", (probe.booked - booked) / (3 * batch.tokens_BT.numel()))

    def _estimate(self, probe: Probe, batch: Batch, parameters: Weights) -> tuple[int, Estimate]:
        """How many rows were used, and the estimate; on half the rows when memory ends."""
        rows = max(1, round(self._share * batch.rows))
        rows = min(rows, self._own["most_rows"] or rows)
        while True:
            used = spread(batch, rows)
            try:
                if self._settings.estimator == "gauss-newton":
                    return rows, gauss_newton(probe, used, parameters)
                return rows, hutchinson(probe, used, parameters, self._settings.directions or "gaussian")
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
            rows = self._own["most_rows"] = rows // 2

    def _note(self, probe: Probe) -> None:
        """The shares of coordinates by their step."""
        tally = self._inner.tally
        if not tally:
            return
        win_rate, clipped = _shares(tally.values())
        probe.note("sophia/win_rate", win_rate)
        probe.note("sophia/clipped", clipped)
        for block in dict.fromkeys(_block(name) for name in tally) if self._settings.per_block else ():
            _, clipped = _shares(counted for name, counted in tally.items() if _block(name) == block)
            probe.note(f"sophia/clipped/{block}", clipped)


@final
class SophiaOptimizer(torch.optim.Optimizer):
    """m <- b1 m + (1 - b1) g;  w <- (1 - lr wd) w - lr clip(m / max(gamma h, eps), -1, 1);  h as it was remembered."""

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], gamma: float, eps: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self._betas, self._gamma, self._eps = betas, gamma, eps
        self.tally: dict[str, tuple[Tensor, int]] = {}
        """Of the last step, by parameter name: coordinates that win and that are clipped (2); all coordinates."""

    def stepping(self) -> list[nn.Parameter]:
        """The parameters that the next step changes."""
        return [p for group in self.param_groups for p in group["params"] if _has_dense_gradient(p)]

    @torch.no_grad()
    def remember(self, parameters: Weights, estimates: Sequence[Tensor]) -> Tensor:
        """h <- b2 h + (1 - b2) estimate for the given parameters; returns the norm of h over them."""
        curvatures = [self._kept(p)["curvature"] for p in parameters]
        wide = [estimate.to(h.dtype) for estimate, h in zip(estimates, curvatures, strict=True)]
        torch._foreach_lerp_(curvatures, wide, 1 - self._betas[1])
        return torch.nn.utils.get_total_norm(curvatures)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # torch types a closure's loss
        """One update of every parameter that has a dense gradient."""
        self.tally = {}
        for group in self.param_groups:
            named = zip(group["names"], group["params"], strict=True)
            found = {name: p for name, p in named if _has_dense_gradient(p)}
            if not found:
                continue
            parameters, kept = list(found.values()), [self._kept(p) for p in found.values()]
            momenta = [state["momentum"] for state in kept]
            gradients = [cast("Tensor", p.grad).to(m.dtype) for p, m in zip(parameters, momenta, strict=True)]
            torch._foreach_lerp_(momenta, gradients, 1 - self._betas[0])
            bounds = torch._foreach_mul([state["curvature"] for state in kept], self._gamma)
            wins = [(m.abs() < bound).sum() for m, bound in zip(momenta, bounds, strict=True)]
            torch._foreach_clamp_min_(bounds, self._eps)
            ratios = torch._foreach_div(momenta, bounds)
            for name, won, ratio in zip(found, wins, ratios, strict=True):
                self.tally[name] = torch.stack([won, (ratio.abs() >= 1).sum()]), ratio.numel()
            torch._foreach_clamp_min_(ratios, -1.0)
            torch._foreach_clamp_max_(ratios, 1.0)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, ratios, alpha=-group["lr"])

    def _kept(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """momentum and curvature of a parameter, in float32 at least."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            state["momentum"] = torch.zeros_like(parameter, dtype=dtype)
            state["curvature"] = torch.zeros_like(parameter, dtype=dtype)
        return state


class _Health(Watcher):
    """Counts steps on one side of the healthy range."""

    def __init__(self, settings: SophiaHealth) -> None:
        self._settings = settings
        self._side, self._since = 0, 0

    def look(self, record: StepRecord, probe: Probe) -> Change | None:
        """A note with the direction to move gamma, once in every `patience` steps outside."""
        rate = probe.notes().get("sophia/win_rate")
        if rate is None:
            return None
        side = int(rate > self._settings.high) - int(rate < self._settings.low)
        self._since = 0 if side == 0 else self._since + 1 if side == self._side else 1
        self._side = side
        if self._since < self._settings.patience:
            return None
        self._since = 0
        place = f"below {self._settings.low}" if side < 0 else f"above {self._settings.high}"
        advice = "raise" if side < 0 else "lower"
        since = f"for {self._settings.patience} steps ({rate:.3f} now)"
        return Change(reason=f"sophia/win_rate has been {place} {since}: {advice} optimizer.gamma")

    def state(self) -> State:
        """The side and how long on it."""
        return {"side": self._side, "since": self._since}

    def load(self, state: State) -> None:
        """Take back what `state()` gave."""
        self._side, self._since = int(state["side"]), int(state["since"])


def spread(batch: Batch, rows: int) -> Batch:
    """`rows` of the batch's rows at even distances, from the first: neighbours may come from the same reader."""
    at = torch.arange(rows, device=batch.tokens_BT.device) * batch.rows // rows
    return batch[at]


def gauss_newton(probe: Probe, batch: Batch, parameters: Weights) -> Estimate:
    """B * (gradient of the mean loss against drawn targets) squared, for each parameter; None when no target counts.

    Raises UsageError when the loss has more than one kind of unit, so that there is no B.
    """
    counts = probe.objective.count(batch)
    if len(counts) != 1:
        raise UsageError(
            f"gauss-newton needs an objective with one kind of unit; here are {' + '.join(counts)}",
            where="optimizer.estimator",
            next_step='--set optimizer.estimator="hutchinson"',
        )
    terms = int(next(iter(counts.values())))
    if terms == 0:
        return None
    gradients = probe.gradients(probe.sampled(batch), parameters)
    return [gradient.to(torch.promote_types(gradient.dtype, torch.float32)).square() * terms for gradient in gradients]


def hutchinson(probe: Probe, batch: Batch, parameters: Weights, directions: Directions) -> Estimate:
    """u * (Hessian of the mean loss times u), for each parameter and random u; None when no unit counts."""
    if not any(int(count) for count in probe.objective.count(batch).values()):
        return None
    vectors = [_direction(p, directions, probe.generator) for p in parameters]
    products = probe.hessian_product(batch, parameters, vectors)
    return [u * product for u, product in zip(vectors, products, strict=True)]


def _direction(like: Tensor, directions: Directions, generator: torch.Generator) -> Tensor:
    if directions == "gaussian":
        return torch.empty_like(like).normal_(generator=generator)
    return torch.empty_like(like).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)


def _has_dense_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and parameter.grad.layout == torch.strided


def _shares(parts: Iterable[tuple[Tensor, int]]) -> Tensor:
    """Shares of winning and of clipped coordinates (2), from their numbers (2) and how many there are."""
    counts, totals = zip(*parts, strict=True)
    shares: Tensor = torch.stack(counts).sum(0) / sum(totals)
    return shares


def _block(name: str) -> str:
    """'blocks.3' for a weight of a block, else the module's name: 'embed', 'norm', 'head'."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "blocks" else parts[0]
