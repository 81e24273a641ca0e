"""Moments coded by the kernel: as the plain form codes them, and within the oracle's bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lmworks.maths import expansion, kernels
from lmworks.maths.expansion import Expanded, encode
from lmworks.maths.float8 import E4M3, E5M2, Format

SETTINGS: dict[str, Any] = {"bounds": (1 / 16, expansion.MOST), "steps": expansion.STEPS, "alike": expansion.ALIKE}


def moments() -> dict[str, Tensor]:
    def randn(n: int) -> Tensor:
        return torch.randn(n, generator=torch.Generator().manual_seed(n))

    return {
        "normal": randn(1000),
        "second moments": randn(512).square() * 1e-12,
        "zeros": torch.zeros(200),
        "alike": torch.full((128,), -0.3),
        "zeros among them": torch.cat([torch.zeros(3), randn(61)]),
        "wide": torch.logspace(-30, 8, 128),
        "one": torch.tensor([2.5]),
        "none": torch.zeros(0),
        "matrix": randn(6 * 33).view(6, 33),
    }


def as_the_plain_form(x: Tensor, form: Format, *, expand: bool, device: str = "cpu") -> None:
    """What the kernel makes of x on a device, held against the plain form on the CPU."""
    want = encode(x, form, group=64, expand=expand)
    found = kernels.expansion.encoded(x.to(device), form, 64, expand=expand, **SETTINGS)
    ours = kernels.expansion.decoded(*found, 64).cpu()
    codes, scale, exponent, centre = (part.cpu() for part in found)
    assert codes.dtype == want.codes.dtype
    assert torch.equal(exponent, want.exponent)
    torch.testing.assert_close(centre, want.centre, rtol=1e-6, atol=0)
    torch.testing.assert_close(scale, want.scale, rtol=1e-5, atol=0)
    # a value that lies between two codes may fall to the other side
    other = codes.float() != want.codes.float()
    assert int(other.sum()) <= 0.01 * x.numel()
    theirs = Expanded(codes=codes, scale=scale, exponent=exponent, centre=centre).decode(64)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert torch.equal(ours.sign(), x.sign()) or not expand  # a scale alone loses what is small


@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize("form", [E4M3, E5M2], ids=lambda form: form.name)
@pytest.mark.parametrize("name", moments())
def test_the_kernel_codes_as_the_plain_form_does(name: str, form: Format, expand: bool) -> None:
    as_the_plain_form(moments()[name], form, expand=expand)
