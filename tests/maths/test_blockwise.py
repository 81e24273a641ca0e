"""Block quantisation against a slow oracle, its bound, and what is not finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lmworks.maths.blockwise import CODES, INT4, INT8, Code, Runs, quantise, unpacked
from tests.oracles import blockwise as oracle

codes = st.sampled_from(sorted(CODES)).map(CODES.__getitem__)
runs = st.builds(
    lambda lengths, block: Runs(lengths=tuple(lengths), block=block),
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.integers(1, 17),
)
sizes = st.sampled_from([1.0, 1e-30, 1e-40, 3e-44, 1e30])
"""Of values: usual ones, such that squares underflow, such that scales are no normal numbers, large ones."""
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


def random(rows: int, values: int, seed: int) -> Tensor:
    return torch.randn(rows, values, generator=torch.Generator().manual_seed(seed))


def of_values(x_RK: Tensor, cut: Runs) -> Tensor:
    """What is one for each block, one for each value."""
    lengths = [stop - start for start, stop in oracle.blocks(cut.lengths, cut.block)]
    return x_RK.repeat_interleave(torch.tensor(lengths), dim=1)


@given(code=codes, cut=runs, size=sizes, dtype=dtypes, seed=st.integers(0, 99))
def test_a_row_is_what_the_slow_oracle_makes_of_it(code: Code, cut: Runs, size: float, dtype: Any, seed: int) -> None:
    x_RN = (random(2, cut.values, seed) * size).to(dtype)
    found = quantise(x_RN, code, cut)
    for row, values in enumerate(x_RN.float().tolist()):
        want = [oracle.coded(values[start:stop], code.top) for start, stop in oracle.blocks(cut.lengths, cut.block)]
        assert found.scale_RK[row].tolist() == [scale for scale, _ in want]
        assert found.codes_RN[row].tolist() == [code for _, codes in want for code in codes]
        assert found.decode()[row].tolist() == oracle.there_and_back(values, cut.lengths, cut.block, code.top)


@given(code=codes, cut=runs, size=sizes, seed=st.integers(0, 99))
def test_no_value_is_off_by_more_than_half_a_scale(code: Code, cut: Runs, size: float, seed: int) -> None:
    """And by the two roundings of float32 of a quotient and a product, at most `top` times half a unit each."""
    x_RN = random(2, cut.values, seed) * size
    found = quantise(x_RN, code, cut)
    off = (found.decode().double() - x_RN.double()).abs()
    bound = of_values(found.scale_RK, cut).double() * (0.5 + code.top * 2.0**-23)
    assert (off <= bound).all()


@given(code=codes, cut=runs, size=sizes, seed=st.integers(0, 99))
def test_packets_hold_everything_in_the_bytes_that_are_told(code: Code, cut: Runs, size: float, seed: int) -> None:
    found = quantise(random(3, cut.values, seed) * size, code, cut)
    packet = found.packet(code)
    assert packet.dtype == torch.uint8
    assert packet.shape == (3, cut.nbytes(code))
    back = unpacked(packet, code, cut)
    assert back.codes_RN.equal(found.codes_RN)
    assert back.scale_RK.equal(found.scale_RK)


@pytest.mark.parametrize("code", CODES.values(), ids=lambda code: code.name)
def test_zeros_stay_zeros(code: Code) -> None:
    x_RN = torch.zeros(1, 10)
    x_RN[0, 7] = -2.0  # the second block has one that is not
    found = quantise(x_RN, code, Runs(lengths=(10,), block=5))
    assert found.scale_RK[0, 0] == 0
    assert found.decode().equal(x_RN)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("code", CODES.values(), ids=lambda code: code.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_is_not_finite_is_seen_in_all_of_its_block(bad: float, code: Code, dtype: torch.dtype) -> None:
    """Through the packet too. The other blocks are as they were."""
    cut = Runs(lengths=(7, 6), block=4)
    x_RN = random(1, 13, 0).to(dtype)
    clean = quantise(x_RN, code, cut).decode()
    x_RN[0, 8] = bad
    seen = unpacked(quantise(x_RN, code, cut).packet(code), code, cut).decode()
    assert seen[0, 7:11].isnan().all()
    assert torch.cat([seen[:, :7], seen[:, 11:]], 1).equal(torch.cat([clean[:, :7], clean[:, 11:]], 1))


def test_what_float32_cannot_hold_is_not_finite() -> None:
    x_RN = torch.tensor([[1e300, 1.0]], dtype=torch.float64)
    assert quantise(x_RN, INT8, Runs(lengths=(2,), block=2)).decode().isnan().all()


@pytest.mark.parametrize(("code", "low", "high"), [(INT8, 0.007, 0.010), (INT4, 0.13, 0.16)])
@pytest.mark.parametrize("block", [512, 2048])
def test_errors_on_normal_values_are_those_that_were_measured(code: Code, low: float, high: float, block: int) -> None:
    x_RN = random(1, 1 << 16, 1)
    off = quantise(x_RN, code, Runs(lengths=(1 << 16,), block=block)).decode() - x_RN
    assert low <= float(off.norm() / x_RN.norm()) <= high


@given(code=codes, cut=runs, seed=st.integers(0, 99))
def test_what_came_from_codes_has_the_same_codes(code: Code, cut: Runs, seed: int) -> None:
    """So a second copy of gathered weights costs no second error."""
    once = quantise(random(1, cut.values, seed), code, cut)
    twice = quantise(once.decode(), code, cut)
    assert twice.codes_RN.equal(once.codes_RN)
    assert torch.allclose(twice.scale_RK, once.scale_RK, rtol=2.0**-23, atol=0)


def test_a_tensor_does_not_share_scales_with_its_neighbour() -> None:
    """Ones of a norm beside weights a hundred times smaller: in blocks of their own neither is harmed."""
    x_RN = torch.cat([torch.ones(1, 64), 0.01 * random(1, 192, 2)], dim=1)
    apart = quantise(x_RN, INT8, Runs(lengths=(64, 192), block=256)).decode()
    together = quantise(x_RN, INT8, Runs(lengths=(256,), block=256)).decode()
    assert (apart[:, :64] == 1).all()
    assert float((apart - x_RN)[:, 64:].norm()) < 0.05 * float((together - x_RN)[:, 64:].norm())


@given(cut=runs, data=st.data())
def test_runs_of_a_part_are_those_that_lie_in_it(cut: Runs, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, cut.values))
    stop = data.draw(st.integers(start, cut.values))
    owner = [run for run, length in enumerate(cut.lengths) for _ in range(length)][start:stop]
    assert cut.between(start, stop).lengths == tuple(owner.count(run) for run in sorted(set(owner)))
    assert cut.times(3).values == 3 * cut.values


def test_rows_and_packets_of_another_size_are_refused() -> None:
    cut = Runs(lengths=(4, 4), block=4)
    with pytest.raises(ValueError, match=r"rows of 8 values are asked for, here is \(1, 9\)"):
        quantise(torch.zeros(1, 9), INT8, cut)
    with pytest.raises(ValueError, match=r"packets of 16 bytes are asked for, here is \(1, 12\)"):
        unpacked(torch.zeros(1, 12, dtype=torch.uint8), INT8, cut)
