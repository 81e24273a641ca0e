"""What making machines cost: LLMCarbon's figures, boards by name, slices, shares of a life."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core.energy import embodied
from lmworks.core.energy.devices import MOST_THREADS, named
from lmworks.core.energy.footprint import Made, embodied_kg
from lmworks.core.energy.grid import figures


def test_a_machine_by_its_parts() -> None:
    processors, memory, board = embodied.host(gibibytes=256, sockets=2)
    assert (processors.kg.central, memory.kg.central, board.kg.central) == pytest.approx((2.94, 102.4, 133.92))
    v100, h100 = embodied.gpu("Tesla V100-SXM2-32GB"), embodied.gpu("NVIDIA H100 80GB HBM3")
    assert (v100.kg.central, h100.kg.central) == pytest.approx((8.15 * 1.2, 8.14 * 1.8))
    ends = figures("embodied")["ends"]
    assert (h100.kg.low, h100.kg.high) == pytest.approx((ends["low"] * h100.kg.central, ends["high"] * h100.kg.central))


def test_the_high_end_is_what_it_says() -> None:
    a100 = embodied.of_node("NVIDIA A100-SXM4-40GB", devices=8, gibibytes=1152, sockets=2)
    assert a100.central == pytest.approx(88, abs=0.5)
    assert a100.high == pytest.approx(318, rel=0.01)


@given(st.floats(0, 1e6), st.floats(1, 4096), st.integers(1, 8))
def test_a_share_of_a_life_as_llmcarbon_writes_it(hours: float, gibibytes: float, sockets: int) -> None:
    kg = embodied.kg_of(embodied.host(gibibytes=gibibytes, sockets=sockets))
    slow = embodied_kg(
        [
            Made(units=1.47, kg_per_unit=1.0, count=sockets),
            Made(units=gibibytes, kg_per_unit=0.4, count=1),
            Made(units=111.6, kg_per_unit=1.2, count=1),
        ],
        days=hours / 24,
    )
    assert embodied.share_of_life(kg, hours).central == pytest.approx(slow, rel=1e-12)


@pytest.mark.parametrize(("name", "share"), [("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 1), ("NVIDIA H100 MIG 3g.40gb", 3)])
def test_a_slice_is_so_many_sevenths(name: str, share: int) -> None:
    found = embodied.gpu(name)
    assert found.kg.central == pytest.approx(8.14 * 1.8 * share / 7)
    assert f"{share} of 7 slices" in found.note


def test_a_board_that_nobody_knows_is_anything() -> None:
    found = embodied.gpu("Imaginary 9000")
    every = [embodied.gpu(name).kg for name in figures("embodied")["gpus"]["dies"]]
    assert found.kg.low == min(kg.low for kg in every)
    assert found.kg.high == max(kg.high for kg in every)
    assert "not in the table" in found.note


def test_a_virtual_machine_may_be_a_small_part_of_its_host() -> None:
    whole, part = (embodied.host(gibibytes=16, threads=threads) for threads in (None, 4))
    assert part[2].kg.low == pytest.approx(whole[2].kg.low * 4 / MOST_THREADS)
    assert part[2].kg.high == whole[2].kg.high
    assert part[1].kg == whole[1].kg, "its memory is its own"
    assert "a virtual machine of 4 threads" in part[0].note


def test_every_die_is_of_a_board_whose_power_is_known() -> None:
    table = figures("embodied")["gpus"]
    assert figures("embodied")["source"]
    for name, row in table["dies"].items():
        assert row["process"] in table["kg_per_cm2"]
        assert 1 < row["cm2"] < 20
        if name != "V100":  # the table of powers has its forms only
            assert named(name, "gpus") is not None
