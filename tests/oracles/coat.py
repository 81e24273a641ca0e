"""COAT's formulas: groups of moments one value at a time, blocks in float64 with roundings in sight."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def numbers(*, mantissa: int, bias: int, largest: float) -> list[float]:
    """Every non-negative number of an eight-bit float, by its bits."""
    found = []
    for code in range(128):
        exponent, rest = code >> mantissa, code & ((1 << mantissa) - 1)
        share = rest / 2**mantissa
        x = share * 2.0 ** (1 - bias) if exponent == 0 else (1 + share) * 2.0 ** (exponent - bias)
        if x <= largest:
            found.append(x)
    return sorted(found)


E4M3 = numbers(mantissa=3, bias=7, largest=448.0)
E5M2 = numbers(mantissa=2, bias=15, largest=57344.0)


def nearest(x: float, table: Sequence[float]) -> float:
    """The number of the table that is nearest to |x|, with the sign of x; of two, the even one."""
    size = min(abs(x), table[-1])
    best = min(range(len(table)), key=lambda i: (abs(table[i] - size), i % 2))
    return math.copysign(table[best], x)


def expansion(group: Sequence[float], *, largest: float = 448.0) -> tuple[float, float, float]:
    """(scale, exponent, centre) of one group."""
    sizes = [abs(x) for x in group if x]
    if not sizes:
        return 1.0, 1.0, 1.0
    top, least = max(sizes), min(sizes)
    if top / least < 1 + 1e-6:
        return top / largest, 1.0, 1.0
    k = math.floor(math.log2(largest**2 / 2) / math.log2(top / least) * 16) / 16
    k = min(max(k, 1 / 16), 16.0)
    c = math.sqrt(top) * math.sqrt(least)
    return (top / c) ** k / largest, k, c


def stretched(group: Sequence[float], *, largest: float = 448.0) -> list[float]:
    """What is cast: sign(x) (|x| / c)^k / s."""
    s, k, c = expansion(group, largest=largest)
    return [math.copysign((abs(x) / c) ** k / s, x) if x else 0.0 for x in group]


# --- blocks: every rounding is a function, every gradient passes through it as if it were none ------------------------


def rounded(x: Tensor, table: Sequence[float]) -> Tensor:
    """Each value of x (float64) as the number of the table that is nearest to it."""
    both = torch.tensor([-q for q in table[:0:-1]] + list(table), dtype=torch.float64)
    at = torch.searchsorted(both, x.contiguous()).clamp(1, len(both) - 1)
    return torch.where(x - both[at - 1] < both[at] - x, both[at - 1], both[at])


def by_tensor(x: Tensor, table: Sequence[float] = E4M3) -> Tensor:
    """x after one scale for all."""
    scale = (x.abs().max() + 1e-10) / table[-1]
    return rounded((x / scale).clamp(-table[-1], table[-1]), table) * scale


def by_group(x: Tensor) -> Tensor:
    """x after one bf16 scale for each 16 values of a row."""
    wide = x.reshape(*x.shape[:-1], -1, 16)
    scale = ((wide.abs().amax(-1, keepdim=True) + 1e-10) / 448).bfloat16().double()
    return (rounded((wide / scale).clamp(-448, 448), E4M3) * scale).view(x.shape)


def through(rounding: object, x: Tensor) -> Tensor:
    """A rounding forward, none backward."""
    return x + (rounding(x.detach()) - x.detach())  # type: ignore[operator]


def linear(y: Tensor, w: Tensor) -> Tensor:
    """y w^T, both rounded; the gradient of the result is rounded to E5M2 before it is used."""
    out = y @ through(by_tensor, w).t()
    out.register_hook(lambda grad: by_tensor(grad, E5M2))
    return out


def norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """RMSNorm of rounded x, rounded."""
    x8 = through(by_group, x)
    return through(by_tensor, x8 * torch.rsqrt(x8.square().mean(-1, keepdim=True) + eps) * w)


def feed_forward(x: Tensor, w: Tensor, eps: float, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    y = norm(x, w, eps)
    gate8, up8 = (through(by_group, linear(y, matrix)) for matrix in (gate, up))
    silu8 = through(by_group, gate8 * torch.sigmoid(gate8))
    return linear(through(by_tensor, silu8 * up8), down)
