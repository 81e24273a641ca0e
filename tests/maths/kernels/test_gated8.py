"""SwiGLU between codes by group, in the interpreter."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.maths.kernels import cases


@settings(max_examples=8)
@given(rows=st.integers(1, 6), groups=st.integers(1, 5), seed=st.integers(0, 99))
def test_codes_in_codes_out_and_back(rows: int, groups: int, seed: int) -> None:
    cases.gated8("cpu", (rows, groups * 16), seed)


def test_several_programs_and_dims() -> None:
    cases.gated8("cpu", (2, 3, 400))
