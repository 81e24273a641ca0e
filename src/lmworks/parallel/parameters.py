"""Models as their optimizers see them: several stages as one, masters in place of weights, names as in the whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from lmworks.model.backbone import Backbone


class Chunks(nn.ModuleList):
    """Several stages of one rank, with the names that their parameters have in the whole model."""

    def __init__(self, chunks: Sequence[Backbone]) -> None:
        super().__init__(chunks)
        self.config = chunks[0].config

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[Any]:
        """As nn.Module's, without the number of the stage."""
        seen: set[int] = set()
        for chunk in self:
            for name, parameter in chunk.named_parameters(prefix, recurse, remove_duplicate):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield name, parameter

    def get_parameter(self, target: str) -> nn.Parameter:
        """A parameter by its name in the whole model."""
        found: nn.Parameter = dict(self.named_parameters())[target]
        return found


class Masters(nn.Module):
    """A model as its optimizer sees it: the masters, and under it what is not trained. Asked for parameters only."""

    def __init__(self, beneath: nn.Module, masters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.beneath = beneath
        self.config = beneath.config
        self._masters = dict(masters)

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[Any]:
        """As nn.Module's, by the names of the weights."""
        for name, parameter in self.beneath.named_parameters(prefix, recurse, remove_duplicate):
            yield name, self._masters.get(name, parameter)

    def get_parameter(self, target: str) -> nn.Parameter:
        """A parameter by its name in the whole model."""
        return self._masters[target] if target in self._masters else self.beneath.get_parameter(target)
