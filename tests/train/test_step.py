"""The step: any split gives the same gradient, non-finite stops before the update, slots are called in order."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmworks.core.errors import NonFinite
from lmworks.data.load import Batch
from lmworks.model.backbone import Backbone
from lmworks.parallel.apply import whole
from lmworks.train.gradient import Clip
from lmworks.train.objective import CrossEntropy
from lmworks.train.optim import AdamW
from lmworks.train.probe import Probe
from lmworks.train.saved import Keep, Recompute
from lmworks.train.slots import Optimizer, SelectAll, Selector
from lmworks.train.step import Step, accumulate
from tests.train import toy


@dataclass
class Given:
    """A source that hands out what it was given."""

    batches: list[Batch]
    drawn: list[int] = field(default_factory=list)

    def draw(self, rows: int) -> Batch:
        self.drawn.append(rows)
        return self.batches[(len(self.drawn) - 1) % len(self.batches)]

    def state(self) -> dict[str, Any]:
        return {"drawn": len(self.drawn)}

    def load(self, state: dict[str, Any]) -> None:
        self.drawn = [0] * state["drawn"]

    def close(self) -> None:
        pass


def step_on(
    model: Backbone,
    batches: list[Batch],
    *,
    micro: int = 99,
    selector: Selector | None = None,
    clip: float = 1.0,
    optimizer: Optimizer | None = None,
) -> Step:
    objective, optimizer = CrossEntropy(), optimizer or AdamW(lr=1e-2)
    return Step(
        placement=whole(model),
        source=Given(batches),
        selector=selector or SelectAll().start(model, optimizer, {}),
        objective=objective,
        gradient=(Clip(norm=clip),),
        update=optimizer.build(model),
        probe=Probe(model, objective, seed=0),
        rows=batches[0].rows,
        micro_rows=micro,
    )


def gradients(model: Backbone, batch: Batch, micro: int) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    objective = CrossEntropy()
    loss = accumulate(whole(model), objective, batch.split(micro), objective.count(batch))
    return float(loss), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@settings(max_examples=15)
@given(micro=st.sampled_from([1, 2, 3, 4, 8]), packed=st.booleans(), seed=st.integers(0, 1000))
def test_any_split_gives_the_same_loss_and_gradient(micro: int, packed: bool, seed: int) -> None:
    """Micro-batches of 1, 2, 4, 8 rows and a ragged last one (3 of 8), with different counts of valid targets."""
    model = toy.model(seed=seed)
    batch = toy.batch(8, 12, 61, seed=seed, packed=packed)
    want_loss, want = gradients(model, batch, 8)
    got_loss, got = gradients(model, batch, micro)
    assert got_loss == pytest.approx(want_loss, abs=1e-12)
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0.0, atol=1e-10)


def test_the_loss_is_the_mean_over_valid_targets_only() -> None:
    model = toy.model()
    batch = toy.batch(4, 10, 61, seed=3)
    logits = model.logits(model(batch.tokens_BT, positions_BT=batch.positions_BT, documents_BT=batch.documents_BT))
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten())
    loss, _ = gradients(model, batch, 2)
    assert loss == pytest.approx(want.item(), abs=1e-12)


@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_blocks_give_the_same_gradient(every: int) -> None:
    batch = toy.batch(3, 12, 61)
    want_loss, want = gradients(toy.model(), batch, 3)
    model = toy.model()
    names = [name for name, _ in model.named_parameters()]
    Recompute(every=every).apply(model)
    assert [name for name, _ in model.named_parameters()] == names
    got_loss, got = gradients(model, batch, 3)
    assert got_loss == want_loss
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def test_keeping_changes_nothing() -> None:
    model = toy.model()
    Keep().apply(model)
    assert "forward" not in vars(model.blocks["0"])


def test_the_gradient_is_clipped_to_the_norm() -> None:
    model = toy.model()
    made = step_on(model, [toy.batch(4, 10, 61)], clip=0.01)
    result = made()
    assert result.grad_norm > 0.01
    now = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert float(now) == pytest.approx(0.01, rel=1e-9)
    assert result.extra["clip_factor"] == pytest.approx(0.01 / result.grad_norm, rel=1e-9)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_update(poison: float) -> None:
    model = toy.model()
    with torch.no_grad():
        model.get_parameter("norm.weight")[0] = poison
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(NonFinite, match="not made"):
        step_on(model, [toy.batch(2, 8, 61)])()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=0, equal_nan=True)


def test_a_gradient_that_is_not_finite_stops_before_the_update() -> None:
    model = toy.model()
    weight = model.get_parameter("blocks.0.ffn.up_proj.weight")
    weight.register_hook(lambda grad: torch.full_like(grad, math.nan))
    before = weight.detach().clone()
    with pytest.raises(NonFinite):
        step_on(model, [toy.batch(2, 8, 61)])()
    assert torch.equal(weight.detach(), before)


def test_a_selector_gets_as_many_candidates_as_it_asks_for() -> None:
    class Last(Selector):
        """Asks for twice the rows and keeps the second half."""

        def candidates(self, rows: int) -> int:
            return 2 * rows

        def select(self, batch: Batch, rows: int, probe: Probe) -> Batch:
            return batch[slice(rows, None)]

    whole = toy.batch(4, 10, 61)
    model, other = toy.model(), toy.model()
    made = step_on(model, [whole], selector=Last())
    made = Step(**{**vars(made), "rows": 2})
    result = made()
    assert made.source.drawn == [4]  # type: ignore[attr-defined]
    loss, _ = gradients(other, whole[slice(2, None)], 2)
    assert result.loss == pytest.approx(loss, abs=1e-12)


def test_a_batch_without_a_valid_target_is_zero_and_moves_no_matrix_but_by_decay() -> None:
    model = toy.model()
    batch = toy.batch(2, 8, 61)
    empty = dataclasses.replace(batch, targets_BT=torch.full_like(batch.targets_BT, -100))
    result = step_on(model, [empty])()
    assert result.loss == 0.0
    assert result.targets == 0
    assert result.grad_norm == 0.0


def test_the_probe_never_touches_grad() -> None:
    model = toy.model()
    batch = toy.batch(2, 8, 61)
    probe = Probe(model, CrossEntropy(), seed=0)
    weight = model.get_parameter("blocks.1.ffn.down_proj.weight")
    (found,) = probe.gradients(batch, [weight])
    assert all(p.grad is None for p in model.parameters())
    _, want = gradients(model, batch, 2)
    torch.testing.assert_close(found, want["blocks.1.ffn.down_proj.weight"], rtol=0, atol=1e-12)
    assert probe.booked == 3 * batch.tokens_BT.numel()


def test_a_probe_in_micro_batches_gives_the_same_gradient() -> None:
    model, batch = toy.model(), toy.batch(5, 8, 61)
    whole, parts = Probe(model, CrossEntropy(), seed=0), Probe(model, CrossEntropy(), seed=0, micro_rows=2)
    parameters = list(model.parameters())
    for a, b in zip(whole.gradients(batch, parameters), parts.gradients(batch, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_hessian_product_is_the_difference_quotient_of_gradients() -> None:
    model, batch = toy.model(), toy.batch(3, 8, 61)
    probe = Probe(model, CrossEntropy(), seed=0, micro_rows=2)
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(1)
    vectors = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    found = probe.hessian_product(batch, parameters, vectors)
    step = 1e-7  # the loss is steep: the quotient's own error falls with the square, to 6e-7 here
    sides = []
    for sign in (1.0, -2.0):  # to +step, then from there to -step
        with torch.no_grad():
            for p, v in zip(parameters, vectors, strict=True):
                p.add_(v, alpha=sign * step)
        sides.append(probe.gradients(batch, parameters))
    for product, up, down in zip(found, *sides, strict=True):
        torch.testing.assert_close(product, (up - down) / (2 * step), rtol=1e-6, atol=2e-6)
    assert all(p.grad is None for p in parameters)


def test_what_a_part_notes_and_books_is_in_the_result() -> None:
    class Curious(Selector):
        """Looks at the gradient once before it takes all rows."""

        def candidates(self, rows: int) -> int:
            return rows

        def select(self, batch: Batch, rows: int, probe: Probe) -> Batch:
            probe.gradients(batch, [probe.model.get_parameter("norm.weight")])
            probe.note("curious/rows", rows)
            return batch

    model, batch = toy.model(), toy.batch(2, 8, 61)
    made = step_on(model, [batch, batch], selector=Curious())
    for _ in range(2):
        result = made()
        assert result.extra["curious/rows"] == 2
        assert result.passes == 6 * batch.tokens_BT.numel()


def test_sampled_targets_follow_the_models_distribution() -> None:
    model, batch = toy.model(), toy.batch(1, 4, 61, packed=False)
    objective, generator = CrossEntropy(), torch.Generator().manual_seed(0)
    counts = torch.zeros(61)
    for _ in range(3000):
        drawn = objective.sampled(model, batch, generator)
        assert torch.equal(drawn.tokens_BT, batch.tokens_BT)
        counts += torch.bincount(drawn.targets_BT[0, 3:], minlength=61)
    wanted = torch.softmax(model.logits(model(batch.tokens_BT))[0, 3], -1).detach()
    assert float((counts / 3000 - wanted).abs().max()) < 0.02
    packed = toy.batch(3, 8, 61)
    ignored = packed.targets_BT == -100
    assert ignored.any()
    assert torch.equal(objective.sampled(model, packed, generator).targets_BT == -100, ignored)


def test_the_loss_of_each_row_is_that_row_alone() -> None:
    model, batch = toy.model(), toy.batch(4, 8, 61)
    losses_B = CrossEntropy().each(model, batch)
    for i in range(4):
        alone, _ = gradients(model, batch[slice(i, i + 1)], 1)
        assert float(losses_B[i]) == pytest.approx(alone, abs=1e-12)
