"""CoLM from its formulas, slowly: greedy search over all rows at each turn, proxies by writing into a copied model.

Nothing of lmworks.methods.colm is used. Proxies and moments are NumPy, float64.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmworks.data.load import Batch
from lmworks.model.backbone import Backbone

Matrix = NDArray[np.float64]


def worth(similarity: Matrix, chosen: Sequence[int]) -> float:
    """Sum over rows of the similarity to the nearest chosen row."""
    return float(sum(max(similarity[i, j] for j in chosen) for i in range(len(similarity)))) if chosen else 0.0


def best(similarity: Matrix, count: int) -> float:
    """The largest worth of any `count` rows, by trying all."""
    return max(worth(similarity, chosen) for chosen in itertools.combinations(range(len(similarity)), count))


def greedy(similarity: Matrix, count: int) -> list[int]:
    """At each turn the row that adds most; of equal ones the first."""
    nearest, chosen = np.zeros(len(similarity)), []
    for _ in range(count):
        gains = [
            -np.inf if j in chosen else float(np.maximum(similarity[:, j] - nearest, 0.0).sum())
            for j in range(len(similarity))
        ]
        chosen.append(gains.index(max(gains)))
        nearest = np.maximum(nearest, similarity[:, chosen[-1]])
    return chosen


def budgets(counts: Sequence[int], total: int) -> list[int]:
    """Shares rounded down; then a row each to the smallest budgets that have rows left, round by round."""
    given = [int(n * total / sum(counts) + 1e-12) if sum(counts) else 0 for n in counts]
    order = sorted(range(len(counts)), key=lambda i: (given[i], i))
    while sum(given) < total:
        for i in order:
            if sum(given) < total and given[i] < counts[i]:
                given[i] += 1
        order = sorted(range(len(counts)), key=lambda i: (given[i], i))
    return given


class Moments:
    """Adam's moments of the proxies."""

    def __init__(self, size: int, betas: tuple[float, float], eps: float) -> None:
        self.m, self.v, self.t = np.zeros(size), np.zeros(size), 0
        self.betas, self.eps = betas, eps

    def alone(self, g: Matrix) -> tuple[Matrix, Matrix]:
        """The moments after this gradient alone."""
        b1, b2 = self.betas
        return b1 * self.m + (1 - b1) * g, b2 * self.v + (1 - b2) * g**2

    def direction(self, g: Matrix) -> Matrix:
        """Adam's update after this gradient alone, without the rate."""
        m, v = self.alone(g)
        t = self.t + 1
        result: Matrix = (m / (1 - self.betas[0] ** t)) / (np.sqrt(v / (1 - self.betas[1] ** t)) + self.eps)
        return result

    def take(self, gradients: Sequence[Matrix]) -> None:
        """The mean over the chosen rows."""
        after = [self.alone(g) for g in gradients]
        self.m = np.mean([m for m, _ in after], axis=0)
        self.v = np.mean([v for _, v in after], axis=0)
        self.t += 1


def select(
    gradients: Matrix, sources: Sequence[int], keep: set[int], rows: int, moments: Moments, coordinates: int
) -> tuple[list[int], dict[int, int]]:
    """The rows of one step, ascending, and the cluster size of each medoid. Updates the moments."""
    kept = [i for i, s in enumerate(sources) if s in keep]
    if len(kept) >= rows:
        return kept[:rows], {}
    large = sorted(set(sources) - keep)
    groups = [[i for i, s in enumerate(sources) if s == c] for c in large]
    chosen: list[int] = []
    clusters: dict[int, int] = {}
    for group, count in zip(groups, budgets([len(g) for g in groups], rows - len(kept)), strict=True):
        a = np.stack([moments.direction(gradients[i]) for i in group])
        places = np.argsort(-np.abs(a.mean(0)), kind="stable")[:coordinates]
        distance = np.abs(a[:, None, places] - a[None, :, places]).sum(-1)
        found = greedy(distance.max() - distance, count)
        for i in range(len(group)):
            if found:
                owner = i if i in found else min(found, key=lambda j: (distance[i, j], found.index(j)))
                clusters[group[owner]] = clusters.get(group[owner], 0) + 1
        chosen += [group[j] for j in found]
    moments.take([gradients[i] for i in chosen])
    return sorted(kept + chosen), clusters


def row_loss(model: Backbone, batch: Batch, row: int) -> Tensor:
    """Mean cross-entropy of one row's valid targets, from whole logits."""
    one = batch[slice(row, row + 1)]
    hidden = model(one.tokens_BT, positions_BT=one.positions_BT, documents_BT=one.documents_BT)
    return torch.nn.functional.cross_entropy((hidden @ model.head_weight().T)[0], one.targets_BT[0], ignore_index=-100)


def gradient(model: Backbone, batch: Batch, row: int, name: str) -> Tensor:
    """The gradient of one row's loss for one parameter."""
    (found,) = torch.autograd.grad(row_loss(model, batch, row), [model.get_parameter(name)])
    return found


def slope(model: Backbone, batch: Batch, row: int, name: str, direction: Tensor, epsilon: float) -> float:
    """(L(W + e z) - L(W - e z)) / 2e by writing into a copy."""
    sides = []
    for sign in (1, -1):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_parameter(name).add_(direction, alpha=sign * epsilon)
            sides.append(float(row_loss(other, batch, row)))
    return (sides[0] - sides[1]) / (2 * epsilon)
