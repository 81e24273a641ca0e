"""A model that exists already, as a part of a recipe: shape and first weights come from a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from lmworks.core import catalogue
from lmworks.core.cost import Cost
from lmworks.core.errors import LmworksError, Problem, RecipeError
from lmworks.model.backbone import Backbone
from lmworks.model.checkpoint import Located, ModelConfig, checked, locate
from lmworks.model.gpt2 import rows_too_long
from lmworks.model.pieces import Box
from lmworks.model.sizes import BlockSizes


@final
@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Weights and shape of a Hugging Face folder, a run folder (its newest complete checkpoint) or a checkpoint."""

    path: str
    """The folder."""

    @cached_property
    def _where(self) -> Located:
        return locate(Path(self.path).expanduser())

    @cached_property
    def shape(self) -> ModelConfig:
        """The config of the model that lies there. Raises CheckpointError when it cannot be read."""
        return self._where.config()

    @property
    def tokenizer(self) -> Path:
        """The folder in which its tokenizer lies, if it has one."""
        return self._where.tokenizer

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the files that hold the weights, by name."""
        return self._where.hashes()

    def check(self, recipe: object) -> Iterator[Problem]:
        """A tokenizer of other tokens than the weights know, and rows that are longer than a position table.

        A folder that is not there yet is no problem of the recipe: `build` says so.
        """
        tokenizer = getattr(getattr(recipe, "data", None), "tokenizer", None)
        name = catalogue.name_of(tokenizer) if tokenizer is not None else "file"
        try:
            shape, folder = self.shape, self.tokenizer
        except LmworksError:
            shape, folder = None, Path(self.path)
        if name != "file":
            text = (
                f"data.tokenizer '{name}' makes tokens that these weights have not learned; the model's own is"
                f' data.tokenizer = {{ use = "file", path = "{folder}" }}'
            )
            yield Problem(path="path", text=text)
        rows = dict(shape.shapes()).get("positions.weight") if shape is not None else None
        if rows is not None:
            yield from rows_too_long(recipe, rows[0], path="path")

    @property
    def vocab_size(self) -> int | None:
        """V of the model that lies there."""
        return self.shape.vocab_size

    @property
    def n_layers(self) -> int:
        """L of the model that lies there."""
        return self.shape.n_layers

    @property
    def hidden_size(self) -> int:
        """D of the model that lies there."""
        return self.shape.hidden_size

    @property
    def tied(self) -> bool:
        """Whether its head is the token table."""
        return self.shape.tied

    def blocks(self) -> tuple[BlockSizes, ...]:
        """One entry per block."""
        return self.shape.blocks()

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every parameter."""
        return self.shape.shapes()

    def saved_values_per_token(self, block: BlockSizes) -> int:
        """Values one block keeps per token for the backward pass."""
        return self.shape.saved_values_per_token(block)

    def with_vocab(self, vocab_size: int) -> Pretrained:
        """Itself: the tables stay as they are. Raises RecipeError when the tokenizer has more tokens than the model."""
        have = self.vocab_size or 0
        if vocab_size > have:
            text = f"{self.path} has a vocabulary of {have}, the tokenizer has {vocab_size} tokens; use the model's own"
            raise RecipeError([Problem(path="model.path", text=text)])
        return self

    def cost(self, *, sequence: int, bytes_per_value: int = 4) -> Cost:
        """Parameters, FLOPs and bytes at `sequence` tokens, without building it."""
        return self.shape.cost(sequence=sequence, bytes_per_value=bytes_per_value)

    def build(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        param_dtype: torch.dtype = torch.float32,
    ) -> Backbone:
        """The network without values; `values` has the weights. Its config is the shape's, not this part."""
        return self.shape.build(dtype=dtype, device=device, param_dtype=param_dtype)

    def values(self) -> Callable[[str, Box], Tensor]:
        """(name, box) -> that part of a weight. Raises CheckpointError when the files are damaged."""
        tensors = checked(self._where, dict(self.shape.shapes()))
        return lambda name, box: tensors[name][box.index]
