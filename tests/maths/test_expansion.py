"""Codes with dynamic range expansion against a slow oracle, at the edges, and how much they lose."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lmworks.maths.expansion import Expanded, encode
from lmworks.maths.float8 import E4M3, E5M2, Format
from tests.oracles import coat as oracle

ULP = 2.0**-23
TABLES = {"e4m3": oracle.E4M3, "e5m2": oracle.E5M2}


def back(x: Tensor, form: Format = E4M3, group: int = 128, **settings: object) -> Tensor:
    return encode(x, form, group=group, **settings).decode(group)  # type: ignore[arg-type]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


values = st.one_of(st.just(0.0), st.floats(2.0**-60, 2.0**60, width=32), st.floats(-(2.0**60), -(2.0**-60), width=32))


@pytest.mark.parametrize("form", [E4M3, E5M2], ids=lambda form: form.name)
@given(x=st.lists(values, min_size=1, max_size=40))
def test_codes_are_those_of_the_formula(form: Format, x: list[float]) -> None:
    own = encode(torch.tensor(x), form, group=16)
    for i in range(0, len(x), 16):
        part, g = x[i : i + 16], i // 16
        scale, exponent, centre = oracle.expansion(part, largest=form.largest)
        assert float(own.exponent[g]) == exponent
        assert float(own.centre[g]) == pytest.approx(centre, rel=1e-5)
        assert float(own.scale[g]) == pytest.approx(scale, rel=1e-4)  # a power of float32 numbers
        for code, y in zip(
            own.codes.float()[i : i + 16].tolist(), oracle.stretched(part, largest=form.largest), strict=True
        ):
            assert abs(code - y) <= abs(oracle.nearest(y, TABLES[form.name]) - y) + 1e-4 * abs(y)


EDGES = {
    "nothing": torch.zeros(0),
    "one": torch.tensor([3.7]),
    "zeros": torch.zeros(300),
    "alike": torch.full((256,), -0.3),
    "nearly alike": 1 + torch.arange(128) % 2 * ULP,
    "one more than a group": randn(129),
    "tiny": randn(256) * 1e-30,
    "huge": randn(256) * 1e30,
    "a zero in each group": torch.cat([torch.zeros(1), randn(127), torch.zeros(1), randn(100)]),
    "wide": torch.logspace(-37, 37, 128),
}


@pytest.mark.parametrize("form", [E4M3, E5M2], ids=lambda form: form.name)
@pytest.mark.parametrize("name", EDGES)
def test_edges_are_finite_keep_signs_zeros_and_the_largest(name: str, form: Format) -> None:
    x = EDGES[name]
    found, own = back(x, form), encode(x, form)
    assert found.shape == x.shape
    assert all(torch.isfinite(part.float()).all() for part in (found, own.scale, own.exponent, own.centre))
    assert torch.equal(found == 0, x == 0)
    assert torch.equal(found.sign(), x.sign())
    assert torch.equal(own.exponent * 16, (own.exponent * 16).round())
    for i in range(0, len(x), 128):
        part, got = x[i : i + 128], found[i : i + 128]
        at = part.abs().argmax()
        assert float(got[at]) == pytest.approx(float(part[at]), rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_order_is_kept_in_a_group(seed: int) -> None:
    x = (randn(64, 128, seed=seed) * 1.5).exp() * randn(64, 128, seed=seed + 9).sign()
    ordered = torch.stack([row.sort().values for row in x])
    found = back(ordered).view(64, 128)
    assert (found.diff(dim=1) >= 0).all()


def mse(x: Tensor, **settings: object) -> float:
    return float((back(x, **settings) - x).square().mean())


def test_expansion_loses_less_than_a_scale_alone() -> None:
    normal, wide = randn(4000, 128), randn(4000, 128, seed=1).exp()
    narrow = (0.4 * randn(4000, 128, seed=2)).exp()
    assert mse(normal, expand=False) / mse(normal) >= 2.5
    assert mse(wide, expand=False) / mse(wide) >= 3.5
    size = float(narrow.square().mean())
    assert math.sqrt(mse(narrow) / size) <= 0.008
    assert math.sqrt(mse(narrow, expand=False) / size) >= 2.5 * math.sqrt(mse(narrow) / size)


def test_adams_direction_gains_from_each_moment() -> None:
    m, v = randn(4000, 128), (0.5 * randn(4000, 128, seed=1)).exp()

    def error(first: bool, second: bool) -> float:
        found = back(m, expand=first) / back(v, expand=second).sqrt()
        return float((found - m / v.sqrt()).square().mean())

    both, one, other, none = error(True, True), error(True, False), error(False, True), error(False, False)
    assert none / both >= 2.5
    assert both < one < none
    assert both < other < none


def test_zeros_do_not_count_as_the_least_value() -> None:
    x = randn(1000, 128).abs() + 0.1
    with_zero = x.clone()
    with_zero[:, 0] = 0
    rest = slice(1, None)
    one, other = (back(t).view_as(t)[:, rest] - t[:, rest] for t in (x, with_zero))
    assert float(other.norm()) <= 1.1 * float(one.norm())


def test_wide_groups_are_compressed_unless_a_floor_forbids_it() -> None:
    x = torch.logspace(-6, 6, 128)
    assert float(encode(x).exponent) < 1
    assert float(encode(x, floor=1.0).exponent) == 1.0
    assert float(encode(torch.full((128,), 1.0) + torch.arange(128) * 1e-5).exponent) == 16.0


def test_the_bytes_are_two_for_two_moments_and_a_little_for_groups() -> None:
    kept = [encode(randn(512, 128), form) for form in (E4M3, E4M3)]
    each = sum(code.nbytes for code in kept) / (512 * 128)
    assert each == pytest.approx(2 + 24 / 128)
    assert isinstance(kept[0], Expanded)
    assert each / 8 <= 0.30
