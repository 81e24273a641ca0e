"""What stands for a row's gradient: zeroth-order estimates for one matrix of the last block, and Adam's view of them.

Letters: N candidates, K directions, d values of the matrix (O outputs times I inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmworks.core.errors import UsageError, did_you_mean
from lmworks.core.seeds import seed_for
from lmworks.data.load import Batch
from lmworks.model.backbone import Backbone, Midway
from lmworks.model.layers import Linear
from lmworks.model.sizes import cost, forward_share
from lmworks.train.probe import Probe

COLUMNS = 1 << 15
"""Values of the matrix that are worked on at a time."""


@dataclass(frozen=True, kw_only=True)
class Proxies:
    """A gradient for each row, as factors where it has few directions: rows_Nd = factors_NK @ directions_Kd."""

    directions_Kd: Tensor
    factors_NK: Tensor | None = None
    """None: the directions are the rows' gradients themselves."""

    @property
    def rows(self) -> int:
        """N."""
        return (self.directions_Kd if self.factors_NK is None else self.factors_NK).shape[0]

    @property
    def finite(self) -> list[bool]:
        """Whether each row's gradient is a number: a row without targets, or of a loss that is not finite, has none."""
        small = self.directions_Kd if self.factors_NK is None else self.factors_NK
        answer: list[bool] = torch.isfinite(small).all(1).tolist()
        return answer

    def columns(self, index: slice | Tensor, rows: Tensor) -> Tensor:
        """The chosen rows' values at the chosen places."""
        if self.factors_NK is None:
            return self.directions_Kd[:, index][rows]
        return self.factors_NK[rows] @ self.directions_Kd[:, index]


@dataclass(kw_only=True)
class History:
    """Adam's two moments of the proxies, over the rows of large sources that earlier steps chose."""

    betas: tuple[float, float]
    eps: float
    first_d: Tensor | None = None
    second_d: Tensor | None = None
    updates: int = 0

    def normalised(self, proxies_nc: Tensor, index: slice | Tensor) -> Tensor:
        """What Adam's update would be after each row alone: (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)."""
        (b1, b2), t = self.betas, self.updates + 1
        m = (1 - b1) * proxies_nc
        v = (1 - b2) * proxies_nc.square()
        if self.first_d is not None and self.second_d is not None:
            m, v = m + b1 * self.first_d[index], v + b2 * self.second_d[index]
        return (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + self.eps)

    def update(self, proxies: Proxies, rows: Tensor) -> None:
        """Take in the mean over the chosen rows of what each alone would make of the moments."""
        parts = [proxies.columns(at, rows) for at in _pieces(proxies)]
        means = [(part.mean(0), part.square().mean(0)) for part in parts]
        first_d, second_d = (torch.cat(kind) for kind in zip(*means, strict=True))
        (b1, b2) = self.betas
        old = (0.0, 0.0) if self.first_d is None or self.second_d is None else (b1 * self.first_d, b2 * self.second_d)
        self.first_d = old[0] + (1 - b1) * first_d
        self.second_d = old[1] + (1 - b2) * second_d
        self.updates += 1


def sparse(proxies: Proxies, rows: Tensor, keep: int | None, see: Callable[[Tensor, slice | Tensor], Tensor]) -> Tensor:
    """What `see` makes of the rows' proxies, at the `keep` places where the mean over these rows is largest (n, keep).

    `see` is told the values and their places. Among equals the first place wins. None keeps all places.
    """
    size = proxies.directions_Kd.shape[1]
    if keep is None or keep >= size:
        return torch.cat([see(proxies.columns(at, rows), at) for at in _pieces(proxies)], 1)
    mean_d = torch.cat([see(proxies.columns(at, rows), at).mean(0) for at in _pieces(proxies)])
    places = mean_d.abs().argsort(descending=True, stable=True)[:keep]
    return see(proxies.columns(places, rows), places)


def _pieces(proxies: Proxies) -> Iterator[slice]:
    size = proxies.directions_Kd.shape[1]
    return (slice(start, min(start + COLUMNS, size)) for start in range(0, size, COLUMNS))


def layer_of(model: Backbone, matrix: str) -> Linear:
    """The Linear called `matrix` in the last block. Raises UsageError with the nearest name."""
    block = model.blocks[str(model.config.n_layers - 1)]
    known = {name: module for name, module in block.named_modules() if isinstance(module, Linear)}
    if matrix not in known:
        what = f"the last block has no matrix '{matrix}'{did_you_mean(matrix, known)}"
        raise UsageError(what, where="selector.matrix", legal=", ".join(known))
    return known[matrix]


@dataclass(frozen=True, kw_only=True)
class LastBlock:
    """Passes through the last block and the head, in float32 at least, over a batch's states cached before it.

    In bfloat16 a nudge of 1e-3 drowns in rounding. The weights are never written: a nudge is added to the output of the
    matrix, so nothing needs to be restored.
    """

    probe: Probe
    layer: Linear

    @property
    def model(self) -> Backbone:
        """The model that is trained."""
        return self.probe.model

    def share(self, sequence: int) -> float:
        """The part of a forward pass, by FLOPs, that the last block and the head are."""
        return forward_share(self.model.config, start=self.model.config.n_layers - 1, sequence=sequence)

    def nudge_share(self, sequence: int) -> float:
        """The part of a forward pass that one product of the matrix's size is."""
        return 2.0 * self.layer.weight.numel() / cost(self.model.config, sequence=sequence).forward_flops_per_token

    def micro_batches(self, batch: Batch) -> Iterator[tuple[int, Batch, Midway]]:
        """First row, rows and states before the last block, micro-batch by micro-batch; books the blocks before."""
        rows, last = self.probe.micro_rows or batch.rows, self.model.config.n_layers - 1
        wide = torch.promote_types(self.model.dtype, torch.float32)
        for start in range(0, batch.rows, rows):
            micro = batch[start : start + rows]
            with torch.no_grad():
                midway = self.model.until(
                    last, micro.tokens_BT, positions_BT=micro.positions_BT, documents_BT=micro.documents_BT
                )
            self.probe.book(micro.tokens_BT.numel(), 1 - self.share(micro.tokens_BT.shape[1]))
            yield start, micro, midway.to(wide)

    def slopes(self, batch: Batch, midway: Midway, direction: Tensor, epsilon: float) -> Tensor:
        """(L_i(W + e z) - L_i(W - e z)) / 2e of each row (B). `direction`: z^T (I, O), or one a row (B, I, O)."""
        up_B = self.losses(batch, midway, lambda x: epsilon * (x @ direction))
        down_B = self.losses(batch, midway, lambda x: -epsilon * (x @ direction))
        return (up_B - down_B) / (2 * epsilon)

    def losses(self, batch: Batch, midway: Midway, nudge: Callable[[Tensor], Tensor]) -> Tensor:
        """The loss of each row (B) when `nudge(input)` is added to the output of the matrix."""
        with nudged(self.layer, nudge):
            hidden_BTD = self.model.rest(midway)
        tokens, sequence = batch.tokens_BT.numel(), batch.tokens_BT.shape[1]
        self.probe.book(tokens, self.share(sequence) + self.nudge_share(sequence))
        return self.probe.objective.each(self.model, batch, hidden_BTD)


@contextmanager
def nudged(layer: nn.Module, nudge: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The layer gives `nudge(input)` on top of its output; compiled blocks run as they are written meanwhile."""
    handle = layer.register_forward_hook(lambda _, inputs, output: output + nudge(inputs[0]))
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        handle.remove()


def shared_directions(layer: Linear, seed: int, count: int) -> Tensor:
    """z_1 .. z_K ~ N(0, 1) of the matrix's shape (K, O, I), the same for the same seed."""
    weight = layer.weight
    generator = torch.Generator(device=weight.device).manual_seed(seed)
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.randn((count, *weight.shape), generator=generator, device=weight.device, dtype=wide)


@torch.no_grad()
def zeroth_order(last: LastBlock, batch: Batch, seed: int, *, count: int, epsilon: float) -> Proxies:
    """g_i = mean over k of c_ik z_k, with the slope c_ik = (L_i(W + e z_k) - L_i(W - e z_k)) / 2e. All rows share z."""
    z_KOI = shared_directions(last.layer, seed, count)
    slopes = []
    for _, micro, midway in last.micro_batches(batch):
        slopes.append(torch.stack([last.slopes(micro, midway, z_OI.T, epsilon) for z_OI in z_KOI], 1))
    return Proxies(directions_Kd=z_KOI.flatten(1), factors_NK=torch.cat(slopes) / count)


@torch.no_grad()
def zeroth_order_apart(last: LastBlock, batch: Batch, seed: int, *, count: int, epsilon: float) -> Proxies:
    """The same with directions of its own for each row: z_ik from the seed, the row and k, however the rows are cut."""
    found = []
    for start, micro, midway in last.micro_batches(batch):
        seeds = [seed_for(seed, row) for row in range(start, start + micro.rows)]
        z_BKOI = torch.stack([shared_directions(last.layer, s, count) for s in seeds])
        gradient_BOI = torch.zeros_like(z_BKOI[:, 0])
        for k in range(count):
            z_BOI = z_BKOI[:, k]
            slope_B = last.slopes(micro, midway, z_BOI.transpose(1, 2), epsilon)
            gradient_BOI += slope_B[:, None, None] * z_BOI / count
        found.append(gradient_BOI.flatten(1))
    return Proxies(directions_Kd=torch.cat(found))


def exact(last: LastBlock, batch: Batch) -> Proxies:
    """The gradient of each row's own loss for the matrix: one backward pass through the last block serves all rows.

    The gradient of a Linear is (gradient of its output)^T x (its input), row by row, and rows do not see each other.
    """
    found = []
    for _, micro, midway in last.micro_batches(batch):
        listener = _Listener(last.layer.out_features)
        with nudged(last.layer, listener), torch.enable_grad():
            parts = last.probe.objective.loss(last.model, micro, last.model.rest(midway))
        rows = [last.probe.objective.count(row) for row in micro.split(1)]
        slope_BTO = torch.zeros_like(listener.zero_BTO)
        for name, part in parts.items():
            (grad_BTO,) = torch.autograd.grad(part.total, listener.zero_BTO, retain_graph=True)
            slope_BTO += part.weight * grad_BTO / torch.stack([row[name] for row in rows])[:, None, None]
        found.append(torch.bmm(slope_BTO.transpose(1, 2), listener.input_BTI).flatten(1))
        last.probe.book(micro.tokens_BT.numel(), 3 * last.share(micro.tokens_BT.shape[1]))
    return Proxies(directions_Kd=torch.cat(found))


class _Listener:
    """Keeps the input of the matrix, and adds a zero to its output: the zero's gradient is the output's."""

    def __init__(self, outputs: int) -> None:
        self.outputs = outputs
        self.input_BTI, self.zero_BTO = torch.empty(0), torch.empty(0)

    def __call__(self, x_BTI: Tensor) -> Tensor:
        zero_BTO = x_BTI.new_zeros((*x_BTI.shape[:-1], self.outputs), requires_grad=True)
        if not self.zero_BTO.numel():  # recomputed blocks come here again in the backward pass
            self.input_BTI, self.zero_BTO = x_BTI.detach(), zero_BTO
        return zero_BTO


@torch.no_grad()
def representation(last: LastBlock, batch: Batch) -> Proxies:
    """The last hidden state of each row, instead of a gradient."""
    found = []
    for _, micro, midway in last.micro_batches(batch):
        found.append(last.model.rest(midway)[:, -1])
        last.probe.book(micro.tokens_BT.numel(), last.share(micro.tokens_BT.shape[1]))
    return Proxies(directions_Kd=torch.cat(found))


def on_device(rows: Sequence[int], like: Tensor) -> Tensor:
    """Row numbers as a tensor beside `like`."""
    return torch.tensor(rows, dtype=torch.int64, device=like.device)
