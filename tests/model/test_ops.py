"""The arithmetic under the layers against slow formulas, and every hand-written gradient against differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmworks.model import ops, tiles
from lmworks.model.attention import Reach, attend, boolean_mask, reach
from lmworks.model.block_mask import block_mask
from lmworks.model.decoder import SwiGLU
from lmworks.model.rotary import RopeScaling, Rotary
from tests.model.toy import built
from tests.oracles import formulas

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


@pytest.mark.parametrize("plain", [False, True])
def test_rms_norm_is_its_formula(plain: bool) -> None:
    x, weight = normal(3, 5, 8), normal(8, seed=1)
    if plain:
        with ops.plain_forms():
            found = ops.rms_norm(x, weight, 1e-5)
    else:
        found = ops.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(found, formulas.rms_norm(x, weight, 1e-5), rtol=0, atol=1e-14)


def test_rms_norm_gradient() -> None:
    assert torch.autograd.gradcheck(lambda x, w: ops.rms_norm(x, w, 1e-5), (normal(3, 4, 8), normal(8, seed=1)))


def test_rms_norm_takes_a_strided_head() -> None:
    x = normal(2, 3, 10)
    view = x[..., :8].unflatten(-1, (2, 4))
    weight = normal(4, seed=1)
    torch.testing.assert_close(ops.rms_norm(view, weight, 1e-6), formulas.rms_norm(view, weight, 1e-6))
    assert torch.autograd.gradcheck(lambda x, w: ops.rms_norm(x[..., :8].unflatten(-1, (2, 4)), w, 1e-6), (x, weight))


def test_swiglu_feed_forward_is_its_formula() -> None:
    layer = SwiGLU(4, 6).double()
    weights = (normal(6, 4, seed=1), normal(6, 4, seed=2), normal(4, 6, seed=3))
    with torch.no_grad():
        for part, weight in zip((layer.gate_proj, layer.up_proj, layer.down_proj), weights, strict=True):
            part.weight.copy_(weight)
    x = normal(7, 4)
    torch.testing.assert_close(layer(x), formulas.swiglu_ffn(x, *weights), rtol=0, atol=1e-13)


@pytest.mark.skipif(not ops.ONEDNN, reason="this torch cannot ask oneDNN for float32 products")
@pytest.mark.parametrize("biased", [False, True])
def test_float32_linear_and_its_gradients_are_those_of_torch(biased: bool) -> None:
    x, weight, bias = (normal(*s, seed=i, dtype=torch.float32) for i, s in enumerate([(2, 9, 5), (7, 5), (7,)]))
    chosen = bias if biased else None
    leaves = (x, weight, bias) if biased else (x, weight)
    upstream = normal(2, 9, 7, seed=9, dtype=torch.float32).detach()
    ours, theirs = ops.linear(x, weight, chosen), torch.nn.functional.linear(x, weight, chosen)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    for got, want in zip(
        torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(theirs, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_linear_casts_the_master_weight_to_the_activation() -> None:
    x, weight = normal(4, 6, dtype=torch.bfloat16), normal(5, 6, seed=1, dtype=torch.float32)
    out = ops.linear(x, weight, None)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, torch.nn.functional.linear(x, weight.bfloat16()))
    out.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("width", [8, 4])
def test_rotation_is_its_formula(width: int) -> None:
    x = normal(2, 5, 3, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1], [3, 4, 5, 6, 7]])
    cos, sin = Rotary(theta=100.0, width=width).tables(positions)
    found = ops.rotate(x, cos.double(), sin.double())
    want = formulas.rope(x.detach(), positions, formulas.frequencies(100.0, width))
    torch.testing.assert_close(found.detach(), want, rtol=0, atol=2e-6)  # the tables are float32
    assert torch.autograd.gradcheck(lambda x: ops.rotate(x, cos.double(), sin.double()), (x,))


def test_llama3_scaling_is_the_published_rule() -> None:
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)
    found = Rotary(theta=500000.0, width=128, scaling=scaling).frequencies(CPU)
    plain = formulas.frequencies(500000.0, 128)
    want = formulas.llama3_frequencies(plain, factor=8.0, low=1.0, high=4.0, original=8192)
    torch.testing.assert_close(found.double(), torch.tensor(want, dtype=torch.float64), rtol=2e-6, atol=0)
    kept = [f == p for f, p in zip(want, plain, strict=True)]
    assert any(kept)
    assert not all(kept)


DOCUMENTS = torch.tensor([[0] * 3 + [1] * 8, [2] * 5 + [1] * 6])
INTERRUPTED = torch.tensor([[0, 0, 1, 1, 0, 0, 2, 2, 2, 2, 2], [0] * 11])
REACHES = [
    pytest.param(None, None, id="causal"),
    pytest.param(3, None, id="window"),
    pytest.param(None, DOCUMENTS, id="packed"),
    pytest.param(4, DOCUMENTS, id="packed and windowed"),
    pytest.param(None, INTERRUPTED, id="interrupted"),
]


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (6, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize(("window", "documents"), REACHES)
def test_attention_is_its_formula(
    window: int | None, documents: Tensor | None, heads: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "TILE", 4)
    q, k, v = normal(2, 11, heads, 6), normal(2, 11, groups, 6, seed=1), normal(2, 11, groups, 6, seed=2)
    want = formulas.attention(q, k, v, window, documents)
    for chosen in (ours(2, 11, window, documents), Reach(mask=boolean_mask(11, 11, window, documents, CPU))):
        found = attend(q, k.transpose(1, 2), v.transpose(1, 2), chosen)
        torch.testing.assert_close(found, want, rtol=0, atol=1e-13)


def ours(batch: int, length: int, window: int | None, documents: Tensor | None, cached: int = 0) -> Reach:
    return reach(
        batch=batch,
        new=length,
        cached=cached,
        window=window,
        documents_BK=documents,
        device=CPU,
        dtype=torch.float64,
    )


@pytest.mark.parametrize(("window", "documents"), REACHES[:4])
def test_the_gradient_of_tiles(window: int | None, documents: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 4)
    chosen = ours(2, 11, window, documents)
    assert chosen.tiles is not None
    arguments = (normal(2, 11, 2, 2), normal(2, 11, 1, 2, seed=1), normal(2, 11, 1, 2, seed=2))
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k.transpose(1, 2), v.transpose(1, 2), chosen), arguments)


def test_the_kind_of_reach_is_chosen_by_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ours(2, 11, None, INTERRUPTED).mask is not None
    assert ours(2, 1, None, None, cached=9) == Reach()
    assert ours(2, 2, None, None, cached=9).mask is not None
    monkeypatch.setattr(tiles, "MOST_KEYS", 2)
    assert ours(2, 11, None, None) == Reach(causal=True)
    assert ours(2, 11, 9, None).mask is not None
    spans = ours(2, 11, None, DOCUMENTS).spans
    assert spans == ((0, 0, 3), (0, 3, 11), (1, 0, 5), (1, 5, 11))
    with ops.plain_forms():
        assert ours(2, 11, None, DOCUMENTS).mask is not None


def test_long_documents_are_attended_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "MOST_KEYS", 2)
    q, k, v = normal(2, 11, 4, 6), normal(2, 11, 2, 6, seed=1), normal(2, 11, 2, 6, seed=2)
    found = attend(q, k.transpose(1, 2), v.transpose(1, 2), ours(2, 11, None, DOCUMENTS))
    torch.testing.assert_close(found, formulas.attention(q, k, v, None, DOCUMENTS), rtol=0, atol=1e-13)


def test_hand_written_gradients_refuse_to_be_differentiated_again() -> None:
    x, weight = normal(3, 8), normal(8, seed=1)
    (first,) = torch.autograd.grad(ops.rms_norm(x, weight, 1e-5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    with ops.plain_forms():
        assert torch.autograd.gradgradcheck(lambda x, w: ops.rms_norm(x, w, 1e-5), (x, weight))


def test_scores_of_bfloat16_attention_are_float32() -> None:
    """Large logits: rounded to 8 bits they would err by 1.6 % of the output; the fused kernel errs by 0.2 %."""
    q, k, v = (normal(1, 64, 2, 64, seed=i).detach() * scale for i, scale in enumerate((4.0, 4.0, 1.0)))
    half = [x.bfloat16() for x in (q, k, v)]
    exact = formulas.attention(*(x.double() for x in half), None, None)
    chosen = reach(batch=1, new=64, cached=0, window=None, documents_BK=None, device=CPU, dtype=torch.bfloat16)
    assert chosen.tiles is not None
    found = attend(half[0], half[1].transpose(1, 2), half[2].transpose(1, 2), chosen)
    assert float((found.double() - exact).norm() / exact.norm()) < 0.005


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize(("window", "documents"), REACHES)
def test_the_block_mask_for_gpus_sees_what_the_formula_sees(window: int | None, documents: Tensor | None) -> None:
    """FlexAttention uncompiled on the CPU: the mask and the grouping, not the GPU kernel."""
    q, k, v = (x.detach().float() for x in (normal(2, 11, 4, 16), normal(2, 11, 2, 16, seed=1), normal(2, 11, 2, 16)))
    blocks = block_mask(2, 11, window, documents, CPU)
    found = attend(q, k.transpose(1, 2), v.transpose(1, 2), Reach(blocks=blocks))
    want = formulas.attention(q.double(), k.double(), v.double(), window, documents)
    torch.testing.assert_close(found.double(), want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_the_model_compiles_to_the_same_function(packed: bool) -> None:
    """Traced without a break, run by the eager backend: no C++ compiler is asked for."""
    torch.compiler.reset()
    model = built("mixed", dtype=torch.float32)
    read_BT = torch.arange(22).view(2, 11)
    documents = DOCUMENTS if packed else None
    traced = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(
            traced(read_BT, documents_BT=documents), model(read_BT, documents_BT=documents), rtol=0, atol=4e-6
        )
