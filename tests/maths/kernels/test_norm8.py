"""RMSNorm of codes by group, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.maths import kernels
from lmworks.maths.float8 import E4M3, E5M2, Format
from tests.maths.kernels import cases


@settings(max_examples=10)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 5),
    weight_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    form=st.sampled_from([E4M3, E5M2]),
    seed=st.integers(0, 99),
)
def test_codes_in_codes_out_and_back(
    rows: int, groups: int, weight_dtype: torch.dtype, form: Format, seed: int
) -> None:
    cases.norm8("cpu", (rows, groups * 16), weight_dtype, form, seed)


def test_more_tiles_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.norm8, "PARTS", 2)
    cases.norm8("cpu", (5, 1040), torch.float32)
