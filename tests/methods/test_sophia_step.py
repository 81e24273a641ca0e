"""Sophia's step: its bounds, its batches, its state, what it passes over and what ends the run."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lmworks.core.errors import NonFinite, UsageError
from lmworks.data.load import Batch
from lmworks.methods.sophia import Sophia, gauss_newton, hutchinson, spread
from lmworks.train.objective import CrossEntropy
from lmworks.train.probe import Probe
from lmworks.train.saved import Recompute
from lmworks.train.slots import Component, Gradient, Objective
from tests.methods.curvature import KINDS, Classify, Formula, Point, kept, stepping, values
from tests.train import toy

# --- the step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_no_coordinate_moves_further_than_the_rate(kind: Any) -> None:
    model = toy.model()
    step = stepping(
        model, Sophia(lr=0.01, estimator=kind, every=3), [toy.batch(4, 12, 61, seed=seed) for seed in range(3)]
    )
    for number in range(9):
        before = values(model)
        rate = step.update.set_lr(1 / (1 + number))
        step()
        for name, p in model.named_parameters():
            decay = 0.2 if p.ndim >= 2 and name != "embed.weight" else 0.0
            moved = p.detach() - before[name] + rate * decay * before[name]
            assert float(moved.abs().max()) <= rate * (1 + 1e-6)


@pytest.mark.parametrize("curvature", [0.0, -4.0])
def test_without_positive_curvature_the_step_is_the_rate_times_the_sign(curvature: float) -> None:
    start = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    model: Any = Point(start)
    slope = torch.tensor([5.0, -0.1, 1e-4], dtype=torch.float64)
    step = stepping(
        model,
        Sophia(lr=0.125, estimator="hutchinson", directions="rademacher", every=1, gamma=1.0),
        [toy.batch(1, 2, 5)],
        Formula(function=lambda x: (slope * x).sum() + curvature * ((x - start) ** 2).sum() / 2),
    )
    result = step()
    torch.testing.assert_close(model.point.detach(), start - 0.125 * slope.sign(), rtol=0, atol=0)
    torch.testing.assert_close(kept(step.update, "curvature")["point"], torch.full_like(start, 0.01 * curvature))
    assert result.extra["sophia/clipped"] == 1.0
    assert result.extra["sophia/win_rate"] == 0.0


def test_the_rate_is_the_settings_rate_times_the_factor_and_a_flat_coordinate_takes_all_of_it() -> None:
    model: Any = Point(torch.zeros(1, dtype=torch.float64))
    flat = Formula(function=lambda x: 1e-3 * x.sum() + 0.0 * (x * x).sum())
    step = stepping(model, Sophia(lr=0.5, estimator="hutchinson"), [toy.batch(1, 2, 5)], flat)
    assert step.update.set_lr(0.25) == 0.125
    step()
    assert float(model.point.detach()) == -0.125
    assert step.update.set_lr(1.0) == 0.5


def test_curvature_is_estimated_before_the_first_update_and_then_every_so_many_steps() -> None:
    model = toy.model()
    step = stepping(model, Sophia(lr=0.01, every=3), [toy.batch(4, 12, 61)])
    changed, last = [], {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for _ in range(8):
        result = step()
        now = kept(step.update, "curvature")
        same = all(torch.equal(now[name], last[name]) for name in now)
        assert same == ("sophia/h_norm" not in result.extra)
        assert same == (result.passes == 3 * 48)
        changed.append(not same)
        last = now
    assert changed == [True, False, False, True, False, False, True, False]
    assert int(step.update.state()["sophia/step"]) == 8
    assert int(step.update.state()["sophia/last_estimate"]) == 7


def test_an_estimate_is_booked_and_told() -> None:
    batch = toy.batch(6, 10, 61)
    for kind, passes in (("gauss-newton", 4), ("hutchinson", 9)):
        made = stepping(toy.model(), Sophia(lr=0.01, estimator=kind, share=0.5), [batch], micro_rows=2)
        result = made()
        assert result.extra["sophia/estimate_rows"] == 3
        assert result.passes == 3 * 60 + passes * 30
        assert result.extra["sophia/estimate_cost"] == pytest.approx(passes * 30 / 180)
        norm = torch.linalg.vector_norm(torch.cat([h.flatten() for h in kept(made.update, "curvature").values()]))
        assert result.extra["sophia/h_norm"] == pytest.approx(float(norm))


def test_win_rate_and_clipped_are_counted_over_all_coordinates_and_each_block() -> None:
    model = toy.model()
    settings = Sophia(lr=0.01, gamma=20.0, every=1, per_block=True)
    step = stepping(model, settings, [toy.batch(4, 12, 61)])
    for _ in range(3):
        result = step()
    m, h = kept(step.update, "momentum"), kept(step.update, "curvature")
    wins = {name: m[name].abs() < 20.0 * h[name] for name in m}
    clipped = {name: m[name].abs() >= (20.0 * h[name]).clamp(min=1e-12) for name in m}

    def share(found: dict[str, Tensor], prefix: str = "") -> float:
        return float(torch.cat([c.flatten() for name, c in found.items() if name.startswith(prefix)]).double().mean())

    assert 0.1 < share(wins) < 0.9
    assert result.extra["sophia/win_rate"] == pytest.approx(share(wins), abs=1e-6)
    assert result.extra["sophia/clipped"] == pytest.approx(share(clipped), abs=1e-6)
    blocks = {name.removeprefix("sophia/clipped/") for name in result.extra if name.startswith("sophia/clipped/")}
    assert blocks == {"embed", "blocks.0", "blocks.1", "norm"}
    for block in blocks:
        assert result.extra[f"sophia/clipped/{block}"] == pytest.approx(share(clipped, f"{block}."), abs=1e-6)


def test_a_token_that_was_never_seen_is_no_win() -> None:
    model = toy.model(tied=False)
    step = stepping(model, Sophia(lr=0.01, every=1, per_block=True), [toy.batch(1, 3, 61, packed=False)])
    before = values(model)["embed.weight"]
    result = step()
    moved = (values(model)["embed.weight"] != before).any(1)
    assert int(moved.sum()) <= 3
    assert result.extra["sophia/clipped/embed"] <= 3 / 61
    assert result.extra["sophia/win_rate"] + result.extra["sophia/clipped"] < 1


# --- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_change_nothing_for_the_same_draws(kind: Any) -> None:
    model, batch = toy.model(), toy.batch(8, 10, 61)
    parameters = list(model.parameters())
    found = []
    for micro_rows in (8, 4, 3):
        probe = Probe(model, CrossEntropy(), seed=5, micro_rows=micro_rows)
        if kind == "gauss-newton":
            labels = Probe(model, CrossEntropy(), seed=5, micro_rows=micro_rows).sampled(batch).targets_BT
            found.append((labels, gauss_newton(probe, batch, parameters)))
        else:
            found.append((batch.targets_BT, hutchinson(probe, batch, parameters, "gaussian")))
    (labels, want), *others = found
    for drawn, got in others:
        assert torch.equal(drawn, labels)
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


def test_two_halves_averaged_before_squaring_with_the_whole_count_are_the_whole() -> None:
    """What ranks will do. Averaging squares instead is another number."""
    model, batch = toy.model(), toy.batch(8, 10, 61)
    parameters = list(model.parameters())
    probe = Probe(model, CrossEntropy(), seed=5)
    drawn = Probe(model, CrossEntropy(), seed=5).sampled(batch)
    whole = gauss_newton(probe, batch, parameters)
    assert whole is not None
    halves = [drawn[:5], drawn[5:]]
    terms = [int((half.targets_BT >= 0).sum()) for half in halves]
    assert terms[0] != terms[1]
    sides = [probe.gradients(half, parameters) for half in halves]
    for want, first, second in zip(whole, *sides, strict=True):
        mean = (terms[0] * first + terms[1] * second) / sum(terms)
        torch.testing.assert_close(sum(terms) * mean.square(), want, rtol=1e-9, atol=1e-14)
        wrong = sum(terms) * (terms[0] * first.square() + terms[1] * second.square()) / sum(terms)
        assert not torch.allclose(wrong, want, rtol=1e-2)


def test_masked_targets_count_neither_in_the_gradient_nor_in_b() -> None:
    """Rows that are masked altogether change nothing when they are added."""
    model, batch = toy.model(), toy.batch(6, 10, 61)
    parameters = list(model.parameters())
    masked = dataclasses.replace(batch, targets_BT=batch.targets_BT.clone())
    masked.targets_BT[4:] = -100
    with_them = gauss_newton(Probe(model, CrossEntropy(), seed=5), masked, parameters)
    without = gauss_newton(Probe(model, CrossEntropy(), seed=5), batch[:4], parameters)
    for a, b in zip(with_them or [], without or [], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)
    assert with_them


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_target_leave_the_curvature(kind: Any) -> None:
    model, batch = toy.model(), toy.batch(4, 10, 61)
    masked = dataclasses.replace(batch, targets_BT=batch.targets_BT.clone())
    masked.targets_BT[0] = -100  # the estimate's only row
    step = stepping(model, Sophia(lr=0.01, estimator=kind, every=1, share=0.25), [batch, masked])
    step()
    before, weights = kept(step.update, "curvature"), values(model)
    random = step.probe.generator.get_state()
    result = step()
    assert all(torch.equal(h, before[name]) for name, h in kept(step.update, "curvature").items())
    assert torch.equal(step.probe.generator.get_state(), random)
    assert "sophia/h_norm" not in result.extra
    assert not torch.equal(values(model)["norm.weight"], weights["norm.weight"])
    assert int(step.update.state()["sophia/last_estimate"]) == 1


def test_an_estimate_uses_rows_at_even_distances() -> None:
    batch = toy.batch(7, 4, 61)
    assert torch.equal(spread(batch, 3).tokens_BT, batch.tokens_BT[[0, 2, 4]])
    assert torch.equal(spread(batch, 7).tokens_BT, batch.tokens_BT)


# --- resume --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [3, 4])
def test_state_by_name_goes_on_bitwise(kind: Any, at: int) -> None:
    """Step 4 (every = 3) has an estimate: going on after 3 begins with it, after 4 without one."""
    settings = Sophia(lr=0.01, estimator=kind, every=3)
    batches = [toy.batch(4, 10, 61, seed=seed) for seed in range(9)]
    whole, first, second = (toy.model(dtype=torch.float32) for _ in range(3))
    step = stepping(whole, settings, batches)
    for _ in range(9):
        step()
    step = stepping(first, settings, batches)
    for _ in range(at):
        step()
    saved = {name: value.clone() for name, value in step.update.state().items()}
    second.load_state_dict(first.state_dict())
    resumed = stepping(second, settings, batches[at:])
    resumed.update.load(saved)
    resumed.probe.load(step.probe.state())
    for _ in range(9 - at):
        resumed()
    for name, p in whole.named_parameters():
        assert torch.equal(p, second.get_parameter(name)), name
    for name, value in resumed.update.state().items():
        assert value.dtype == (torch.int64 if name.startswith("sophia/") else torch.float32)


# --- what is passed over, and what ends the run --------------------------------------------------------------------


def test_frozen_weights_have_no_state_and_do_not_move() -> None:
    model = toy.model()
    frozen = model.get_parameter("blocks.0.ffn.up_proj.weight")
    frozen.requires_grad_(False)
    before = frozen.clone()
    step = stepping(model, Sophia(lr=0.01), [toy.batch(2, 8, 61)])
    step()
    assert torch.equal(frozen, before)
    assert set(kept(step.update, "momentum")) == {n for n, p in model.named_parameters() if p.requires_grad}


def test_sparse_and_missing_gradients_are_passed_over() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(13, 5, sparse=True, dtype=torch.float64)
            self.dense = nn.Linear(5, 4, dtype=torch.float64)
            self.unused = nn.Linear(2, 2, dtype=torch.float64)

        def forward(self, tokens_BT: Tensor) -> Tensor:
            return self.dense(self.table(tokens_BT))

    model = Lookup()
    batch = toy.batch(2, 4, 13)
    batch = dataclasses.replace(batch, targets_BT=torch.where(batch.targets_BT < 0, -100, batch.targets_BT % 4))
    update = Sophia(lr=0.01).build(model)  # type: ignore[arg-type]
    objective = Classify()
    probe = Probe(model, objective, seed=0)  # type: ignore[arg-type]
    probe.batch = batch
    before = values(model)
    (objective.loss(model, batch)["targets"].total / 8).backward()
    update.step(probe)
    assert set(kept(update, "curvature")) == {"dense.weight", "dense.bias"}
    same = {name for name, value in values(model).items() if torch.equal(value, before[name])}
    assert same == {"table.weight", "unused.weight", "unused.bias"}


def test_state_is_float32_for_weights_in_bfloat16() -> None:
    model: Any = Point(torch.ones(3, dtype=torch.bfloat16))
    step = stepping(
        model, Sophia(lr=0.25, estimator="hutchinson"), [toy.batch(1, 2, 5)], Formula(function=lambda x: (x**2).sum())
    )
    step()
    assert {value.dtype for name, value in step.update.state().items() if name.startswith("point")} == {torch.float32}
    assert torch.equal(model.point.detach(), torch.full((3,), 0.75, dtype=torch.bfloat16))


@dataclass(frozen=True, kw_only=True)
class Narrow(Objective):
    """Cross-entropy on a device that has room for two rows in a pass of the probe."""

    predicts: ClassVar[bool] = True
    room: int = 2
    inner: CrossEntropy = field(default_factory=CrossEntropy)

    def count(self, batch: Batch) -> dict[str, Tensor]:
        return self.inner.count(batch)

    def loss(self, model: Any, batch: Batch, hidden_BTD: Tensor | None = None) -> dict[str, Component]:
        if batch.rows != 8 and batch.rows > self.room:  # the step's own eight rows fit
            raise torch.OutOfMemoryError("no room")
        return self.inner.loss(model, batch)

    def sampled(self, model: Any, batch: Batch, generator: torch.Generator) -> Batch:
        return self.inner.sampled(model, batch, generator)


def test_out_of_memory_halves_the_rows_and_b_follows() -> None:
    model, batch = toy.model(), toy.batch(8, 10, 61)
    step = stepping(model, Sophia(lr=0.01, share=0.7, every=1), [batch], Narrow())
    assert step().extra["sophia/estimate_rows"] == 1  # 6, 3, 1
    assert int(step.update.state()["sophia/most_rows"]) == 1
    start = toy.model()
    probe = Probe(start, CrossEntropy(), seed=7)
    for rows in (6, 3):  # the tries before drew targets as well
        probe.sampled(spread(batch, rows))
    want = gauss_newton(probe, spread(batch, 1), list(start.parameters()))
    assert want is not None
    for (name, _), estimate in zip(start.named_parameters(), want, strict=True):
        torch.testing.assert_close(kept(step.update, "curvature")[name], 0.01 * estimate)
    with pytest.raises(torch.OutOfMemoryError):
        stepping(toy.model(), Sophia(lr=0.01, share=0.7), [batch], Narrow(room=0))()


@pytest.mark.parametrize("kind", KINDS)
def test_an_estimate_that_is_not_finite_stops_before_the_update(kind: Any) -> None:
    armed: list[bool] = []

    class Arm(Gradient):
        """Lets gradients be infinite from the end of the step's own passes on."""

        def finish(self, parameters: Any, norm: Tensor) -> dict[str, Tensor]:
            armed.append(True)
            return {}

    model = toy.model()
    weight = model.get_parameter("blocks.1.ffn.up_proj.weight")
    weight.register_hook(lambda grad: grad * math.inf if armed else grad)
    step = stepping(model, Sophia(lr=0.01, estimator=kind), [toy.batch(4, 8, 61)], gradient=(Arm(),))
    before = values(model)
    with pytest.raises(NonFinite, match=f"{kind} estimate .* not made"):
        step()
    assert armed
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())
    assert kept(step.update, "curvature") == {}


def test_a_loss_of_two_kinds_of_unit_has_no_b() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Two(Narrow):
        def count(self, batch: Batch) -> dict[str, Tensor]:
            return {**self.inner.count(batch), "pairs": torch.tensor(3)}

    model = toy.model()
    with pytest.raises(UsageError, match=r"cross_entropy \+ pairs") as caught:
        gauss_newton(Probe(model, Two(), seed=0), toy.batch(2, 8, 61), list(model.parameters()))
    assert "hutchinson" in str(caught.value)


def test_recomputed_blocks_give_the_same_hessian_products() -> None:
    batch, found = toy.batch(3, 8, 61), []
    for recompute in (False, True):
        model = toy.model()
        if recompute:
            Recompute(every=1).apply(model)
        found.append(hutchinson(Probe(model, CrossEntropy(), seed=1), batch, list(model.parameters()), "gaussian"))
    for a, b in zip(found[0] or [], found[1] or [], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert found[0]
