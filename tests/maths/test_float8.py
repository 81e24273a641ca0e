"""Eight-bit floats against a table of all their numbers, made from bits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmworks.maths.float8 import E4M3, E5M2, Format, by_group, by_tensor, cast, group_maxima


def numbers(form: Format) -> list[float]:
    """Every finite number of a format, by its bits."""
    mantissa, bias = (3, 7) if form is E4M3 else (2, 15)
    found = []
    for code in range(128):
        exponent, rest = code >> mantissa, code & ((1 << mantissa) - 1)
        top = exponent == (1 << (7 - mantissa)) - 1
        if top and (form is E5M2 or rest == 7):
            continue  # infinity and NaN
        size = (
            rest / 2**mantissa * 2.0 ** (1 - bias)
            if exponent == 0
            else (1 + rest / 2**mantissa) * 2.0 ** (exponent - bias)
        )
        found += [size, -size]
    return sorted(set(found))


@pytest.mark.parametrize("form", [E4M3, E5M2], ids=lambda form: form.name)
def test_a_format_is_what_its_bits_say(form: Format) -> None:
    table = numbers(form)
    assert table[-1] == form.largest
    assert min(x for x in table if x > 0) == form.smallest


@pytest.mark.parametrize("form", [E4M3, E5M2], ids=lambda form: form.name)
@given(x=st.floats(-1e6, 1e6, width=32))
def test_a_cast_takes_the_nearest_number_and_saturates(form: Format, x: float) -> None:
    found = float(cast(torch.tensor([x]), form).float())
    least = min(abs(x - number) for number in numbers(form))
    assert abs(x - found) <= least * (1 + 1e-6)


def test_nan_stays_nan() -> None:
    assert math.isnan(float(cast(torch.tensor([math.nan]), E4M3).float()))


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e4])
def test_scales_by_tensor_and_by_group(size: float) -> None:
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)) * size
    whole, groups = by_tensor(x, E4M3), by_group(x, E4M3)
    assert whole.codes.shape == groups.codes.shape == x.shape
    assert groups.scale.shape == (7, 4)
    assert torch.isfinite(whole.decode()).all()
    assert torch.isfinite(groups.decode()).all()
    if size > 1e-9:  # smaller than what is added to a maximum
        assert float((whole.decode() - x).norm() / x.norm()) < 0.03
        assert float((groups.decode() - x).norm() / x.norm()) < 0.03
    assert torch.equal(whole.decode() == 0, whole.codes.float() == 0)


def test_the_maximum_of_groups_is_the_maximum_to_the_bit() -> None:
    x = torch.randn(33, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    two_stages = by_tensor(x, E4M3, group_maxima(x).amax())
    assert torch.equal(two_stages.scale, by_tensor(x, E4M3).scale)


def test_rows_that_are_no_whole_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="no whole groups"):
        by_group(torch.zeros(2, 20), E4M3)
