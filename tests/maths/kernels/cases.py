"""What each kernel must do, on any device: the tests beside this file choose sizes, `test_gpu.py` the device.

Values are held against slow formulas in float64, eight-bit codes against `maths.float8` to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lmworks.maths import blockwise, float8, kernels
from lmworks.maths.blockwise import Code, Runs
from lmworks.maths.float8 import E4M3, Format, Scaled
from lmworks.model.rotary import Rotary
from tests.oracles import formulas

IGNORE = -100
UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half the distance of two neighbours, over the number: what one rounding may move it."""


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def near(found: Tensor, want: Tensor, *, within: float = 1e-6, size: float | None = None) -> None:
    """One rounding of the float64 result, and float32's error: `within` times the largest value, or `size`."""
    assert found.shape == want.shape
    wide = found.detach().double().cpu()
    size = size if size is not None else float(want.abs().max()) if want.numel() else 0.0
    error = (wide - want).abs() - UNIT[found.dtype] * want.abs()
    assert torch.isfinite(wide).all()
    assert bool((error <= within * size).all()), float(error.max()) / size


def exact(*tensors: Tensor) -> list[Tensor]:
    """float64 leaves on the CPU."""
    return [x.detach().double().cpu().requires_grad_() for x in tensors]


def differentiated(
    ours: Callable[..., Tensor], oracle: Callable[..., Tensor], inputs: Sequence[Tensor], sizes: Sequence[float | None]
) -> None:
    """Value and every gradient, of a random upstream gradient with strides of its own."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    wide = exact(*inputs)
    found, want = ours(*leaves), oracle(*wide)
    near(found, want.detach())
    grad = normal(*found.shape, 2, seed=99, dtype=found.dtype, device=found.device.type)[..., 0]
    got = torch.autograd.grad(found, leaves, grad)
    wanted = torch.autograd.grad(want, wide, grad.double().cpu())
    for a, b, leaf, size in zip(got, wanted, leaves, sizes, strict=True):
        assert a.dtype == leaf.dtype
        near(a, b, size=size)


def norm(device: str, dtype: torch.dtype, shape: Sequence[int], weight_dtype: torch.dtype, seed: int = 0) -> None:
    x = normal(*shape, seed=seed, dtype=dtype, device=device)
    weight = normal(shape[-1], seed=seed + 1, dtype=weight_dtype, device=device)
    # the gradient of x is a difference: in a narrow row hardly anything is left of its terms
    term = 4 * float((weight.abs().max() / x.float().square().mean(-1).add(1e-5).sqrt().min()).cpu())
    differentiated(
        lambda x, w: kernels.norm.rms_norm(x, w, 1e-5),
        lambda x, w: formulas.rms_norm(x, w, 1e-5),
        (x, weight),
        (term, max(8.0, shape[0] * 4.0)),
    )


def rotary(device: str, dtype: torch.dtype, shape: Sequence[int], width: int, rows: int, seed: int = 0) -> None:
    """`rows`: of positions, 1 or as many as the batch has."""
    batch, length, _, _ = shape
    x = normal(*shape, seed=seed, dtype=dtype, device=device)
    positions = torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(seed))
    cos, sin = Rotary(theta=100.0, width=width).tables(positions)
    frequencies = formulas.frequencies(100.0, width)

    def oracle(x: Tensor) -> Tensor:
        return Turned.apply(x, positions.expand(batch, -1), frequencies)  # type: ignore[no-any-return, no-untyped-call]

    leaf = x.detach().requires_grad_()
    found = kernels.rotary.rotate(leaf, cos.to(device), sin.to(device))
    (wide,) = exact(x)
    near(found, oracle(wide).detach(), within=4e-6)  # the tables are float32: an angle of 50 errs by 4e-6
    grad = normal(*shape, seed=99, dtype=dtype, device=device)
    (got,) = torch.autograd.grad(found, leaf, grad)
    (want,) = torch.autograd.grad(oracle(wide), wide, grad.double().cpu())
    near(got, want, within=4e-6)


class Turned(torch.autograd.Function):
    """The slow formula, whose gradient is the turn back."""

    @staticmethod
    def forward(ctx: object, x: Tensor, positions: Tensor, frequencies: list[float]) -> Tensor:
        ctx.facts = (positions, frequencies)  # type: ignore[attr-defined]
        return formulas.rope(x, positions, frequencies)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None, None]:
        positions, frequencies = ctx.facts  # type: ignore[attr-defined]
        return formulas.rope(grad, -positions, frequencies), None, None


def gated(device: str, dtype: torch.dtype, shape: Sequence[int], *, strided: bool, seed: int = 0) -> None:
    both = normal(*shape[:-1], 2 * shape[-1], seed=seed, dtype=dtype, device=device) * 3
    gate, up = both.chunk(2, -1)
    if not strided:
        gate, up = gate.contiguous(), up.contiguous()
    differentiated(kernels.gated.swiglu, lambda g, u: formulas.silu(g) * u, (gate, up), (None, None))


def losses(device: str, dtype: torch.dtype, rows: int, vocab: int, *, shares: bool, seed: int = 0) -> None:
    """Logits with room after each row, some rows to ignore; value, gradient in place, and nothing beside it touched."""
    generator = torch.Generator().manual_seed(seed)
    room = normal(rows, vocab + 3, seed=seed, dtype=dtype, device=device) * 4
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < 0.3] = IGNORE
    share = torch.rand(rows, generator=generator) if shares else torch.ones(rows)
    logits = room[:, :vocab]
    (wide,) = exact(logits)
    each = formulas.cross_entropy(wide, targets, IGNORE)
    (gradient,) = torch.autograd.grad((each * share.double()).sum(), wide)
    want = each.detach()
    beside = room[:, vocab:].clone()
    words = {"ignore": IGNORE, "shares_C": share.to(device) if shares else None}
    only = kernels.cross_entropy.losses_in_place(logits, targets.to(device), gradient=False, **words)
    assert torch.equal(logits.double().cpu(), wide.detach())
    found = kernels.cross_entropy.losses_in_place(logits, targets.to(device), **words)
    assert torch.equal(found, only)
    near(found, want, size=max(1.0, float(want.max())))
    near(logits, gradient, size=1.0)
    assert not logits[(targets == IGNORE).to(device)].any()
    assert torch.equal(room[:, vocab:], beside)


def same_bits(found: Scaled, want: Scaled) -> None:
    """Codes and scales; NaN has no sign."""
    assert found.codes.dtype == want.codes.dtype
    assert found.scale.dtype == want.scale.dtype
    assert found.codes.shape == want.codes.shape
    assert torch.equal(found.scale.cpu(), want.scale) or want.scale.isnan().any()
    nan = want.codes.float().isnan()
    assert torch.equal(found.codes.float().cpu().isnan(), nan)
    assert torch.equal(found.codes.view(torch.uint8).cpu()[~nan], want.codes.view(torch.uint8)[~nan])


def by_group(device: str, x: Tensor) -> None:
    want = float8.by_group(x, E4M3)
    found = kernels.quantise.by_group(x.to(device))
    same_bits(found, want)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(kernels.quantise.decoded(found, dtype).cpu(), want.decode(dtype))


def by_tensor(device: str, x: Tensor, form: Format) -> None:
    """Two stages against one; the scale is a scalar of torch, which a GPU may round otherwise: it is taken as it is."""
    there = x.to(device)
    largest = kernels.quantise.maxima(there).amax()
    assert torch.equal(largest.cpu(), x.abs().amax().float())
    found, turned = kernels.quantise.by_tensor_both(there, form, largest)
    want = float8.by_tensor(there, form)
    assert torch.equal(found.scale, want.scale)
    codes = float8.cast(x.float() / want.scale.cpu(), form)
    same_bits(found, Scaled(codes=codes, scale=want.scale.cpu()))
    flat = codes.view(torch.uint8).reshape(-1, x.shape[-1]).t().contiguous().view(form.dtype)
    same_bits(turned, Scaled(codes=flat, scale=want.scale.cpu()))
    same_bits(kernels.quantise.by_tensor(there, form), Scaled(codes=codes, scale=want.scale.cpu()))


def add(device: str, a: Tensor, b: Tensor) -> None:
    total, codes = kernels.quantise.add(a.to(device), b.to(device))
    assert torch.equal(total.cpu(), a + b)
    same_bits(codes, float8.by_group(a + b, E4M3))


def coded(x: Tensor, device: str) -> tuple[Scaled, Scaled]:
    """Codes by group, there and on the CPU."""
    made = float8.by_group(x, E4M3)
    return Scaled(codes=made.codes.to(device), scale=made.scale.to(device)), made


def norm8(device: str, shape: Sequence[int], weight_dtype: torch.dtype, form: Format = E4M3, seed: int = 0) -> None:
    """From codes to codes, and back."""
    x, made = coded(normal(*shape, seed=seed), device)
    weight = normal(shape[-1], seed=seed + 1, dtype=weight_dtype, device=device)
    y, scale, maxima = kernels.norm8.forward(x, weight, 1e-5)
    values, wide_weight = exact(made.decode(), weight)
    want = formulas.rms_norm(values, wide_weight, 1e-5)
    near(y, want.detach())
    assert torch.equal(maxima.amax(), y.abs().amax().float())
    cast = kernels.quantise.by_tensor(y, form, maxima.amax())
    assert torch.equal(cast.codes.view(torch.uint8), float8.by_tensor(y, form).codes.view(torch.uint8))
    grad = normal(*shape, seed=seed + 2, dtype=torch.bfloat16, device=device)
    dx, dw = kernels.norm8.backward(grad, x, weight, scale)
    d_values, d_weight = torch.autograd.grad(want, (values, wide_weight), grad.double().cpu())
    assert dw.dtype == weight_dtype
    near(dx, d_values, size=4 * float((weight.abs().max() * scale.max()).cpu()))
    near(dw, d_weight, size=shape[0] * 8.0)


def gated8(device: str, shape: Sequence[int], seed: int = 0) -> None:
    """From codes to codes, and back."""
    gate, gate_here = coded(normal(*shape, seed=seed) * 3, device)
    up, up_here = coded(normal(*shape, seed=seed + 1), device)
    opened = kernels.gated8.silu(gate)
    wide = formulas.silu(gate_here.decode(torch.float64))
    step(opened, wide)
    opened_here = Scaled(codes=opened.codes.cpu(), scale=opened.scale.cpu())
    y, maxima = kernels.gated8.product(opened, up)
    product = opened_here.decode() * up_here.decode()
    assert torch.equal(y.cpu(), product.bfloat16())
    assert torch.equal(maxima.amax(), y.abs().amax().float())
    grad = normal(*shape, seed=seed + 2, dtype=torch.bfloat16, device=device)
    d_gate, d_up, tops = kernels.gated8.backward(grad, gate, opened, up)
    assert torch.equal(tops.amax(1), torch.stack([d_gate.abs().amax(), d_up.abs().amax()]).float())
    g = gate_here.decode(torch.float64).requires_grad_()
    upstream = grad.double().cpu()
    (want,) = torch.autograd.grad(formulas.silu(g), g, upstream * up_here.decode(torch.float64))
    near(d_gate, want)
    near(d_up, upstream * opened_here.decode(torch.float64))


def step(found: Scaled, want: Tensor) -> None:
    """Codes of exact values: half a step of three mantissa bits, or half the smallest number times its scale."""
    scale = found.scale.cpu().double().repeat_interleave(16, -1)
    error = (found.decode(torch.float64).cpu() - want).abs()
    assert bool((error <= want.abs() * 2.0**-4 * (1 + 1e-5) + scale * 2.0**-10 * (1 + 1e-5)).all())
    top = want.abs().unflatten(-1, (-1, 16)).amax(-1)
    assert bool(((found.scale.cpu().double() - top / 448).abs() <= top / 448 * 2.0**-8 * (1 + 1e-5) + 1e-12).all())


def blocks(device: str, x_RN: Tensor, code: Code, runs: Runs) -> None:
    """Codes, scales, packed codes and values are those of the plain form on a CPU, to the bit."""
    want = blockwise.quantise(x_RN, code, runs)
    codes_RN, scale_RK = kernels.blocks.encoded(x_RN.to(device), runs.lengths, runs.block, code.top)
    assert codes_RN.dtype == torch.int8
    assert torch.equal(codes_RN.cpu(), want.codes_RN)
    assert torch.equal(scale_RK.cpu().nan_to_num(-1.0), want.scale_RK.nan_to_num(-1.0))
    for dtype in (torch.float32, torch.bfloat16):
        found = kernels.blocks.decoded(codes_RN, scale_RK, runs.lengths, runs.block, dtype)
        assert found.dtype == dtype
        assert torch.equal(found.cpu().nan_to_num(-1.0), want.decode(dtype).nan_to_num(-1.0))
    if code.bits == 4:
        packet_RS, cut = want.packet(code), 4 * runs.blocks
        assert torch.equal(kernels.blocks.packed(codes_RN).cpu(), packet_RS[:, cut:])
        again = kernels.blocks.unpacked(packet_RS.to(device)[:, cut:], runs.values)
        assert torch.equal(again.cpu(), want.codes_RN)
