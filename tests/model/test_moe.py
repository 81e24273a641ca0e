"""Experts against the formulas token by token: values, gradients, loads, the aux loss, the bias."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import settings as few
from hypothesis import strategies as st
from torch import Tensor

from lmworks.core.recipe import load as load_recipe
from lmworks.model import ops
from lmworks.model.decoder import DecoderConfig
from lmworks.model.grouped import grouped_linear
from lmworks.model.init import first_expert, first_value, initialise
from lmworks.model.moe import Experts, MoEFFN, after_update, balanced, layers_with_experts
from lmworks.train.saved import Recompute
from tests.oracles import moe as oracle

WIDTH, SIZE = 6, 5


@st.composite
def settings_of_experts(draw: st.DrawFn) -> Experts:
    count = draw(st.integers(1, 7))
    return Experts(
        count=count,
        top_k=draw(st.integers(1, count)),
        shared_size=draw(st.sampled_from([0, 3])),
        scoring=draw(st.sampled_from(["softmax", "sigmoid"])),
        normalise_top_k=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5])),
        bias_rate=draw(st.sampled_from([None, 0.1])),
        aux_loss=draw(st.sampled_from([0.0, 0.7])),
    )


def layer_of(settings: Experts, seed: int, dtype: torch.dtype = torch.float64) -> MoEFFN:
    layer = MoEFFN(WIDTH, SIZE, settings).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def states(rows: int, length: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(rows, length, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def weights_of(layer: MoEFFN) -> dict[str, Tensor]:
    """Leaves for the oracle, in float64."""
    return {name: p.detach().double().clone().requires_grad_(p.requires_grad) for name, p in layer.named_parameters()}


@given(settings_of_experts(), st.integers(1, 3), st.integers(1, 6), st.integers(0, 99))
@few(max_examples=40, deadline=None)
def test_values_gradients_and_loads_are_those_of_the_formulas(
    settings: Experts, rows: int, length: int, seed: int
) -> None:
    layer, x = layer_of(settings, seed), states(rows, length, seed).requires_grad_()
    weights, theirs = weights_of(layer), x.detach().clone().requires_grad_()
    direction = states(rows, length, seed + 7)
    with balanced(layer, rows=rows):
        found = layer(x)
        (found * direction).sum().backward()
    want = oracle.layer(theirs, weights, settings)
    aux = oracle.aux_loss(theirs, weights, settings)
    ((want * direction).sum() + settings.aux_weight * aux).backward()
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(x.grad, theirs.grad)
    for name, parameter in layer.named_parameters():
        if not parameter.requires_grad:
            assert name == "router.expert_bias"
            assert parameter.grad is None
            continue
        assert parameter.grad is not None, name
        expected = weights[name].grad
        torch.testing.assert_close(parameter.grad, torch.zeros_like(parameter) if expected is None else expected)
    counts_BE = oracle.load(theirs, weights, settings)
    assert layer.load_E is not None
    assert layer.load_E.tolist() == counts_BE.sum(0).tolist()
    assert int(layer.load_E.sum()) == rows * length * settings.top_k  # no token is dropped
    columns = after_update(layer)
    load_E = counts_BE.sum(0).double()
    assert float(columns["experts/max_load"]) == pytest.approx(float(load_E.max() / load_E.mean()))
    if settings.aux_weight:
        assert float(columns["experts/aux_loss"]) == pytest.approx(settings.aux_weight * float(aux.detach()), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("counts", [[3, 0, 4], [0, 0, 0], [0, 7, 0]])
def test_a_grouped_product_gives_every_matrix_a_gradient(counts: list[int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(3, 4, 8, generator=generator, dtype=torch.float64)
    weight = weight.to(torch.float32 if dtype == torch.bfloat16 else dtype).requires_grad_()
    found = grouped_linear(x, weight, torch.tensor(counts))
    found.sum().backward()
    want = torch.cat([part @ w.to(dtype).t() for part, w in zip(x.split(counts), weight, strict=True)])
    torch.testing.assert_close(found, want)
    assert weight.grad is not None
    assert x.grad is not None
    for count, part, grad in zip(counts, x.detach().split(counts), weight.grad, strict=True):
        torch.testing.assert_close(grad, part.to(grad.dtype).sum(0).expand(4, 8), rtol=1e-2, atol=1e-2)
        assert count > 0 or not grad.any()


def test_the_router_computes_in_float32_whatever_the_precision() -> None:
    layer = layer_of(Experts(count=4), 0, torch.float32)
    x = states(2, 5, 0, torch.bfloat16).flatten(0, 1)
    found = layer.router(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (x.float() @ layer.router.weight.t()).softmax(-1))


def test_own_forms_and_plain_forms_agree_in_float32() -> None:
    def gradients() -> list[Tensor]:
        layer = layer_of(Experts(count=5, shared_size=4), 3, torch.float32)
        layer(states(2, 9, 3, torch.float32)).square().mean().backward()
        return [p.grad for p in layer.parameters() if p.grad is not None]

    found = gradients()
    with ops.plain_forms():
        want = gradients()
    for ours, plain in zip(found, want, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_second_derivatives_exist_in_the_plain_forms() -> None:
    layer, x = layer_of(Experts(count=3), 0), states(1, 4, 0)
    with ops.plain_forms():
        assert torch.autograd.gradcheck(layer, (x.requires_grad_(),))
        assert torch.autograd.gradgradcheck(layer, (x,))


# --- whole models ------------------------------------------------------------------------------------------------

CONFIG = DecoderConfig(
    vocab_size=64,
    n_layers=3,
    hidden_size=16,
    n_heads=2,
    ffn_size=24,
    experts=Experts(count=6, top_k=2, size=8, shared_size=8, aux_loss=0.5, bias_rate=0.01, first_dense=1),
)


def tokens(rows: int = 6, length: int = 10) -> Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(3))


def trained(micro: int, arrange: Callable[[torch.nn.Module], None] | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of one step over six rows, `micro` rows at a time, and the loads of each block."""
    model = CONFIG.build(dtype=torch.float64, param_dtype=torch.float64)
    initialise(model, 0)
    if arrange is not None:
        arrange(model)
    with balanced(model, rows=6):
        for part in tokens().split(micro):
            model.logits(model(part)).square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients, torch.stack([layer.load_E for layer in layers_with_experts(model) if layer.load_E is not None])


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_give_the_gradient_and_the_loads_of_the_whole(micro: int) -> None:
    (want, load), (found, again) = trained(6), trained(micro)
    assert torch.equal(load, again)
    assert load.sum(1).tolist() == [6 * 10 * 2] * 2
    assert found.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_blocks_count_once_and_give_the_same_gradient(every: int) -> None:
    (want, load), (found, again) = trained(3), trained(3, Recompute(every=every).apply)  # type: ignore[arg-type]  # a Backbone
    assert torch.equal(load, again)
    for name, gradient in want.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # what torch.compile itself looks at
def test_compiled_blocks_leave_the_experts_eager_and_count_the_same() -> None:
    def compiled(model: torch.nn.Module) -> None:
        for block in model.get_submodule("blocks").children():
            block.compile(backend="eager")

    (want, load), (found, again) = trained(6), trained(6, compiled)
    assert torch.equal(load, again)
    for name, gradient in want.items():
        torch.testing.assert_close(found[name], gradient)


def test_passes_outside_of_a_step_neither_count_nor_balance() -> None:
    model = CONFIG.build()
    initialise(model, 0)
    model(tokens()).sum().backward()
    with torch.no_grad(), balanced(model, rows=6):
        model(tokens())
    assert all(layer.load_E is None for layer in layers_with_experts(model))
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert float(after_update(model)["experts/max_load"]) == 0.0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_bias_moves_against_the_load_of_all_ranks_and_only_after_the_update() -> None:
    model = CONFIG.build()
    initialise(model, 0)
    first, second = layers_with_experts(model)
    with balanced(model, rows=6):
        model(tokens()).sum().backward()
    assert first.router.expert_bias is not None
    assert not first.router.expert_bias.any()
    others = torch.tensor([500.0, 0, 0, 0, 0, 0])

    def total(told_LE: Tensor) -> Tensor:
        told_LE[0, :6] += others
        return told_LE

    assert first.load_E is not None
    assert second.load_E is not None
    loads = [first.load_E + others, second.load_E.double()]
    after_update(model, total)
    for layer, load_E in zip((first, second), loads, strict=True):
        want = 0.01 * (load_E.double().mean() - load_E).sign().double()
        assert layer.router.expert_bias is not None
        torch.testing.assert_close(layer.router.expert_bias.double(), want, rtol=0, atol=1e-9)
        assert layer.load_E is None


def test_the_bias_changes_the_choice_and_not_the_weights() -> None:
    layer = layer_of(Experts(count=4, top_k=2, bias_rate=0.1, normalise_top_k=False), 0)
    assert layer.router.expert_bias is not None
    with torch.no_grad():
        layer.router.expert_bias.copy_(torch.tensor([0.0, 100.0, 0.0, 50.0]))
    x = states(1, 7, 0)
    scores_NE = layer.router(x.flatten(0, 1))
    assert {tuple(row) for row in layer.router.choose(scores_NE, 2).tolist()} == {(1, 3)}
    torch.testing.assert_close(layer(x), oracle.layer(x, weights_of(layer), layer.settings))


@pytest.mark.parametrize("how", [{"bias_rate": 0.02}, {"aux_loss": 0.3}])
def test_a_load_that_is_uneven_becomes_even(how: dict[str, float]) -> None:
    layer = layer_of(Experts(count=4, top_k=1, normalise_top_k=False, **how), 0)  # type: ignore[arg-type]  # floats only
    with torch.no_grad():
        layer.router.weight.mul_(0.3)
        if layer.router.expert_bias is not None:
            layer.router.expert_bias.zero_()
        layer.router.weight[0] += 0.6
    optimizer = torch.optim.SGD([layer.router.weight], lr=1.0)
    x, loads = states(4, 32, 0) + 0.5, []
    for _ in range(60):
        optimizer.zero_grad()
        with balanced(layer, rows=4):
            (layer(x).sum() * 0.0).backward()
        optimizer.step()
        loads.append(float(after_update(layer)["experts/max_load"]))
    assert loads[0] > 2.0
    assert sum(loads[-5:]) / 5 < 1.5


def test_an_exchange_may_reorder_as_long_as_it_gives_back_in_order() -> None:
    layer, x = layer_of(Experts(count=5, top_k=2), 1), states(2, 6, 1)
    want, seen = layer(x), []

    def elsewhere(x_MD: Tensor, counts_E: Tensor, experts: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        seen.append((x_MD.shape[0], int(counts_E.sum())))
        runs = x_MD.split(counts_E.tolist())
        parts = []
        for e, run in enumerate(runs):
            alone = torch.zeros_like(counts_E)
            alone[e] = run.shape[0]
            parts.append(experts(run, alone))
        return torch.cat(parts)

    layer.exchange = elsewhere
    torch.testing.assert_close(layer(x), want)
    assert seen == [(24, 24)]


# --- first values, settings --------------------------------------------------------------------------------------


def test_an_expert_starts_from_its_own_draws_whoever_holds_it() -> None:
    name = "blocks.1.ffn.experts.down_proj"
    whole = first_value(name, (4, 64, 256), 8, 7)
    assert torch.equal(first_expert(name, (64, 256), 8, 7, 2), whole[2])
    assert torch.equal(first_value(name, (3, 64, 256), 8, 7), whole[:3])
    assert not torch.equal(whole[0], whole[1])
    assert float(whole.std()) == pytest.approx(1 / 16 / 4, rel=0.02)
    assert float(first_value(name.replace("down", "up"), (4, 64, 256), 8, 7).std()) == pytest.approx(1 / 16, rel=0.02)
    assert not first_value("blocks.1.ffn.router.expert_bias", (4,), 8, 7).any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model.experts.top_k=9"], "of 8 experts; the most is 8"),
        (["model.experts.first_dense=4"], "The most is 3"),
        (["model.experts.top_k=1"], "set it to false"),
    ],
)
def test_bad_settings_name_the_nearest_legal_value(settings: list[str], words: str) -> None:
    from lmworks.core.errors import RecipeError

    with pytest.raises(RecipeError) as caught:
        load_recipe("moe", verb="train", sets=settings)
    assert words in str(caught.value)
