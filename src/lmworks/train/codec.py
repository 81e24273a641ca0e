"""State of an optimizer that is held coded between steps, and decoded a bucket at a time while it steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from lmworks.core.errors import CheckpointError, NonFinite
from lmworks.parallel.shard import is_divided, like, local
from lmworks.train.optim import TorchUpdate
from lmworks.train.probe import Probe
from lmworks.train.slots import Update

BUCKET = 1 << 24
"""Values whose state is decoded at once; a larger parameter is a bucket of its own."""
SETTINGS = "codec/settings"

Code = dict[str, Tensor]
"""The tensors that stand for one: at least 'codes', in its shape."""


class Codec(ABC):
    """How a state tensor is kept between steps. `order`: 0 for a parameter's first moment, 1 for its second."""

    @abstractmethod
    def encode(self, x: Tensor, order: int) -> Code:
        """What is kept of x (any shape)."""

    @abstractmethod
    def decode(self, code: Code) -> Tensor:
        """x again, in its shape."""

    @abstractmethod
    def spread(self, code: Code) -> Code:
        """The same in tensors of the shape of x alone, which a checkpoint of other ranks can cut."""

    @abstractmethod
    def gathered(self, code: Code) -> Code:
        """What `spread` gave of a tensor that was coded as it is cut here, as it was before."""

    @abstractmethod
    def decode_spread(self, code: Code) -> Tensor:
        """x from any part of what `spread` gave."""

    @abstractmethod
    def settings(self) -> list[float]:
        """What must be the same when codes are taken back."""


@final
class Exact(Codec):
    """Keeps tensors as they are."""

    def encode(self, x: Tensor, order: int) -> Code:
        """x itself."""
        return {"codes": x}

    def decode(self, code: Code) -> Tensor:
        """x itself."""
        return code["codes"]

    def spread(self, code: Code) -> Code:
        """As it is."""
        return code

    def gathered(self, code: Code) -> Code:
        """As it is."""
        return code

    def decode_spread(self, code: Code) -> Tensor:
        """x itself."""
        return code["codes"]

    def settings(self) -> list[float]:
        """None."""
        return []


@final
class CodedUpdate(Update):
    """Another update whose moments are coded between steps; the update itself uses them before they are coded.

    Buckets where the inner one is a plain TorchUpdate; one that looks over all parameters at once is stepped whole.
    """

    def __init__(self, inner: Update, codec: Codec, *, bucket: int = BUCKET) -> None:
        self._inner, self._codec = inner, codec
        self._optimizers = inner.optimizers()
        self._bucket = bucket if isinstance(inner, TorchUpdate) else None
        self._codes: dict[nn.Parameter, dict[str, Code]] = {}

    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """Those of the inner update."""
        return self._optimizers

    def set_lr(self, factor: float) -> float:
        """Set every group's rate to `factor` times its own; returns the first group's rate."""
        return self._inner.set_lr(factor)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self._inner.zero_grad()

    def step(self, probe: Probe) -> None:
        """Decode, step, encode. Raises NonFinite, with nothing changed, for a gradient that is not finite."""
        for name, p in self._named().items():
            if p.grad is not None and not bool(local(p.grad).isfinite().all()):
                raise NonFinite(f"the gradient of {name} is not finite; the update was not made")
        if self._bucket is None:
            parameters = list(self._named().values())
            self._decode(parameters)
            self._inner.step(probe)
            self._encode(parameters)
            return
        for optimizer in self._optimizers:
            self._step_in_buckets(optimizer)

    def _step_in_buckets(self, optimizer: torch.optim.Optimizer) -> None:
        """Show the optimizer one bucket of one group at a time."""
        groups = list(optimizer.param_groups)
        try:
            for group in groups:
                whole = group["params"]
                optimizer.param_groups[:] = [group]
                for part in _buckets(whole, self._bucket or BUCKET):
                    group["params"] = part
                    self._decode(part)
                    optimizer.step()
                    self._encode(part)
                group["params"] = whole
        finally:
            optimizer.param_groups[:] = groups

    def _decode(self, parameters: Sequence[nn.Parameter]) -> None:
        for p in parameters:
            for key, code in self._codes.pop(p, {}).items():
                self._state_of(p)[key] = like(p, self._codec.decode(code))

    def _encode(self, parameters: Sequence[nn.Parameter]) -> None:
        for p in parameters:
            state = self._state_of(p)
            keys = [k for k, x in state.items() if isinstance(x, Tensor) and x.ndim and x.shape == p.shape]
            for key in keys:
                order = int(key in SECOND)
                self._codes.setdefault(p, {})[key] = self._codec.encode(local(state.pop(key)), order)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        for optimizer in self._optimizers:
            if any(parameter is p for group in optimizer.param_groups for p in group["params"]):
                found: dict[str, Any] = optimizer.state[parameter]
                return found
        raise AssertionError("a parameter of no optimizer")

    def _named(self) -> dict[str, nn.Parameter]:
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        return {n: p for group in groups for n, p in zip(group["names"], group["params"], strict=True)}

    def state(self) -> dict[str, Tensor]:
        """Codes under 'parameter name/state name.part', and what is not coded as the inner update has it."""
        found = {**self._inner.state(), SETTINGS: torch.tensor(self._codec.settings(), dtype=torch.float64)}
        for name, p in self._named().items():
            for key, code in self._codes.get(p, {}).items():
                parts = self._codec.spread(code) if is_divided(p) else code
                found |= {f"{name}/{key}.{part}": x for part, x in parts.items()}
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` gave, here or on other ranks. Raises CheckpointError for another codec's."""
        wanted = torch.tensor(self._codec.settings(), dtype=torch.float64)
        if SETTINGS not in state:
            raise _refused("its state is not coded")
        if not torch.equal(state[SETTINGS].cpu(), wanted):
            raise _refused(f"codec settings are {state[SETTINGS].tolist()} there, {wanted.tolist()} here")
        coded: dict[str, dict[str, Code]] = {}
        plain: dict[str, Tensor] = {}
        named = self._named()
        for full, x in state.items():
            name, _, key = full.rpartition("/")
            key, dot, part = key.partition(".")
            if full != SETTINGS and dot:
                if name not in named:
                    raise _refused(f"it holds {name}, which this one does not train")
                coded.setdefault(name, {}).setdefault(key, {})[part] = x.to(named[name].device)
            elif full != SETTINGS:
                plain[full] = x
        decoded = {f"{n}/{k}": self._loaded(named[n], code) for n, c in coded.items() for k, code in c.items()}
        self._inner.load({**plain, **decoded})
        self._codes = {}
        self._encode(list(named.values()))
        for name, codes in coded.items():
            for key, code in codes.items():
                self._keep(named[name], key, code)

    def _loaded(self, parameter: nn.Parameter, code: Code) -> Tensor:
        shape = local(parameter).shape
        if code["codes"].shape != shape:
            raise _refused(f"codes of {list(code['codes'].shape)} for a part of {list(shape)}")
        if all(x.shape == shape for x in code.values()):
            return self._codec.decode_spread(code)
        if is_divided(parameter):
            raise _refused("one rank wrote its codes, and groups cannot be cut for FSDP")
        return self._codec.decode(code)

    def _keep(self, parameter: nn.Parameter, key: str, code: Code) -> None:
        """Put codes back bit by bit where they were cut as here."""
        spread = code["codes"].ndim > 0 and all(x.shape == code["codes"].shape for x in code.values())
        kept = self._codec.gathered(code) if spread else code
        if not spread or all(torch.equal(x.float(), code[n].float()) for n, x in self._codec.spread(kept).items()):
            self._codes[parameter][key] = kept


SECOND = frozenset({"exp_avg_sq", "v", "curvature"})
"""Names of second moments; all other state of a parameter's shape is a first moment."""


def _buckets(parameters: Sequence[nn.Parameter], most: int) -> list[list[nn.Parameter]]:
    found: list[list[nn.Parameter]] = [[]]
    held = 0
    for p in parameters:
        if found[-1] and held + p.numel() > most:
            found.append([])
            held = 0
        found[-1].append(p)
        held += p.numel()
    return found


def _refused(what: str) -> CheckpointError:
    return CheckpointError(
        f"the state is of another optimizer: {what}", next_step="use the optimizer and layout that it was made with"
    )
