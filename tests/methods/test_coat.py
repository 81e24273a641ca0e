"""COAT's blocks and runs: formulas against an oracle, what is kept, every refusal, and going on to the bit."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lmworks.core.errors import NonFinite, RecipeError, UsageError
from lmworks.core.journal import rows
from lmworks.core.run import RunFolder
from lmworks.maths.float8 import E4M3, E5M2, by_tensor
from lmworks.methods.coat.blocks import CoatActivations
from lmworks.methods.coat.halves import FeedForward, NormProducts, Product
from lmworks.methods.coat.states import Coat
from lmworks.model import ops
from lmworks.model.backbone import Backbone
from lmworks.model.decoder import DecoderConfig
from lmworks.model.init import initialise
from lmworks.parallel.footprint import predict
from lmworks.parallel.layout import Layout
from lmworks.train.ledger import Ledger
from lmworks.train.objective import CrossEntropy
from lmworks.train.optim import AdamW
from lmworks.train.probe import Probe
from lmworks.train.saved import Keep
from tests.oracles import coat as oracle
from tests.train import toy


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def off(found: Tensor, want: Tensor) -> float:
    """Relative distance in the Frobenius norm."""
    return float((found.double() - want.double()).norm() / want.double().norm())


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in tensors]


def compare(ours: Any, theirs: Any, tensors: list[Tensor], seed: int) -> None:
    """Value and all gradients. A value that lies between two codes may fall to the other side in float32, so what is
    compared is the norm: one rounding too many or too few would move it by 0.02 and more."""
    own, exact = leaves(tensors), leaves([t.double() for t in tensors])
    outs, wants = ours(*own), theirs(*exact)
    for out, want in zip(outs, wants, strict=True):
        assert off(out.detach(), want.detach()) < 2e-3
    weights = [randn(*out.shape, seed=seed + i) for i, out in enumerate(outs)]
    torch.autograd.backward(outs, weights)
    torch.autograd.backward(wants, [w.double() for w in weights])
    for a, b in zip(own, exact, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert off(a.grad, b.grad) < 4e-3


@pytest.mark.parametrize("seed", range(3))
def test_norm_and_products_are_the_formula(seed: int) -> None:
    tensors = [
        randn(32, 64, seed=seed),
        1 + 0.1 * randn(64, seed=7),
        randn(48, 64, seed=8) / 8,
        randn(16, 64, seed=9) / 8,
    ]

    def ours(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Any:
        return NormProducts.apply(x, w, 1e-5, a, b)

    def theirs(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Any:
        y = oracle.norm(x, w, 1e-5)
        return oracle.linear(y, a), oracle.linear(y, b)

    compare(ours, theirs, tensors, seed)


@pytest.mark.parametrize("seed", range(3))
def test_the_feed_forward_layer_is_the_formula(seed: int) -> None:
    shapes = [(48, 32), (48, 32), (32, 48)]
    matrices = [randn(*shape, seed=20 + i) / 6 for i, shape in enumerate(shapes)]
    tensors = [randn(64, 32, seed=seed), 1 + 0.1 * randn(32, seed=7), *matrices]

    def ours(x: Tensor, w: Tensor, *rest: Tensor) -> Any:
        return (FeedForward.apply(x, w, 1e-5, *rest),)

    def theirs(x: Tensor, w: Tensor, *rest: Tensor) -> Any:
        return (oracle.feed_forward(x, w, 1e-5, *rest),)

    compare(ours, theirs, tensors, seed)


def test_a_product_alone_is_the_formula() -> None:
    def ours(x: Tensor, w: Tensor) -> Any:
        return (Product.apply(x, w),)

    def theirs(x: Tensor, w: Tensor) -> Any:
        return (oracle.linear(oracle.through(oracle.by_tensor, x), w),)

    compare(ours, theirs, [randn(48, 32), randn(64, 32, seed=1)], 0)


def test_one_product_is_near_the_exact_one() -> None:
    """The dossier's bounds at a width of 64: 0.05 forward in E4M3, 0.10 for gradients in E5M2."""
    x, w, grad = randn(256, 64), randn(64, 64, seed=1) / 8, randn(256, 64, seed=2)
    ours, exact = leaves([x, w]), leaves([x, w])
    out, want = Product.apply(*ours), exact[0] @ exact[1].t()
    assert off(out.detach(), want.detach()) < 0.05
    out.backward(grad)
    want.backward(grad)
    for a, b in zip(ours, exact, strict=True):
        assert off(a.grad, b.grad) < 0.10  # type: ignore[arg-type]


def test_the_formats_scale_the_largest_value_to_their_largest_number() -> None:
    x = randn(64, 64) * 3
    for form in (E4M3, E5M2):
        assert float(by_tensor(x, form).codes.float().abs().max()) == form.largest


# --- blocks -----------------------------------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "groups": {"n_kv_heads": 2},
    "biases": {"qkv_bias": True},
    "qk-norm": {"qk_norm": True},
    "window": {"sliding_window": 16},
    "parallel": {"parallel_block": True},
    "uneven": {"ffn_size": (96, 160)},
    "experts": {"experts": {"count": 4, "top_k": 2}},
}


def model(dtype: torch.dtype = torch.float32, saved: Any = None, books: Ledger | None = None, **over: Any) -> Backbone:
    from lmworks.model.moe import Experts

    experts = over.pop("experts", None)
    settings = {"vocab_size": 61, "n_layers": 2, "hidden_size": 64, "n_heads": 4, "ffn_size": 160, **over}
    if experts is not None:
        settings["experts"] = Experts(**experts)
    made = DecoderConfig(**settings).build(dtype=dtype, device=torch.device("cpu"))
    initialise(made, 0)
    (saved or Keep()).apply(made, books)
    return made


def learn(made: Backbone, length: int = 64) -> tuple[float, dict[str, Tensor]]:
    batch = toy.batch(4, length, 61, packed=True)
    loss = CrossEntropy().loss(made, batch)["cross_entropy"].total / batch.targets_BT.numel()
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_block_of_any_shape_learns_about_what_the_exact_one_learns(name: str, dtype: torch.dtype) -> None:
    exact_loss, exact = learn(model(dtype, **SHAPES[name]))
    loss, found = learn(model(dtype, CoatActivations(), **SHAPES[name]))
    assert loss == pytest.approx(exact_loss, rel=5e-3)
    assert loss != exact_loss
    assert found.keys() == exact.keys()
    ours, theirs = (torch.cat([g[n].flatten().float() for n in exact]) for g in (found, exact))
    # a token whose two best experts are nearly equal may go to another one
    assert float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0)) > (0.95 if name == "experts" else 0.98)


def test_passes_without_gradient_and_plain_forms_are_exact() -> None:
    batch = toy.batch(2, 32, 61)
    exact, coat = model(), model(saved=CoatActivations())
    with torch.no_grad():
        assert torch.equal(coat(batch.tokens_BT), exact(batch.tokens_BT))
    with ops.plain_forms():
        assert torch.equal(coat(batch.tokens_BT), exact(batch.tokens_BT))
    assert not torch.equal(coat(batch.tokens_BT), exact(batch.tokens_BT))


def test_what_is_kept_is_what_the_formula_says() -> None:
    """Per token of a block, in bytes: 16 D + 8 F in bf16, and copies of the weights; 12.25 D + 4.375 F in codes. What
    attention keeps beside q, k, v and its output is the same in both."""
    width, ffn, tokens = 256, 704, 4 * 64
    weights = 2 * (4 * width * width + 3 * width * ffn) / tokens
    peaks = {}
    for name, saved in (("keep", Keep()), ("coat", CoatActivations())):
        books = Ledger()
        made = model(torch.bfloat16, saved, books, hidden_size=width, ffn_size=ffn, n_layers=3)
        books.begin()
        with books.counting():
            learn(made)
        peaks[name] = books.at_peak["1"] / tokens
    attention = peaks["keep"] - (16 * width + 8 * ffn) - weights
    assert 0 < attention < 0.1 * peaks["keep"]
    assert peaks["coat"] - attention == pytest.approx(12.25 * width + 4.375 * ffn, rel=1e-3)
    assert peaks["coat"] <= 0.70 * (peaks["keep"] - weights)


@pytest.mark.parametrize(("length", "packed"), [(64, False), (384, True), (1536, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["plain", "groups", "qk-norm", "window", "parallel", "uneven"])
def test_saved_bytes_are_told_within_a_tenth(name: str, dtype: torch.dtype, length: int, packed: bool) -> None:
    books = Ledger()
    made = model(dtype, CoatActivations(), books, vocab_size=257, **SHAPES[name])
    batch = toy.batch(1, length, 257, packed=packed)
    with books.counting():
        (CrossEntropy().loss(made, batch)["cross_entropy"].total / length).backward()
    recipe = SimpleNamespace(
        model=made.config,
        batch_size=1,
        micro_batch_size=None,
        compile=False,
        device="cpu",
        precision="bf16" if dtype == torch.bfloat16 else "fp32",
        saved=CoatActivations(),
        optimizer=AdamW(lr=1e-3),
        data=SimpleNamespace(sequence_length=length),
    )
    told = predict(recipe, Layout(dp_shard=1), 0, vocabulary=257, document=1 / 0.15 if packed else None)
    assert told.saved == pytest.approx(books.peak, rel=0.1)


def test_nothing_wider_than_codes_is_kept_but_by_attention() -> None:
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    x, w, *matrices = leaves([randn(32, 64), torch.ones(64), randn(48, 64), randn(48, 64), randn(64, 48)])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        FeedForward.apply(x.bfloat16(), w, 1e-5, *matrices)
    codes = [tuple(t.shape) for t in kept if t.dtype == torch.float8_e4m3fn]
    assert codes == [(32, 64), (64, 32), (32, 48), (32, 48), (32, 48), (48, 32)]
    assert sorted(tuple(t.shape) for t in kept if t.dtype == torch.float32 and not t.requires_grad) == [(), (), (32,)]


# --- refusals ---------------------------------------------------------------------------------------------------------


ADAMW = {"use": "adamw", "lr": 1e-3}
GPT2 = {"use": "gpt2", "n_layers": 2, "hidden_size": 32, "n_heads": 2, "ffn_size": 64}


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"saved": "coat", "model": GPT2}, "'decoder'"),
        ({"saved": "coat", "layout": {"tp": 2}}, "not divided over tp"),
        ({"saved": "coat", "precision": "float8"}, "on eight-bit floats themselves"),
        ({"saved": {"use": "offload", "around": "offload"}}, "saved.around: sends saved tensors out itself"),
        ({"saved": "coat", "model.hidden_size": 40, "model.n_heads": 2}, "model.hidden_size makes rows of 40: take 48"),
        ({"saved": "coat", "model.ffn_size": 50}, "model.ffn_size makes rows of 50: take 64"),
        ({"saved": "coat", "batch_size": 1, "data.sequence_length": 31}, "multiple of 16 tokens"),
        ({"optimizer": {"use": "coat", "around": ADAMW, "first": "expand"}}, "first: got 'expand'"),
        ({"optimizer": {"use": "coat", "around": ADAMW, "expand": "expand"}}, "expand: got 'expand'"),
        ({"optimizer": {"use": "coat", "around": ADAMW, "group": 100}}, "take 112"),
        ({"optimizer": {"use": "coat", "around": {"use": "coat", "around": ADAMW}}}, "coded once"),
        ({"optimizer": {"use": "coat", "around": {"use": "sophia", "lr": 1e-3}, "shadow": True}}, "shadow: works with"),
        ({"optimizer": {"use": "coat", "around": ADAMW, "expand": False, "floor": 1.0}}, "no effect"),
        ({"optimizer": {"use": "coat"}}, "around: coat needs a value here"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(over: dict[str, Any], said: str, text: Path, cache: Path) -> None:
    from lmworks.core import recipe as recipes

    plain = {name: value for name, value in over.items() if "." not in name}
    table = recipes.with_values(toy.table(text, cache, **plain), {k: v for k, v in over.items() if "." in k})
    with pytest.raises(RecipeError) as caught:
        recipes.decode(table)
    assert said in str(caught.value)


def test_weights_that_are_not_float32_are_refused_by_name() -> None:
    made = model().bfloat16()
    with pytest.raises(UsageError, match=r"embed\.weight is torch\.bfloat16"):
        Coat(around=AdamW(lr=1e-3)).build(made)


def test_products_that_somebody_adapted_are_refused() -> None:
    made = model()
    made.get_submodule("blocks.0.attn.q_proj").register_forward_hook(lambda *a: None)
    with pytest.raises(UsageError, match="block 0"):
        CoatActivations().apply(made)


def test_a_gradient_that_is_not_finite_leaves_codes_as_they_are() -> None:
    from tests.train.test_step import step_on

    made = model()
    optimizer = Coat(around=AdamW(lr=1e-2))
    step = step_on(made, [toy.batch(2, 16, 61)], optimizer=optimizer)
    step()
    before = {name: x.clone() for name, x in step.update.state().items()}
    made.get_parameter("norm.weight").register_hook(lambda grad: torch.full_like(grad, math.nan))
    with pytest.raises(NonFinite):
        step()
    after = step.update.state()
    assert all(torch.equal(x.float(), after[name].float()) for name, x in before.items())


# --- runs -------------------------------------------------------------------------------------------------------------

BOTH = {
    "saved": "coat",
    "optimizer": {"use": "coat", "around": {"use": "adamw", "lr": 1e-2}},
}


@pytest.mark.parametrize("around", ["adamw", "lion", "sophia", "lamb", "muon"])
def test_state_bytes_are_told_to_the_byte(around: str, text: Path, cache: Path, tmp_path: Path) -> None:
    over = {"optimizer": {"use": "coat", "around": {"use": around, "lr": 1e-3}}}
    made = toy.recipe(text, cache, steps=2, **over)
    folder, _ = toy.train(made, tmp_path / "run")
    seen = next(row["state_bytes"] for row in rows(folder.metrics) if "state_bytes" in row)
    shapes = dict(made.model.with_vocab(257).shapes())
    assert made.optimizer.state_bytes(shapes) == seen


@pytest.mark.parametrize("around", ["adamw", "lion", "sophia", "lamb", "muon"])
def test_a_stopped_run_goes_on_to_the_bit(around: str, text: Path, cache: Path, tmp_path: Path) -> None:
    over = {**BOTH, "optimizer": {"use": "coat", "around": {"use": around, "lr": 1e-3}}, "micro_batch_size": 2}
    made = toy.recipe(text, cache, **over)
    whole, _ = toy.train(made, tmp_path / "whole")
    assert toy.stopped(made, tmp_path / "run", 5).exit_code == 3
    folder, _ = toy.train(made, tmp_path / "run")
    assert toy.learned(folder) == toy.learned(whole)


def losses(folder: RunFolder) -> list[float]:
    return [row["loss"] for row in rows(folder.metrics) if "loss" in row]


def test_a_run_learns_about_what_adamw_learns(text: Path, cache: Path, tmp_path: Path) -> None:
    exact, _ = toy.train(toy.recipe(text, cache, steps=40), tmp_path / "exact")
    coat, _ = toy.train(toy.recipe(text, cache, steps=40, **BOTH), tmp_path / "coat")
    ends = [losses(folder)[-1] for folder in (exact, coat)]
    assert ends[1] == pytest.approx(ends[0], abs=0.15)
    assert ends[1] < 0.8 * losses(coat)[0]


@pytest.mark.parametrize("saved", ["offload", "ssdtrain", "by-block"])
def test_codes_wait_elsewhere_as_well(saved: str, text: Path, cache: Path, tmp_path: Path) -> None:
    """What goes out to the disk is in eight bits, and comes back to the bit."""
    settings = {"use": saved, "around": "coat", "folders": [str(tmp_path / "disk")], "least_bytes": 0}
    if saved == "by-block":
        settings = {"use": saved, "rules": [{"blocks": "0-1", "policy": "coat"}]}
    elsewhere, _ = toy.train(toy.recipe(text, cache, steps=6, **{**BOTH, "saved": settings}), tmp_path / "elsewhere")
    here, _ = toy.train(toy.recipe(text, cache, steps=6, **BOTH), tmp_path / "here")
    assert losses(elsewhere) == losses(here)
    if saved == "offload":
        stored = [row["offload/stored"] + row["offload/forwarded"] for row in rows(elsewhere.metrics) if "loss" in row]
        exact, _ = toy.train(toy.recipe(text, cache, steps=6, saved={**settings, "around": "keep"}), tmp_path / "exact")
        wide = [row["offload/stored"] + row["offload/forwarded"] for row in rows(exact.metrics) if "loss" in row]
        assert sum(stored) < 0.6 * sum(wide)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at all inputs
def test_compiled_blocks_learn_the_same(text: Path, cache: Path, tmp_path: Path) -> None:
    eager, _ = toy.train(toy.recipe(text, cache, steps=4, **BOTH), tmp_path / "eager")
    compiled, _ = toy.train(toy.recipe(text, cache, steps=4, **BOTH, compile=True), tmp_path / "compiled")
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-3)


def test_two_micro_batches_have_the_gradient_of_both(text: Path, cache: Path, tmp_path: Path) -> None:
    """Scales are of a micro-batch, so only about."""
    one, _ = toy.train(toy.recipe(text, cache, steps=3, **BOTH), tmp_path / "one")
    two, _ = toy.train(toy.recipe(text, cache, steps=3, **BOTH, micro_batch_size=2), tmp_path / "two")
    assert losses(two) == pytest.approx(losses(one), rel=2e-2)


def test_sophias_curvature_is_asked_of_the_exact_model() -> None:
    made = model(saved=CoatActivations(), n_layers=1)
    probe = Probe(made, CrossEntropy(), seed=0)
    vectors = [torch.ones_like(p) for p in made.parameters()]
    products = probe.hessian_product(toy.batch(2, 16, 61), list(made.parameters()), vectors)
    exact = model(n_layers=1)
    want = Probe(exact, CrossEntropy(), seed=0).hessian_product(toy.batch(2, 16, 61), list(exact.parameters()), vectors)
    assert all(torch.equal(a, b) for a, b in zip(products, want, strict=True))
