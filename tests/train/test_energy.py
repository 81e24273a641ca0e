"""Energy counters, from files as Linux shows them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmworks.train.energy import Meter

CPU = torch.device("cpu")


def zone(folder: Path, name: str, value: int) -> Path:
    place = folder / name
    place.mkdir(exist_ok=True)
    (place / "energy_uj").write_text(f"{value}\n")
    (place / "max_energy_range_uj").write_text("999999\n")
    return place


def test_packages_are_summed_and_their_parts_are_not(tmp_path: Path) -> None:
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        zone(tmp_path, name, 100)
    meter = Meter(CPU, tmp_path)
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        zone(tmp_path, name, 500_100)
    assert meter.joules() == pytest.approx(1.0)
    assert meter.joules() == 0.0


def test_a_counter_that_starts_again_is_counted_on(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", 900_000)
    meter = Meter(CPU, tmp_path)
    zone(tmp_path, "intel-rapl:0", 100_000)
    assert meter.joules() == pytest.approx(0.2)


def test_without_a_counter_nothing_is_claimed(tmp_path: Path) -> None:
    assert Meter(CPU, tmp_path).joules() is None
    zone(tmp_path, "intel-rapl:0", 5)
    assert Meter(torch.device("cuda"), tmp_path).joules() is None, "a GPU's energy is not in the packages' counters"
