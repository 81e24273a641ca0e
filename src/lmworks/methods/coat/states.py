"""Moments of any optimizer in eight-bit floats, by groups with dynamic range expansion."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, final

import torch
from torch import Tensor

from lmworks.core.errors import Problem, UsageError
from lmworks.core.recipe import PositiveFloat, PositiveInt, Slot
from lmworks.maths.expansion import decoded, encode
from lmworks.maths.float8 import FORMATS
from lmworks.model.backbone import Backbone
from lmworks.train.codec import Code, Codec, CodedUpdate
from lmworks.train.optim import PlainOptimizer
from lmworks.train.slots import Optimizer, Update

FormatName = Literal["e4m3", "e5m2"]


@final
@dataclass(frozen=True, kw_only=True)
class Coat(Optimizer):
    """Another optimizer with its moments in eight bits between steps (Xi et al., 2024)."""

    around: Annotated[Optimizer, Slot("optimizer")]
    """The optimizer whose moments are coded."""
    first: FormatName = "e4m3"
    """Format of first moments."""
    second: FormatName = "e4m3"
    """Format of second moments, and of curvature."""
    group: PositiveInt = 128
    """Values that share a scale, an exponent and a centre."""
    expand: bool = True
    """Stretch each group over the format's range; false: a scale alone."""
    floor: PositiveFloat | None = None
    """The least exponent; 1 forbids that wide groups are compressed. Left out: none."""
    shadow: bool = False
    """Carry exact moments beside, and write how far the coded ones are from them (`codec/..._error`): for measurements.
    Costs what the codes save, and a second update; `state_bytes` leaves it out."""

    def core(self) -> Optimizer:
        """The optimizer inside."""
        return self.around.core()

    def state_bytes(self, shapes: Mapping[str, Sequence[int]]) -> int | None:
        """Codes and vectors in the place of each moment of the optimizer inside, and what else that one keeps."""
        inner = self.around.state_bytes(shapes)
        if inner is None:
            return None
        vectors = 4 * (3 if self.expand else 1)
        for name, shape in shapes.items():
            values, many = math.prod(shape), (1024,) * len(shape)
            moments = (self.around.state_bytes({name: many}) or 0) // (4 * math.prod(many))
            inner += moments * (values + vectors * -(-values // self.group) - 4 * values)
        return inner

    def build(self, model: Backbone) -> Update:
        """The running optimizer. Raises UsageError for weights that are not float32 (or float64)."""
        for name, p in model.named_parameters():
            if p.requires_grad and p.dtype not in (torch.float32, torch.float64):
                raise UsageError(
                    f"{name} is {p.dtype}; weights whose moments are coded must be float32, or small updates are lost",
                    where="optimizer",
                )
        return CodedUpdate(self.around.build(model), Eight(self), shadow=self.shadow)

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Coded twice, settings without effect, and optimizers that have no exact moments to go along."""
        if isinstance(self.around, Coat):
            yield Problem(path="around", text="is coat again: moments are coded once")
        if self.floor is not None and not self.expand:
            yield Problem(path="floor", text="has no effect with expand = false")
        if self.shadow and not isinstance(self.around, PlainOptimizer):
            yield Problem(path="shadow", text="works with adamw, sgd, lion and muon, whose steps can be made twice")
        if self.group % 16:
            up = -(-self.group // 16) * 16
            yield Problem(
                path="group", text=f"{self.group} is no multiple of 16: few tensors' rows would fit; take {up}"
            )


@final
class Eight(Codec):
    """Codes with scale, exponent and centre by group."""

    def __init__(self, settings: Coat) -> None:
        self._settings = settings
        self._forms = FORMATS[settings.first], FORMATS[settings.second]
        self.group = settings.group

    def encode(self, x: Tensor, order: int) -> Code:
        """Codes of the shape of x, and float32 vectors: the scale, and with expansion exponent and centre."""
        own = self._settings
        found = encode(x, self._forms[order], group=own.group, expand=own.expand, floor=own.floor)
        code = {"codes": found.codes, "scale": found.scale}
        return code | ({"exponent": found.exponent, "centre": found.centre} if own.expand else {})

    def decode(self, codes: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """float32 values."""
        if not self._settings.expand:
            return codes.float() * vectors["scale"]
        return decoded(codes.float(), vectors["scale"], vectors["exponent"], vectors["centre"])

    def settings(self) -> list[float]:
        """Both formats, group, expansion and floor."""
        own = self._settings
        return [float(own.first == "e5m2"), float(own.second == "e5m2"), own.group, own.expand, own.floor or 0.0]
