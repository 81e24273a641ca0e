"""What the hardware can do, and how much memory a run had."""

from __future__ import annotations

import platform

import pytest
import torch

from lmworks.train.rate import DATASHEET, datasheet_name, peak_flops, peak_memory_bytes


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
    ],
)
def test_a_board_has_the_rate_of_its_own_datasheet(name: str, tera: int) -> None:
    found = datasheet_name(name)
    assert found is not None
    assert DATASHEET[found] == tera * 1e12


def test_an_unknown_board_is_measured() -> None:
    assert datasheet_name("NVIDIA GeForce GTX 1080") is None
    flops, source = peak_flops(torch.device("cpu"), torch.float32)
    assert flops > 0
    assert source.startswith("measured")


def test_peak_memory_is_in_bytes_on_every_system(monkeypatch: pytest.MonkeyPatch) -> None:
    linux = peak_memory_bytes(torch.device("cpu"))
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert peak_memory_bytes(torch.device("cpu")) < linux / 1000
