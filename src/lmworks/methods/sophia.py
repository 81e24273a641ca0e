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

ĥ is estimated at the weights before the update, so the first step has an estimate. Where h is zero or negative, the
step is η sign(m). There is no square root, no second moment of g and no bias correction: at first h is 1 % of its
estimate, most coordinates are clipped, and the update is that of sign momentum; plan a warm-up.

`estimator = "gauss-newton"` (Sophia-G): every target is drawn anew from the model's own softmax, ĝ is the gradient of
the mean loss against the drawn targets, and ĥ = B ĝ². B is the number of valid targets in the rows used. Masked targets
count neither in the loss nor in B. ĥ is the diagonal of the Gauss-Newton matrix on average, and never negative.

`estimator = "hutchinson"` (Sophia-H): ĥ = u (∇²L u) in every coordinate, for random u: gaussian, or rademacher (±1,
which has less variance). One Hessian-vector product. ĥ is the diagonal of the Hessian on average, and may be negative.

Both use a share of the step's rows (0.5 for gauss-newton, 1/15 for hutchinson: the paper's 240 and 32 of 480), taken at
even distances. Random numbers come from the probe's generator and are saved in checkpoints. Micro-batches are summed
before anything is squared.

Columns of metrics.jsonl: `sophia/win_rate`, the share of coordinates with |m| < γ h, which take a step below η;
`sophia/clipped`, the share with |m| >= max(γ h, ε), which take a step of exactly η (of each block with `per_block`).
On steps with an estimate: `sophia/h_norm`, the L2 norm of h; `sophia/estimate_rows`; and `sophia/estimate_cost`, the
work of the estimate divided by the step's own, which is in `flops` as well.

## When to use it

- `lr` is the largest step of a coordinate. Start slightly below AdamW's rate, or 3 to 5 times Lion's; for GPT-2 sizes
  at AdamW's. The authors' rates: 6e-4 (125M), 7e-4 (355M), 3e-4 (770M), against 6e-4, 3e-4, 2e-4 for AdamW.
- `weight_decay` about twice AdamW's; the authors take 0.2.
- `gamma`: watch `sophia/win_rate`. It should peak early and then stay between 0.1 and 0.5. A larger gamma raises it.
  The authors' values for gauss-newton: 0.05, 0.08, 0.05 for the three sizes; 0.01 for hutchinson.
- `watchers = [{ use = "sophia-health" }]` says so when win_rate has been outside 0.05 to 0.6 for 500 steps.
- When the loss blows up: lower lr a little, or raise gamma.

Memory: two float32 numbers per weight, as AdamW, and two more for a moment in the update. Work on top of a step, with
the defaults: gauss-newton 4 forward passes over half the rows in every tenth step, 7 %; hutchinson 9 over a fifteenth,
2 %. Hutchinson's pass keeps the graph of the backward pass, and so takes more memory for each row.

## Differences

- The published code estimates after the update of steps 10, 20, ..., and makes ten steps with h = 0. We follow the
  paper: before the update of steps 1, 11, ....
- The published code clips ĝ to norm 1 before it squares, which makes h too small whenever the clip bites. We do not
  clip ĝ. The momentum's gradient is clipped by the recipe's `gradient` stages, as there.
- The published code keeps h without B and divides by ρ B h + 1e-15, B a constant of 480 * 1024 tokens. Ours is the same
  with γ = ρ, B in h, and B counted in the rows that were used. Rates mean the same in both.
- The published code estimates on as many new rows as a step has. The paper, and we, use a share of the step's own.
- It has gauss-newton only; levanter has hutchinson only, and corrects the bias of m, which the paper does not.
- Weight decay falls on matrices, and on embedding tables only with `decay_embeddings`.
- Drawing targets and their gradient are two forward passes here, where one would do: objectives stay simple, and the
  price is 1 of 4 passes of an estimate.
- The authors scale attention by 1 / (block + 1) for every optimizer they compare. An optimizer does not touch the model
  here.

## Limits

- gauss-newton needs an objective whose targets can be drawn from the model, with one kind of unit; others are refused.
- hutchinson differentiates twice. Attention then runs by its plain formula, and compiled blocks are refused.
- When an estimate runs out of GPU memory, it is made on half the rows, and stays so; B follows. When not even one row
  fits, the error is raised.
- Rows without a valid target are no estimate: h stays. An estimate that is not finite ends the run before the update.
- Frozen weights, and weights with sparse gradients or none, are passed over and have no state.
- Good settings for models below 30M parameters are not published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, cast, final

import torch
from annotated_types import Interval
from torch import Tensor, nn

from lmworks.core.errors import NonFinite, Problem, UsageError
from lmworks.core.recipe import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from lmworks.data.load import Batch
from lmworks.model.backbone import Backbone
from lmworks.train.optim import Beta, TorchUpdate, parameter_groups
from lmworks.train.probe import Probe
from lmworks.train.slots import Change, Optimizer, State, StepRecord, Update, Watcher, Watching

Directions = Literal["gaussian", "rademacher"]
Share = Annotated[float, Interval(gt=0, le=1)]

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

    def check(self, recipe: Any) -> Iterator[Problem]:
        """An estimator that the objective or the model cannot serve, and a setting without effect."""
        if self.estimator == "gauss-newton":
            if not recipe.objective.predicts:
                text = (
                    "gauss-newton draws targets from the model's own distribution, and this objective predicts none. "
                    'Take estimator = "hutchinson"'
                )
                yield Problem(path="estimator", text=text)
            if self.directions is not None:
                yield Problem(path="directions", text='has no effect without estimator = "hutchinson"')
        elif recipe.compile:
            text = (
                "hutchinson differentiates twice, which compiled blocks cannot. "
                'Take compile = false, or estimator = "gauss-newton"'
            )
            yield Problem(path="estimator", text=text)


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
        if not isinstance(recipe.optimizer, Sophia):
            yield Problem(path="", text='has no effect: it watches optimizer = { use = "sophia" }')


class Clipped(NamedTuple):
    """How many coordinates of one parameter took which step, as scalars on its device."""

    wins: Tensor
    clipped: Tensor
    total: int


@final
class Curved(Update):
    """Asks for an estimate when one is due, then lets SophiaOptimizer step."""

    def __init__(self, settings: Sophia, groups: list[dict[str, Any]]) -> None:
        self._settings = settings
        kind = settings.estimator
        gamma = GAMMA[kind] if settings.gamma is None else settings.gamma
        self._share = SHARE[kind] if settings.share is None else settings.share
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
            self._look(probe)
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

    def _look(self, probe: Probe) -> None:
        """Take an estimate into h, unless no target counts."""
        parameters = self._inner.stepping()
        booked = probe.booked
        rows, found = self._estimate(probe, parameters)
        if found is None:
            return
        if not bool(torch.stack([estimate.isfinite().all() for estimate in found]).all()):
            raise NonFinite(
                f"the {self._settings.estimator} estimate of the curvature is not finite; the update was not made",
                next_step="start anew with a lower rate: --resume never --set optimizer.lr=...",
            )
        norm = self._inner.remember(parameters, found)
        self._own["last_estimate"] = self._own["step"]
        probe.note("sophia/h_norm", norm)
        probe.note("sophia/estimate_rows", rows)
        assert probe.batch is not None, "an estimate has been made on it"
        probe.note("sophia/estimate_cost", (probe.booked - booked) / (3 * probe.batch.tokens_BT.numel()))

    def _estimate(self, probe: Probe, parameters: Sequence[nn.Parameter]) -> tuple[int, list[Tensor] | None]:
        """How many rows were used, and the estimate; on half the rows when memory ends."""
        assert probe.batch is not None, "the step tells the probe its rows"
        rows = max(1, round(self._share * probe.batch.rows))
        rows = min(rows, self._own["most_rows"] or rows)
        while True:
            try:
                batch = spread(probe.batch, rows)
                if self._settings.estimator == "gauss-newton":
                    return rows, gauss_newton(probe, batch, parameters)
                return rows, hutchinson(probe, batch, parameters, self._settings.directions or "gaussian")
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
            rows = self._own["most_rows"] = rows // 2

    def _note(self, probe: Probe) -> None:
        """The shares of coordinates by their step."""
        tally = self._inner.tally
        if not tally:
            return
        whole = _sum(list(tally.values()))
        probe.note("sophia/win_rate", whole.wins / whole.total)
        probe.note("sophia/clipped", whole.clipped / whole.total)
        if self._settings.per_block:
            blocks: dict[str, list[Clipped]] = {}
            for name, counted in tally.items():
                blocks.setdefault(_block(name), []).append(counted)
            for block, parts in blocks.items():
                part = _sum(parts)
                probe.note(f"sophia/clipped/{block}", part.clipped / part.total)


@final
class SophiaOptimizer(torch.optim.Optimizer):
    """m <- b1 m + (1 - b1) g;  w <- (1 - lr wd) w - lr clip(m / max(gamma h, eps), -1, 1);  h as it was remembered."""

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], gamma: float, eps: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self._betas, self._gamma, self._eps = betas, gamma, eps
        self.tally: dict[str, Clipped] = {}
        """Of the last step, by parameter name."""

    def stepping(self) -> list[nn.Parameter]:
        """The parameters that the next step changes."""
        return [p for group in self.param_groups for p in group["params"] if _has_dense_gradient(p)]

    @torch.no_grad()
    def remember(self, parameters: Sequence[nn.Parameter], estimates: Sequence[Tensor]) -> Tensor:
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
                self.tally[name] = Clipped(won, (ratio.abs() >= 1).sum(), ratio.numel())
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
        if side < 0:
            place, advice = f"below {self._settings.low}", "nearly all coordinates are clipped; raise optimizer.gamma"
        else:
            place, advice = f"above {self._settings.high}", "hardly any is clipped; lower optimizer.gamma"
        return Change(
            reason=f"sophia/win_rate has been {place} for {self._settings.patience} steps ({rate:.3f} now): {advice}"
        )

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


def gauss_newton(probe: Probe, batch: Batch, parameters: Sequence[nn.Parameter]) -> list[Tensor] | None:
    """B * (gradient of the mean loss against drawn targets) squared, for each parameter; None when no target counts.

    Raises UsageError when the loss has more than one kind of unit, so that there is no B.
    """
    counts = probe.objective.count(batch)
    if len(counts) != 1:
        raise UsageError(
            f"gauss-newton needs the number of independent terms of the loss, which here are {' + '.join(counts)}",
            where="optimizer.estimator",
            legal="an objective with one kind of unit",
            next_step='--set optimizer.estimator="hutchinson"',
        )
    terms = int(next(iter(counts.values())))
    if terms == 0:
        return None
    gradients = probe.gradients(probe.sampled(batch), parameters)
    return [gradient.to(_wide(gradient)).square() * terms for gradient in gradients]


def hutchinson(
    probe: Probe, batch: Batch, parameters: Sequence[nn.Parameter], directions: Directions
) -> list[Tensor] | None:
    """u * (Hessian of the mean loss times u), for each parameter and random u; None when no unit counts."""
    if not any(int(count) for count in probe.objective.count(batch).values()):
        return None
    vectors = [_direction(p, directions, probe.generator) for p in parameters]
    products = probe.hessian_product(batch, parameters, vectors)
    return [(u * product).to(_wide(product)) for u, product in zip(vectors, products, strict=True)]


def _direction(like: Tensor, directions: Directions, generator: torch.Generator) -> Tensor:
    drawn = torch.empty_like(like)
    if directions == "gaussian":
        return drawn.normal_(generator=generator)
    return drawn.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)


def _wide(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)


def _has_dense_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and parameter.grad.layout == torch.strided


def _sum(parts: list[Clipped]) -> Clipped:
    wins, clipped, totals = zip(*parts, strict=True)
    return Clipped(torch.stack(wins).sum(), torch.stack(clipped).sum(), sum(totals))


def _block(name: str) -> str:
    """'blocks.3' for a weight of a block, else the module's name: 'embed', 'norm', 'head'."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "blocks" else parts[0]
