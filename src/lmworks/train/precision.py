"""What a recipe's `precision` means: the type that activations have, and products in float8 on top of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from lmworks.core.errors import Problem, RecipeError
from lmworks.core.need import must_be_there
from lmworks.generate.writer import DTYPES
from lmworks.model import float8
from lmworks.model.backbone import Backbone
from lmworks.model.layers import Linear

SCALES: Final[dict[str, float8.Scales]] = {"float8": "tensorwise", "float8-rowwise": "rowwise"}
"""Precisions whose products are in float8, and what has a scale there."""
CAPABILITY = (8, 9)
"""Compute capability of GPUs from which they multiply eight-bit floats."""


def compute_dtype(precision: str) -> torch.dtype:
    """The type of activations, and of every product that is not in float8."""
    return DTYPES["bf16" if precision in SCALES else precision]


def problems_of(recipe: Any) -> list[Problem]:
    """Why a settled recipe cannot have its precision on this machine. Raises MissingExtra."""
    if recipe.precision not in SCALES:
        return []
    must_be_there("torchao", extra="gpu", why=f"precision = '{recipe.precision}'")
    problems = []
    if recipe.device == "cuda" and (found := torch.cuda.get_device_capability()) < CAPABILITY:
        text = f"this GPU has no products for eight-bit floats: compute capability {found[0]}.{found[1]}, needed 8.9"
        problems.append(Problem(path="precision", text=f"{text}. Legal: bf16, fp32, auto"))
    ranks, length = recipe.layout.cp, recipe.data.sequence_length
    if length % (ranks * float8.MULTIPLE):
        of_ranks = f" and {ranks} ranks of cp" if ranks > 1 else ""
        step = ranks * float8.MULTIPLE
        text = f"is {length}; with products in float8{of_ranks} it is a multiple of {step}: {-(-length // step) * step}"
        problems.append(Problem(path="data.sequence_length", text=text))
    return problems


def arrange(model: Backbone, precision: str) -> list[str]:
    """Put products in float8 into a model where that is its precision; what people should know about it.

    Raises RecipeError where none of its products fits.
    """
    if precision not in SCALES:
        return []
    blocks = model.get_submodule("blocks")
    all_of_them = sum(isinstance(module, Linear) for module in blocks.modules())
    left = float8.use_float8(model, SCALES[precision])
    if len(left) == all_of_them:
        text = "has no effect: float8 takes matrices whose sizes are multiples of 16, and these blocks have none"
        raise RecipeError([Problem(path="precision", text=text)])
    told = [f"these stay in bf16, their sizes are no multiples of 16: {_shortened(left)}"] if left else []
    if getattr(model.config, "experts", None) is not None:
        told.append("experts and routers stay in bf16; the other products of the blocks are in float8")
    return told


def _shortened(names: Sequence[str], most: int = 7) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
