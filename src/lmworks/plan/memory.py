"""What a rank of a layout takes in memory: told from sizes, corrected by what was measured, or guessed by a network.

Weights, gradients and optimizer state are exact; what waits for the backward pass is told by the policy of blocks and
the micro-batches under way, min(p - rank, m) of them under 1F1B (`parallel.footprint`). What the allocator takes beyond
is a rule of thumb there, so two numbers are fitted to measured runs:

    bytes = known + factor (saved + logits + workspace) + constant

Pipette's own way is a network on eleven numbers of a run. It knows nothing but its runs, and is here to be compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, final

import numpy as np
import torch
from torch import nn

from lmworks.core.errors import UsageError
from lmworks.parallel.footprint import Footprint, MicroBatch, predict
from lmworks.parallel.layout import Layout

PULL = 1e-3
"""How much a factor of 1 and a constant of 0 weigh against a run, in squared relative errors."""
SCALE = 2.0**30
"""Bytes that a constant is counted in, so that both numbers are pulled alike."""


def heaviest(recipe: Any, layout: Layout, *, vocabulary: int) -> tuple[int, Footprint]:
    """The first rank that takes most, and what it takes. The pipeline's places differ, those of other axes do not.

    `vocabulary`: rows of the token table. Raises UsageError where a class of memory cannot be told beforehand, as with
    compiled blocks.
    """
    stride = layout.ranks // layout.pp
    ranks = [place * stride for place in _places(recipe, layout, vocabulary)]
    found = [(rank, predict(recipe, layout, rank, vocabulary=vocabulary)) for rank in ranks]
    unknown = sorted({name for _, told in found for name, size in told.by_class().items() if size is None})
    if unknown:
        text = f"nobody can tell {', '.join(unknown)} of this recipe before it runs"
        raise UsageError(text, where="memory", legal="compile = false, and a saved policy that tells what it holds")
    return max(found, key=lambda pair: (pair[1].total, -pair[0]))


def _places(recipe: Any, layout: Layout, vocabulary: int) -> Sequence[int]:
    """Places of the pipeline of which one takes most. Where blocks and what they keep are alike the first one has the
    most of them, and most micro-batches under way; the last one has the head."""
    plain = layout.schedule in ("gpipe", "1f1b") and layout.split is None
    if layout.pp <= 2 or not plain or len(set(recipe.model.blocks())) > 1:
        return range(layout.pp)
    shape = getattr(recipe.model, "shape", recipe.model)
    shape = shape if shape.vocab_size is not None else shape.with_vocab(vocabulary)
    first = MicroBatch.of(recipe, layout, shape, None).block(0)
    held = recipe.saved.held([dataclasses.replace(first, number=number) for number in range(shape.n_layers)])
    alike = held is not None and len({(block.waiting, block.working) for block in held}) == 1
    return (0, layout.pp - 1) if alike else range(layout.pp)


@final
@dataclass(frozen=True, kw_only=True)
class Correction:
    """What runs took beside what was told."""

    factor: float = 1.0
    """Of what waits for the backward pass, logits and workspace."""
    constant: float = 0.0
    """Bytes that each rank takes besides: a context, buffers of communication."""

    def bytes(self, told: Footprint) -> float:
        """Of a rank, corrected."""
        known, rest = _parts(told)
        return known + self.factor * rest + self.constant


def _parts(told: Footprint) -> tuple[float, float]:
    """What is exact, and what is not."""
    known = float(sum(size or 0 for size in (told.weights, told.gradients, told.optimizer)))
    return known, told.total - known


def fit(runs: Sequence[tuple[Footprint, float]]) -> Correction:
    """The correction of least squared relative error over runs, each what was told and the bytes that it took.

    Pulled a little towards none, so that a single run decides nothing that it does not show.
    """
    rows, wanted = [[PULL**0.5, 0.0], [0.0, PULL**0.5]], [PULL**0.5, 0.0]
    for told, took in runs:
        if not took > 0:
            raise UsageError(f"a run that took {took} bytes", where="memory", legal="more than 0")
        known, rest = _parts(told)
        rows.append([rest / took, SCALE / took])
        wanted.append(1.0 - known / took)
    factor, constant = np.linalg.lstsq(np.array(rows), np.array(wanted), rcond=None)[0]
    return Correction(factor=float(factor), constant=float(constant) * SCALE)


def errors(runs: Sequence[tuple[Footprint, float]], bytes_of: Callable[[Footprint], float]) -> list[float]:
    """Of each run, what an estimator says over what it took, less 1."""
    return [bytes_of(told) / took - 1 for told, took in runs]


# --- the network of the paper -----------------------------------------------------------------------------------------

FEATURES = ("gpus", "layers", "hidden", "heads", "tp", "pp", "dp", "layers_per_stage", "micro_batch", "batch", "rows")
"""What the network sees; `rows` is the batch over dp."""
WIDTHS = (64, 48, 24, 12)
BATCH, RATE, EPOCHS, STEPS_DOWN = 32, 0.1, 5000, 5
"""Runs of an update; Adam's rate, which falls to a tenth after each fifth of the epochs."""


def features(recipe: Any, layout: Layout) -> list[float]:
    """The eleven numbers of a recipe under a settled layout."""
    shape = getattr(recipe.model, "shape", recipe.model)
    data = layout.size("batch")
    rows = recipe.batch_size / data
    heads = shape.blocks()[0].n_heads
    micro = min(recipe.micro_batch_size or rows, rows)
    per_stage = shape.n_layers / layout.stages
    sizes = (layout.ranks, shape.n_layers, shape.hidden_size, heads, layout.tp, layout.pp, data)
    return [float(value) for value in (*sizes, per_stage, micro, recipe.batch_size, rows)]


class Network:
    """The paper's estimator of peak memory: inputs scaled to mean 0 and deviation 1, four layers of ReLU, in MB."""

    def __init__(
        self, runs_RF: np.ndarray[Any, Any], bytes_R: np.ndarray[Any, Any], *, seed: int, epochs: int = EPOCHS
    ):
        """Fit it to R runs of F features and the bytes that each took."""
        x_RF = torch.tensor(runs_RF, dtype=torch.float32)
        spread_F = x_RF.std(0, correction=0)
        self._mean_F, self._spread_F = x_RF.mean(0), torch.where(spread_F > 0, spread_F, torch.ones_like(spread_F))
        y_R1 = torch.tensor(bytes_R, dtype=torch.float32)[:, None] / 1e6
        widths = (x_RF.shape[1], *WIDTHS, 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers: list[nn.Module] = []
            for narrow, wide in pairwise(widths):
                layers += [nn.Linear(narrow, wide), nn.ReLU()]
            self._net = nn.Sequential(*layers[:-1])
            self._train((x_RF - self._mean_F) / self._spread_F, y_R1, epochs)

    def _train(self, x_RF: torch.Tensor, y_R1: torch.Tensor, epochs: int) -> None:
        optimizer = torch.optim.Adam(self._net.parameters(), lr=RATE)
        falling = torch.optim.lr_scheduler.StepLR(optimizer, step_size=max(1, epochs // STEPS_DOWN), gamma=0.1)
        for _ in range(epochs):
            for some in torch.split(torch.randperm(len(x_RF)), BATCH):
                loss = nn.functional.mse_loss(self._net(x_RF[some]), y_R1[some])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
            falling.step()

    def bytes(self, run_F: Sequence[float]) -> float:
        """That a run of these features takes, as it guesses."""
        x_1F = (torch.tensor([list(run_F)], dtype=torch.float32) - self._mean_F) / self._spread_F
        with torch.no_grad():
            return float(self._net(x_1F)) * 1e6
