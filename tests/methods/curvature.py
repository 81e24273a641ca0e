"""Networks and losses whose curvature is known, and the real step over them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lmworks.data.load import Batch
from lmworks.methods.sophia import Sophia
from lmworks.parallel.apply import whole
from lmworks.train.objective import CrossEntropy
from lmworks.train.probe import Probe
from lmworks.train.slots import Component, Objective, SelectAll, Update
from lmworks.train.step import Step
from tests.train.test_step import Given

KINDS = ["gauss-newton", "hutchinson"]


class Point(nn.Module):
    """Weights of a closed-form loss, by the name of a hidden matrix; as many copies as its first dimension."""

    config = None

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.point = nn.Parameter(start.clone())


@dataclass(frozen=True, kw_only=True)
class Formula(Objective):
    """A loss that is a function of the point alone, the same for every row."""

    function: Any

    def count(self, batch: Batch) -> dict[str, Tensor]:
        return {"rows": torch.tensor(batch.rows)}

    def loss(self, model: Any, batch: Batch, hidden_BTD: Tensor | None = None) -> dict[str, Component]:
        return {"rows": Component(total=batch.rows * self.function(model.point))}


class MLP(nn.Module):
    """Three layers over the features of each token."""

    config = None

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.register_buffer("features_VD", torch.randn(13, 5, dtype=torch.float64))
        self.one = nn.Linear(5, 6, dtype=torch.float64)
        self.two = nn.Linear(6, 7, dtype=torch.float64)
        self.three = nn.Linear(7, 4, dtype=torch.float64)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x = self.features_VD[tokens_BT]
        return self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))


@dataclass(frozen=True, kw_only=True)
class Classify(Objective):
    """Cross-entropy of the logits that the model gives; keeps what it draws."""

    predicts: ClassVar[bool] = True
    drawn: list[Tensor] = field(default_factory=list)

    def count(self, batch: Batch) -> dict[str, Tensor]:
        return {"targets": (batch.targets_BT >= 0).sum()}

    def loss(self, model: Any, batch: Batch, hidden_BTD: Tensor | None = None) -> dict[str, Component]:
        logits = model(batch.tokens_BT).flatten(0, 1)
        total = nn.functional.cross_entropy(logits, batch.targets_BT.flatten(), reduction="sum", ignore_index=-100)
        return {"targets": Component(total=total)}

    @torch.no_grad()
    def sampled(self, model: Any, batch: Batch, generator: torch.Generator) -> Batch:
        probs = torch.softmax(model(batch.tokens_BT), -1).flatten(0, 1)
        drawn = torch.multinomial(probs, 1, generator=generator).view_as(batch.targets_BT)
        targets_BT = torch.where(batch.targets_BT >= 0, drawn, -100)
        self.drawn.append(targets_BT)
        return dataclasses.replace(batch, targets_BT=targets_BT)


class Recording(Probe):
    """A probe that keeps the directions it is asked about."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.asked: list[list[Tensor]] = []

    def hessian_product(self, batch: Batch, parameters: Any, vectors: Any) -> tuple[Tensor, ...]:
        self.asked.append(list(vectors))
        return super().hessian_product(batch, parameters, vectors)


def stepping(
    model: Any, settings: Sophia, batches: list[Batch], objective: Objective | None = None, **over: Any
) -> Step:
    """The real step over the given batches, without clipping of gradients."""
    objective = objective or CrossEntropy()
    micro_rows = over.pop("micro_rows", batches[0].rows)
    parts: dict[str, Any] = {
        "source": Given(batches),
        "selector": SelectAll().start(model, settings, {}),
        "gradient": (),
        "update": settings.build(model),
        "probe": Recording(model, objective, seed=7, micro_rows=micro_rows),
        **over,
    }
    rows = batches[0].rows
    return Step(placement=whole(model), objective=objective, rows=rows, micro_rows=micro_rows, **parts)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def kept(update: Update, what: str) -> dict[str, Tensor]:
    found = {name.rpartition("/"): value.clone() for name, value in update.state().items()}
    return {name: value for (name, _, key), value in found.items() if key == what}


def numbers(model: nn.Module) -> dict[str, Any]:
    return {name: value.numpy() for name, value in values(model).items()}
