"""Plain optimizers. Each is a part whose settings build an `Update` over named parameter groups.

Weight decay is decoupled and falls on matrices only: norms and biases are never decayed, embedding tables only when
asked for.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, final

import torch
from annotated_types import Interval
from torch import Tensor, nn

from lmworks.core.errors import CheckpointError, Problem
from lmworks.core.recipe import NonNegativeFloat, PositiveFloat
from lmworks.model.backbone import Backbone
from lmworks.parallel.shard import is_divided, like
from lmworks.train.probe import Probe
from lmworks.train.slots import Optimizer, Update

Beta = Annotated[float, Interval(ge=0, lt=1)]
Named = list[tuple[str, nn.Parameter]]

EMBEDDINGS = ("embed.", "positions.")
"""Name prefixes of tables that are looked up by index."""


def values_of(shapes: Iterable[Sequence[int]]) -> int:
    """How many values tensors of these shapes have."""
    return sum(math.prod(shape) for shape in shapes)


def parameter_groups(model: nn.Module, weight_decay: float, *, decay_embeddings: bool) -> list[dict[str, Any]]:
    """The trainable parameters in two groups, decayed and not, each with 'params', 'names' and 'weight_decay'.

    Where FSDP divides some parameters and not others (experts), each kind has groups of its own: a kernel takes one.
    """
    decayed: Named = []
    plain: Named = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_table = name.startswith(EMBEDDINGS)
            (decayed if parameter.ndim >= 2 and (decay_embeddings or not is_table) else plain).append((name, parameter))
    groups = [_group(decayed, weight_decay), _group(plain, 0.0)]
    return [part for group in groups for part in _of_one_kind(group)]


def _of_one_kind(group: dict[str, Any]) -> list[dict[str, Any]]:
    """The group, or two where it has both plain and divided parameters."""
    named = list(zip(group["names"], group["params"], strict=True))
    kinds = [[(n, p) for n, p in named if is_divided(p) is kind] for kind in (False, True)]
    if not all(kinds):
        return [group]
    return [_group(kind, group["weight_decay"]) for kind in kinds]


def _group(named: Named, weight_decay: float) -> dict[str, Any]:
    return {"params": [p for _, p in named], "names": [n for n, _ in named], "weight_decay": weight_decay}


@final
class TorchUpdate(Update):
    """One or more torch optimizers that step together, with state addressed by parameter name."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = list(optimizers)
        self._groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group in self._groups:
            group["base_lr"] = group["lr"]

    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """All of them."""
        return self._optimizers

    def set_lr(self, factor: float) -> float:
        """Set every group's rate to `factor` times its own; returns the first group's rate."""
        for group in self._groups:
            group["lr"] = group["base_lr"] * factor
        return float(self._groups[0]["lr"])

    def step(self, probe: Probe) -> None:
        """One update of every optimizer."""
        for optimizer in self._optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """All state tensors under 'parameter name/state name'."""
        return {
            f"{name}/{key}": value
            for optimizer, name, parameter in self._parameters()
            for key, value in optimizer.state.get(parameter, {}).items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` gave, of a divided parameter this rank's part; tensors go to the parameter's device.

        Raises CheckpointError for names that this optimizer does not keep, and for those that it keeps and misses.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for full, value in state.items():
            name, _, key = full.rpartition("/")
            found.setdefault(name, {})[key] = value
        for optimizer, name, parameter in self._parameters():
            kept = found.pop(name, {})
            wanted = _state_names(optimizer)
            if wanted is not None and set(kept) != wanted:
                raise _other_state(f"{name} has {_listed(kept)} there, this one keeps {_listed(wanted)}")
            if kept:
                counts_there = bool(optimizer.defaults.get("fused"))  # torch's fused kernels read `step` on the device
                optimizer.state[parameter] = {
                    key: _placed(value, parameter, counts_there=counts_there) for key, value in kept.items()
                }
        if found:
            raise _other_state(f"it holds {_listed(found)}, which this one does not train")

    def _parameters(self) -> Iterable[tuple[torch.optim.Optimizer, str, nn.Parameter]]:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for name, parameter in zip(group["names"], group["params"], strict=True):
                    yield optimizer, name, parameter


def _placed(value: Tensor, parameter: nn.Parameter, *, counts_there: bool) -> Tensor:
    """A state tensor where the optimizer wants it: beside its parameter, but for counts that stay on the CPU."""
    if value.ndim == 0:
        return value.to(parameter.device) if counts_there else value
    return like(parameter, value.to(parameter.device))


def _state_names(optimizer: torch.optim.Optimizer) -> set[str] | None:
    """What an optimizer keeps of each parameter once it has stepped; None where that is not known here."""
    if isinstance(optimizer, torch.optim.AdamW):
        return {"step", "exp_avg", "exp_avg_sq"}
    if isinstance(optimizer, torch.optim.SGD):
        return {"momentum_buffer"} if optimizer.defaults["momentum"] else set()
    if isinstance(optimizer, LionOptimizer):
        return {"momentum"}
    return {"momentum_buffer"} if isinstance(optimizer, torch.optim.Muon) else None


def _other_state(what: str) -> CheckpointError:
    return CheckpointError(
        f"the state is of another optimizer: {what}", next_step="use the optimizer that it was made with"
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:6]) or "nothing"


@dataclass(frozen=True, kw_only=True)
class PlainOptimizer(Optimizer):
    """What the plain optimizers share: a rate, decoupled weight decay, and which tables it falls on."""

    lr: PositiveFloat
    """Peak learning rate; the schedule multiplies it."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay on matrices."""
    decay_embeddings: bool = False
    """Whether token and position tables are decayed as well."""

    def build(self, model: Backbone) -> Update:
        """The running optimizer over the model's trainable parameters."""
        groups = parameter_groups(model, self.weight_decay, decay_embeddings=self.decay_embeddings)
        return TorchUpdate(self.optimizers([group for group in groups if group["params"]]))

    @abstractmethod
    def optimizers(self, groups: list[dict[str, Any]]) -> list[torch.optim.Optimizer]:
        """The torch optimizers that share the groups."""


@final
@dataclass(frozen=True, kw_only=True)
class AdamW(PlainOptimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019), torch's fused kernel on CPU and GPU."""

    value_by_value: ClassVar[bool] = True
    """No value looks at another."""

    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""

    def optimizers(self, groups: list[dict[str, Any]]) -> list[torch.optim.Optimizer]:
        """torch.optim.AdamW over all groups."""
        return [torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)]

    def state_bytes(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Two moments, and a count of each parameter's steps."""
        return 8 * values_of(shapes.values()) + 4 * len(shapes)


@final
@dataclass(frozen=True, kw_only=True)
class SGD(PlainOptimizer):
    """Gradient descent with momentum, torch's."""

    value_by_value: ClassVar[bool] = True
    """No value looks at another."""

    weight_decay: NonNegativeFloat = 0.1
    """Times the weight, added to the gradient of matrices (coupled, as torch has it): momentum carries it on."""
    momentum: Beta = 0.9
    """Decay of the momentum buffer; 0 for none."""
    nesterov: bool = False
    """Look ahead along the momentum."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Nesterov's form looks along a momentum, so there must be one."""
        if self.nesterov and self.momentum == 0:
            yield Problem(
                path="nesterov", text="looks along the momentum, which is 0; set momentum, for example to 0.9"
            )

    def optimizers(self, groups: list[dict[str, Any]]) -> list[torch.optim.Optimizer]:
        """torch.optim.SGD over all groups."""
        return [torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, fused=True)]

    def state_bytes(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """The momentum, where there is one."""
        return 4 * values_of(shapes.values()) if self.momentum else 0


@final
@dataclass(frozen=True, kw_only=True)
class Lion(PlainOptimizer):
    """Sign of an interpolated momentum (Chen et al., 2023). Takes a 3 to 10 times smaller rate than AdamW."""

    value_by_value: ClassVar[bool] = True
    """No value looks at another."""

    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """Interpolation for the update, decay of the momentum."""

    def optimizers(self, groups: list[dict[str, Any]]) -> list[torch.optim.Optimizer]:
        """Our own Lion over all groups."""
        return [LionOptimizer(groups, lr=self.lr, betas=self.betas)]

    def state_bytes(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """The momentum."""
        return 4 * values_of(shapes.values())


@final
class LionOptimizer(torch.optim.Optimizer):
    """w <- (1 - lr * wd) * w - lr * sign(b1 * m + (1 - b1) * g);  m <- b2 * m + (1 - b2) * g."""

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # torch types a closure's loss
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for p in parameters:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            gradients = [p.grad for p in parameters]
            momenta = [self.state[p]["momentum"] for p in parameters]
            first, second = group["betas"]
            directions = torch._foreach_lerp(gradients, momenta, first)
            torch._foreach_sign_(directions)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, directions, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, gradients, 1 - second)


@final
@dataclass(frozen=True, kw_only=True)
class Muon(PlainOptimizer):
    """Orthogonalised momentum for hidden matrices (Jordan et al., 2024), AdamW for tables, head, norms and biases.

    The orthogonal update is scaled to AdamW's usual size (0.2 times the root of the longer side; Liu et al., 2025), so
    that one learning rate and one weight decay serve both.
    """

    momentum: Beta = 0.95
    """Decay of the momentum that is orthogonalised (Nesterov form)."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's betas for everything that is not a hidden matrix."""
    eps: PositiveFloat = 1e-8
    """AdamW's eps."""

    def optimizers(self, groups: list[dict[str, Any]]) -> list[torch.optim.Optimizer]:
        """torch.optim.Muon over hidden matrices, torch.optim.AdamW over the rest."""
        hidden, rest = [], []
        for group in groups:
            named = list(zip(group["names"], group["params"], strict=True))
            matrices = [(n, p) for n, p in named if p.ndim == 2 and n.startswith("blocks.")]
            others = [(n, p) for n, p in named if not (p.ndim == 2 and n.startswith("blocks."))]
            hidden += [_group(matrices, group["weight_decay"])] if matrices else []
            rest += [_group(others, group["weight_decay"])] if others else []
        found: list[torch.optim.Optimizer] = []
        if hidden:
            muon = torch.optim.Muon(hidden, lr=self.lr, momentum=self.momentum, adjust_lr_fn="match_rms_adamw")
            found.append(muon)
        if rest:
            found.append(torch.optim.AdamW(rest, lr=self.lr, betas=self.betas, eps=self.eps, fused=True))
        return found

    def state_bytes(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """A momentum of each hidden matrix, AdamW's state of the rest."""
        hidden = {name for name, shape in shapes.items() if len(shape) == 2 and name.startswith("blocks.")}
        rest = [shape for name, shape in shapes.items() if name not in hidden]
        return 4 * values_of(shapes[name] for name in hidden) + 8 * values_of(rest) + 4 * len(rest)
