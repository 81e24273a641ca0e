"""Eight-bit codes in the interpreter, to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.maths import float8, kernels
from lmworks.maths.float8 import E4M3, E5M2, Format, Scaled
from tests.maths.kernels import cases

SIZES = st.sampled_from([1.0, 1e-30, 1e-8, 3e4])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def every_rounding(form: Format) -> torch.Tensor:
    """Every number of the format, the middles between neighbours, what lies next to those, and what is too large."""
    codes = torch.arange(256, dtype=torch.uint8).view(form.dtype).float()
    numbers = codes[codes.isfinite()].unique()
    middles = (numbers[1:] + numbers[:-1]) / 2
    around = [torch.nextafter(middles, torch.tensor(side)) for side in (-math.inf, math.inf)]
    return torch.cat([numbers, middles, *around, torch.tensor([form.largest * 2, -1e30, math.inf, -math.inf])])


@pytest.mark.parametrize("form", [E4M3, E5M2], ids=lambda form: form.name)
def test_every_rounding_is_torchs(form: Format) -> None:
    x = every_rounding(form)
    one = torch.tensor(form.largest)  # the scale is 1
    found = kernels.quantise.by_tensor(x, form, one)
    assert float(found.scale) == 1.0
    assert torch.equal(found.codes.view(torch.uint8), float8.cast(x, form).view(torch.uint8))


def test_every_code_is_decoded() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3.dtype).view(1, 256)
    x = Scaled(codes=codes, scale=torch.full((1, 16), 0.75, dtype=torch.bfloat16))
    found = kernels.quantise.decoded(x, torch.float32)
    torch.testing.assert_close(found, x.decode(), rtol=0, atol=0, equal_nan=True)


@settings(max_examples=12)
@given(dtype=DTYPES, rows=st.integers(1, 5), groups=st.integers(1, 4), size=SIZES, seed=st.integers(0, 99))
def test_by_group(dtype: torch.dtype, rows: int, groups: int, size: float, seed: int) -> None:
    cases.by_group("cpu", (cases.normal(rows, groups * 16, seed=seed) * size).to(dtype))


@settings(max_examples=12)
@given(
    dtype=DTYPES,
    form=st.sampled_from([E4M3, E5M2]),
    rows=st.integers(1, 70),
    width=st.integers(1, 70),
    size=SIZES,
    seed=st.integers(0, 99),
)
def test_by_tensor(dtype: torch.dtype, form: Format, rows: int, width: int, size: float, seed: int) -> None:
    cases.by_tensor("cpu", (cases.normal(rows, width, seed=seed) * size).to(dtype), form)


def test_several_programs_and_dims() -> None:
    x = cases.normal(2, 3, 1600, seed=0).bfloat16()
    cases.by_group("cpu", x)
    cases.by_tensor("cpu", x, E5M2)
    cases.by_group("cpu", x.transpose(0, 1))


@settings(max_examples=6)
@given(dtype=DTYPES, rows=st.integers(1, 5), groups=st.integers(1, 4), seed=st.integers(0, 99))
def test_sum_and_its_codes(dtype: torch.dtype, rows: int, groups: int, seed: int) -> None:
    a, b = (cases.normal(rows, groups * 16, seed=seed + i, dtype=dtype) for i in range(2))
    cases.add("cpu", a, b)


def test_zeros_stay_zeros_and_nan_stays_nan() -> None:
    x = torch.zeros(2, 32)
    cases.by_group("cpu", x)
    cases.by_tensor("cpu", x, E4M3)
    x[1, 3] = math.nan
    found = kernels.quantise.by_group(x)
    assert found.codes.float().isnan().sum() == 16
    cases.same_bits(found, float8.by_group(x, E4M3))
    assert math.isnan(float(kernels.quantise.maxima(x).amax()))
    assert kernels.quantise.by_tensor(x, E5M2).codes.float().isnan().all()


def test_rows_that_are_no_whole_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="no whole groups"):
        kernels.quantise.by_group(torch.zeros(2, 20))
