"""The running selector: what it does in a step, what it remembers, what it reports."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from lmworks.core.errors import UsageError
from lmworks.core.seeds import seed_for
from lmworks.data.load import Batch
from lmworks.methods.colm import proxies as kinds
from lmworks.methods.colm.medoids import Similarity, budgets, cluster_sizes, medoids, similarity
from lmworks.methods.colm.proxies import History, LastBlock, Proxies, on_device, sparse
from lmworks.model.backbone import Backbone
from lmworks.model.sizes import cost
from lmworks.train.probe import Probe
from lmworks.train.slots import Selector

if TYPE_CHECKING:
    from lmworks.methods.colm import Colm

Weights = dict[int, float]
"""Row of the draw -> how much it weighs."""


def candidates_for(rows: int, ratio: float) -> int:
    """The smallest number of candidates of which `rows` are at most the share `ratio`."""
    if rows < 1:
        raise UsageError(f"a step trains on at least one row, got {rows}", next_step="set batch_size to 1 or more")
    return max(rows, math.ceil(rows / ratio - 1e-9))


@final
class ColmSelector(Selector):
    """Chooses the rows of each step. Its state: the moments of the proxies, counters, and the seed of fixed directions.

    names: the readers in the recipe's order; keep: those of which every row is trained on.
    """

    def __init__(
        self, settings: Colm, model: Backbone, names: tuple[str, ...], keep: frozenset[str], history: History
    ) -> None:
        self.settings = settings
        self.names = names or ("rows",)
        self._kept_ids = {i for i, name in enumerate(self.names) if name in keep}
        self._layer = kinds.layer_of(model, settings.matrix)
        self.history = history
        self.selections = 0
        """Steps in which something was chosen."""
        self.fallbacks = 0
        """Steps in which no row had a proxy, so that rows were drawn at random."""
        self._seed: int | None = None

    def candidates(self, rows: int) -> int:
        """`rows` / ratio, rounded up."""
        return candidates_for(rows, self.settings.ratio)

    def select(self, batch: Batch, rows: int, probe: Probe) -> Batch:
        """The chosen rows, in the order of the draw. With ratio 1 the batch itself, untouched."""
        if rows >= batch.rows:
            return batch
        start = time.perf_counter()
        with evaluating(probe.model):
            weights = self._choose(batch, rows, probe)
        self.selections += 1
        chosen = sorted(weights)
        picked = batch[on_device(chosen, batch.tokens_BT)]
        if self.settings.weighted:
            share = len(chosen) / sum(weights.values())
            weight = torch.tensor([weights[i] * share for i in chosen], dtype=torch.float32)
            picked = dataclasses.replace(picked, weights_B=weight.to(batch.tokens_BT.device))
        probe.note("colm/seconds", time.perf_counter() - start)
        self._report(batch, picked, probe)
        every = self.settings.measure_every
        if every is not None and (self.selections - 1) % every == 0:
            with probe.aside():
                self._measure(batch, picked, probe)
        return picked

    def _choose(self, batch: Batch, rows: int, probe: Probe) -> Weights:
        """Small sources whole, medoids of the others."""
        source_of = self._sources(batch)
        kept = [i for i, source in enumerate(source_of) if source in self._kept_ids]
        probe.note("colm/kept", min(len(kept), rows))
        if len(kept) >= rows:
            return dict.fromkeys(kept[:rows], 1.0)
        others = [i for i, source in enumerate(source_of) if source not in self._kept_ids]
        left = rows - len(kept)
        if self.settings.proxy == "random":
            found = dict.fromkeys(self._drawn(others, left, probe), 1.0)
        else:
            found = self._medoids(batch, others, [source_of[i] for i in others], left, probe)
        return dict.fromkeys(kept, 1.0) | found

    def _medoids(self, batch: Batch, others: list[int], source_of: list[int], left: int, probe: Probe) -> Weights:
        """`left` of the rows `others`, source by source. Rows without a proxy come last; if none has one: at random."""
        proxies = self.proxies(batch[on_device(others, batch.tokens_BT)], probe)
        finite = proxies.finite
        if not any(finite):
            self.fallbacks += 1
            return dict.fromkeys(self._drawn(others, left, probe), 1.0)
        sources = sorted(set(source_of))
        groups = [[i for i, s in enumerate(source_of) if s == source and finite[i]] for source in sources]
        shares = budgets([len(group) for group in groups], min(left, sum(finite)))
        chosen: Weights = {}
        for group, count in zip(groups, shares, strict=True):
            chosen |= self._of_one_source(proxies, group, count)
        if self.settings.uses_history:
            self.history.update(proxies, on_device(sorted(chosen), proxies.directions_Kd))
        without = [i for i in range(len(others)) if not finite[i]][: left - len(chosen)]
        return {others[i]: weight for i, weight in (chosen | dict.fromkeys(without, 1.0)).items()}

    def _of_one_source(self, proxies: Proxies, group: list[int], count: int) -> Weights:
        if count in (0, len(group)):
            return dict.fromkeys(group[:count], 1.0)
        alike = self._similarity(proxies, group)
        found = medoids(alike, count)
        sizes = cluster_sizes(alike, found)
        return {group[i]: float(size) for i, size in zip(found, sizes, strict=True)}

    def _similarity(self, proxies: Proxies, group: list[int]) -> Similarity:
        """How alike the rows of one source are: their masked, normalised proxies in the L1 distance."""
        settings, history = self.settings, self.history
        see = history.normalised if settings.uses_history else lambda values, places: values
        keep = settings.coordinates if settings.is_gradient and settings.masked else None
        seen_nc = sparse(proxies, on_device(group, proxies.directions_Kd), keep, see)
        return similarity(torch.cdist(seen_nc, seen_nc, p=1).double().cpu().numpy())

    def proxies(self, batch: Batch, probe: Probe) -> Proxies:
        """What stands for each row; takes a seed of directions from the run's generator where they are drawn anew."""
        settings, last = self.settings, LastBlock(probe=probe, layer=self._layer)
        if settings.proxy == "exact":
            return kinds.exact(last, batch)
        if settings.proxy == "representation":
            return kinds.representation(last, batch)
        estimate = kinds.zeroth_order_apart if settings.perturbation == "row" else kinds.zeroth_order
        return estimate(last, batch, self._next_seed(probe), count=settings.directions, epsilon=settings.epsilon)

    def _next_seed(self, probe: Probe) -> int:
        """The seed of this step's directions, from the run's own generator; drawn once when they are fixed."""
        if self._seed is None or self.settings.perturbation != "fixed":
            self._seed = int(torch.randint(2**62, (1,), generator=probe.generator, device=probe.generator.device))
        return self._seed

    def _drawn(self, rows: list[int], count: int, probe: Probe) -> list[int]:
        order = torch.randperm(len(rows), generator=probe.generator, device=probe.generator.device)
        return [rows[i] for i in order[:count].tolist()]

    def _sources(self, batch: Batch) -> list[int]:
        answer: list[int] = batch.sources_BT[:, 0].tolist()
        return answer

    def _report(self, batch: Batch, picked: Batch, probe: Probe) -> None:
        """Counts, and the bytes that the two sizes of batch and the selection take (from shapes, not measured)."""
        chosen = torch.bincount(picked.sources_BT[:, 0], minlength=len(self.names)).tolist()
        for name, here in zip(self.names, chosen, strict=True):
            probe.note(f"colm/rows/{name}", here)
        probe.note("colm/candidates", batch.rows)
        probe.note("colm/sources", len(self.names))
        probe.note("colm/fallbacks", self.fallbacks)
        length = batch.tokens_BT.shape[1]
        sizes = cost(probe.model.config, sequence=length, bytes_per_value=probe.model.dtype.itemsize)
        per_token = sizes.activation_bytes_per_token
        at_once = min(probe.micro_rows or picked.rows, picked.rows)
        of_all = batch.rows if at_once == picked.rows else at_once  # in micro-batches, all would be no larger
        probe.note("colm/saved_bytes", per_token * length * at_once)
        probe.note("colm/saved_bytes_of_all", per_token * length * of_all)
        probe.note("colm/selection_bytes", self._selection_bytes(batch))

    def _selection_bytes(self, batch: Batch) -> float:
        """Directions or gradients, and the moments; float32."""
        settings = self.settings
        if not settings.is_gradient:
            return 0.0
        kept = settings.directions if settings.shares_directions else batch.rows
        return 4.0 * self._layer.weight.numel() * (kept + (2 if settings.uses_history else 0))

    @torch.enable_grad()
    def _measure(self, batch: Batch, picked: Batch, probe: Probe) -> None:
        """How far the chosen rows' gradient is from that of all candidates, beside as many random rows."""
        parameters = [p for p in probe.model.parameters() if p.requires_grad]
        whole = probe.gradients(batch, parameters)
        generator = torch.Generator().manual_seed(seed_for(self.selections, "colm", "measure"))
        at_random = batch[torch.randperm(batch.rows, generator=generator)[: picked.rows].to(batch.tokens_BT.device)]
        for name, some in (("colm/gradient_error", picked), ("colm/gradient_error_random", at_random)):
            probe.note(name, relative_error(probe.gradients(some, parameters), whole))

    def state(self) -> dict[str, Tensor]:
        """The moments, once there are some; counters; the seed of the directions."""
        counts = [self.selections, self.fallbacks, self.history.updates, -1 if self._seed is None else self._seed]
        found = {"counters": torch.tensor(counts, dtype=torch.int64)}
        if self.history.first_d is not None and self.history.second_d is not None:
            found |= {"first": self.history.first_d, "second": self.history.second_d}
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state()` gave; tensors go to the device of the matrix."""
        self.selections, self.fallbacks, self.history.updates, seed = state["counters"].tolist()
        self._seed = None if seed < 0 else seed
        device = self._layer.weight.device
        moments = [state[name].to(device) if name in state else None for name in ("first", "second")]
        self.history.first_d, self.history.second_d = moments


def relative_error(some: tuple[Tensor, ...], whole: tuple[Tensor, ...]) -> Tensor:
    """||some - whole|| / ||whole|| over all parameters together."""
    apart = torch.nn.utils.get_total_norm([a - b for a, b in zip(some, whole, strict=True)])
    return apart / torch.nn.utils.get_total_norm(whole)


@contextmanager
def evaluating(model: Backbone) -> Iterator[None]:
    """The model in eval mode, and back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
