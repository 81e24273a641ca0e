"""Moments of any optimizer in eight-bit floats, by groups with dynamic range expansion."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from lmworks.core.errors import Problem, UsageError
from lmworks.core.recipe import PositiveFloat, PositiveInt
from lmworks.maths.expansion import Expanded, decoded, encode
from lmworks.maths.float8 import FORMATS
from lmworks.model.backbone import Backbone
from lmworks.train.codec import Code, CodedUpdate, Codec
from lmworks.train.slots import Optimizer, Update

FormatName = Literal["e4m3", "e5m2"]


@final
@dataclass(frozen=True, kw_only=True)
class Coat(Optimizer):
    """Another optimizer with its moments in eight bits between steps (Xi et al., 2024)."""

    around: Optimizer
    """The optimizer whose moments are coded."""
    first: FormatName = "e4m3"
    """Format of first moments."""
    second: FormatName = "e4m3"
    """Format of second moments, of curvature too."""
    group: PositiveInt = 128
    """Values that share a scale, an exponent and a centre."""
    expand: bool = True
    """Stretch each group over the format's range; false: a scale alone."""
    floor: PositiveFloat | None = None
    """The least exponent; 1 forbids that wide groups are compressed. Left out: none."""

    @property
    def value_by_value(self) -> bool:  # type: ignore[override]  # a class's own elsewhere; here it is the inner one's
        """As the optimizer inside."""
        return self.around.value_by_value

    def build(self, model: Backbone) -> Update:
        """The running optimizer. Raises UsageError for weights that are not float32 (or float64)."""
        for name, p in model.named_parameters():
            if p.requires_grad and p.dtype not in (torch.float32, torch.float64):
                raise UsageError(f"{name} is {p.dtype}; coded moments need weights in float32", where="optimizer")
        return CodedUpdate(self.around.build(model), Eight(self))

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Coded twice, a floor without effect, and axes that divide tensors unseen by the optimizer."""
        if isinstance(self.around, Coat):
            yield Problem(path="around", text="is coat again: moments are coded once")
        if self.floor is not None and not self.expand:
            yield Problem(path="floor", text="has no effect with expand = false")
        for axis in ("tp", "ep"):
            if getattr(recipe.layout, axis, 1) > 1:
                yield Problem(path="", text=f"cannot save codes of tensors that {axis} divides; take layout.{axis} = 1")


@final
class Eight(Codec):
    """Codes with scale, exponent and centre by group."""

    def __init__(self, settings: Coat) -> None:
        self._settings = settings
        self._forms = FORMATS[settings.first], FORMATS[settings.second]

    def encode(self, x: Tensor, order: int) -> Code:
        """Codes of the shape of x, and three float32 vectors."""
        own = self._settings
        found = encode(x, self._forms[order], group=own.group, expand=own.expand, floor=own.floor)
        return {"codes": found.codes, "scale": found.scale, "exponent": found.exponent, "centre": found.centre}

    def decode(self, code: Code) -> Tensor:
        """float32 values."""
        return Expanded(**code).decode(self._settings.group)

    def spread(self, code: Code) -> Code:
        """Scale, exponent and centre for each value."""
        size, shape, group = code["codes"].numel(), code["codes"].shape, self._settings.group
        wide = {k: x.repeat_interleave(group)[:size].view(shape) for k, x in code.items() if k != "codes"}
        return {"codes": code["codes"], **wide}

    def gathered(self, code: Code) -> Code:
        """One of each group again."""
        group = self._settings.group
        return {k: x if k == "codes" else x.flatten()[::group].clone() for k, x in code.items()}

    def decode_spread(self, code: Code) -> Tensor:
        """float32 values."""
        return decoded(code["codes"].float(), code["scale"], code["exponent"], code["centre"])

    def settings(self) -> list[float]:
        """Bits of both formats, group, expansion and floor."""
        own = self._settings
        return [float(own.first == "e5m2"), float(own.second == "e5m2"), own.group, own.expand, own.floor or 0.0]
