"""Products in float8 against codes multiplied slowly, and where they are not taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lmworks.model import ops
from lmworks.model.decoder import DecoderConfig
from lmworks.model.float8 import Scales, float8_product, use_float8
from lmworks.model.init import initialise
from lmworks.model.layers import Linear, SwiGLU, is_plain
from lmworks.model.moe import Experts
from tests.oracles import float8 as oracle

pytest.importorskip("torchao", reason="needs the extra gpu")

KINDS: list[Scales] = ["tensorwise", "rowwise"]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal values, a few of them large, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.01, 8 * values, values).to(dtype).requires_grad_()


def error(found: Tensor | None, want: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    assert found is not None
    return float((found.detach().double() - want.detach().double()).norm() / want.detach().double().norm())


def decoder(**over: Any) -> Any:
    sizes = {"vocab_size": 257, "n_layers": 2, "hidden_size": 32, "n_heads": 2, "n_kv_heads": 1, "ffn_size": 48, **over}
    model = DecoderConfig(**sizes).build(dtype=torch.bfloat16)
    initialise(model, 0)
    return model


@pytest.mark.parametrize("scales", KINDS)
@pytest.mark.parametrize("biased", [False, True])
def test_product_and_gradients_are_those_of_codes(scales: Scales, biased: bool) -> None:
    x, weight = drawn(2, 24, 64), drawn(80, 64, seed=1, dtype=torch.float32)
    bias = drawn(80, seed=2, dtype=torch.float32) if biased else None
    grad = drawn(2, 24, 80, seed=3).detach()
    found = float8_product(scales)(x, weight, bias)
    assert found.dtype == torch.bfloat16
    found.backward(grad)
    out, grad_x, grad_weight = oracle.linear(x.flatten(0, 1), weight, grad.flatten(0, 1), scales)
    if bias is not None:
        out = out + bias
        assert error(bias.grad, grad.flatten(0, 1).float().sum(0)) < 2**-8
    for got, want in ((found.flatten(0, 1), out), (x.grad.flatten(0, 1), grad_x), (weight.grad, grad_weight)):
        assert error(got, want) < 2**-8, "what is left is the rounding of results to bf16"
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("scales", KINDS)
def test_the_error_is_that_of_eight_bits(scales: Scales) -> None:
    """Two factors with three bits of mantissa, or one with two: 0.04 and 0.07 of the product, as for COAT."""
    x, weight, grad = drawn(64, 64), drawn(64, 64, seed=1, dtype=torch.float32), drawn(64, 64, seed=3).detach()
    found = float8_product(scales)(x, weight, None)
    found.backward(grad)
    of_gradients = 0.10 if scales == "tensorwise" else 0.05
    assert 0.01 < error(found, x.float() @ weight.T) < 0.05
    assert 0.01 < error(x.grad, grad.float() @ weight) < of_gradients
    assert 0.01 < error(weight.grad, grad.float().T @ x.float()) < of_gradients


@pytest.mark.parametrize("scales", KINDS)
def test_codes_multiplied_in_float32_give_the_same(scales: Scales, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a torch that has no such product on a CPU."""
    x, weight, found = drawn(32, 64), drawn(48, 64, seed=1, dtype=torch.float32), []
    for takes in (True, False):
        monkeypatch.setattr("lmworks.model.float8._cpu_takes", lambda scales, takes=takes: takes)
        try:
            found.append(float8_product(scales)(x, weight, None))
        except RuntimeError:
            pytest.skip("this torch has no such product on a CPU")
    assert error(found[1], found[0]) < 2**-8


@pytest.mark.parametrize("scales", KINDS)
def test_zeros_stay_zeros(scales: Scales) -> None:
    x, weight = torch.zeros(16, 32, dtype=torch.bfloat16, requires_grad=True), drawn(16, 32, dtype=torch.float32)
    found = float8_product(scales)(x, weight, None)
    found.sum().backward()
    assert not found.any()
    assert torch.isfinite(x.grad).all()
    assert not weight.grad.any()


def test_a_value_that_is_not_finite_is_not_hidden() -> None:
    x, weight = drawn(16, 32), drawn(16, 32, seed=1, dtype=torch.float32)
    with torch.no_grad():
        x[3, 5] = torch.nan
    assert not torch.isfinite(float8_product("tensorwise")(x, weight, None)).all()


def test_only_what_trains_is_in_float8() -> None:
    product, x, weight = float8_product("tensorwise"), drawn(16, 32), drawn(48, 32, seed=1, dtype=torch.float32)
    plain = ops.linear(x, weight, None)
    assert not torch.equal(product(x, weight, None), plain)
    with torch.no_grad():
        assert torch.equal(product(x, weight, None), plain)
    with ops.plain_forms():
        assert torch.equal(product(x, weight, None), plain)
    assert torch.equal(product(x[:15], weight, None), ops.linear(x[:15], weight, None)), "15 tokens do not fit"


def test_only_the_blocks_linear_layers_that_fit() -> None:
    model = decoder(ffn_size=(48, 40), tied=False)
    left = use_float8(model, "tensorwise")
    assert left == ["blocks.1.ffn.gate_proj", "blocks.1.ffn.up_proj", "blocks.1.ffn.down_proj"]
    changed = {n for n, m in model.named_modules() if isinstance(m, Linear) and m.product is not ops.linear}
    assert changed == {
        *(f"blocks.{i}.attn.{name}_proj" for i in (0, 1) for name in "qkvo"),
        *(f"blocks.0.ffn.{name}_proj" for name in ("gate", "up", "down")),
    }
    assert list(model.state_dict()) == list(decoder(ffn_size=(48, 40), tied=False).state_dict())


def test_experts_stay_out() -> None:
    model = decoder(experts=Experts(count=4, size=16))
    assert use_float8(model, "tensorwise") == []
    changed = {
        n.split(".", 2)[2] for n, m in model.named_modules() if isinstance(m, Linear) and m.product is not ops.linear
    }
    assert changed == {f"attn.{name}_proj" for name in "qkvo"}


@pytest.mark.parametrize("scales", KINDS)
def test_a_model_answers_without_gradient_as_in_bf16(scales: Scales) -> None:
    plain, model = decoder(), decoder()
    use_float8(model, scales)
    tokens = torch.arange(32)[None] % 7
    with torch.no_grad():
        assert torch.equal(model(tokens), plain(tokens))
    assert not torch.equal(model(tokens), plain(tokens))
    assert not any(is_plain(layer) for layer in model.blocks.modules()), "whoever computes layers together leaves these"
    assert all(is_plain(layer) for layer in plain.blocks.modules() if isinstance(layer, Linear))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # what torch.compile itself looks at
@pytest.mark.parametrize("scales", KINDS)
def test_compiled_products_are_the_same_to_the_last_bit(scales: Scales) -> None:
    """Traced without a break, run by eager kernels: no C++ compiler is asked for."""
    torch.compiler.reset()
    layer = SwiGLU(32, 48)
    for seed, part in enumerate(layer.children()):
        part.product = float8_product(scales)
        with torch.no_grad():
            part.weight.copy_(drawn(*part.weight.shape, seed=seed, dtype=torch.float32))
    found = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        x = drawn(2, 16, 32)
        layer.zero_grad()
        out = run(x)
        out.backward(drawn(2, 16, 32, seed=5).detach())
        found.append([out.detach(), x.grad, *(part.weight.grad for part in layer.children())])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_blocks_answer_without_gradient_as_in_bf16() -> None:
    torch.compiler.reset()
    plain, model = decoder(), decoder()
    use_float8(model, "tensorwise")
    for either in (plain, model):
        either.compiled_blocks = True
        for block in either.blocks.values():
            block.compile(backend="aot_eager", fullgraph=True)
    tokens = torch.arange(32)[None] % 7
    assert not torch.equal(model(tokens), plain(tokens))
    with torch.no_grad():
        assert torch.equal(model(tokens), plain(tokens))
