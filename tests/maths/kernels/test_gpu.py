"""The same comparisons as beside this file, compiled, on a GPU, at sizes of real models too."""

from __future__ import annotations

import pytest
import torch

from lmworks.maths import kernels
from lmworks.maths.blockwise import CODES, Code, Runs
from lmworks.maths.float8 import E4M3, E5M2, Format
from tests.maths.kernels import cases
from tests.maths.kernels.test_expansion import as_the_plain_form, moments
from tests.maths.kernels.test_quantise import every_rounding

pytestmark = pytest.mark.gpu
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def test_they_work_here() -> None:
    assert kernels.work_on(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(5, 7), (3, 1), (700, 64), (33, 576), (65, 4096), (3, 16384)])
def test_norm(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    cases.norm("cuda", dtype, shape, torch.float32)
    cases.norm("cuda", dtype, shape, torch.bfloat16)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "width"), [((2, 3, 5, 10), 6), ((1, 9, 3, 64), 64), ((2, 5, 32, 128), 128)])
def test_rotary(dtype: torch.dtype, shape: tuple[int, int, int, int], width: int) -> None:
    for rows in {1, shape[0]}:
        cases.rotary("cuda", dtype, shape, width, rows)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (40, 1536), (7, 11008)])
def test_gated(dtype: torch.dtype, shape: tuple[int, int], strided: bool) -> None:
    cases.gated("cuda", dtype, shape, strided=strided)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize(("rows", "vocab"), [(5, 7), (3, 8192), (9, 49152), (6, 50257)])
def test_cross_entropy(dtype: torch.dtype, rows: int, vocab: int, shares: bool) -> None:
    cases.losses("cuda", dtype, rows, vocab, shares=shares)


@pytest.mark.parametrize("form", [E4M3, E5M2], ids=lambda form: form.name)
def test_every_rounding(form: Format) -> None:
    """By the GPU's own instruction where it has one: the bits that torch makes on a CPU."""
    x = every_rounding(form)
    found = kernels.quantise.by_tensor(x.cuda(), form, torch.tensor(form.largest, device="cuda"))
    want = x.clamp(-form.largest, form.largest).to(form.dtype)
    assert torch.equal(found.codes.view(torch.uint8).cpu(), want.view(torch.uint8))


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e-8, 3e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_by_group_and_by_tensor(dtype: torch.dtype, size: float) -> None:
    for shape in ((1, 16), (33, 48), (130, 4096)):
        x = (cases.normal(*shape, seed=0) * size).to(dtype)
        cases.by_group("cuda", x)
        cases.by_tensor("cuda", x, E4M3)
        cases.by_tensor("cuda", x, E5M2)
    cases.add("cuda", x, x.flip(0))


@pytest.mark.parametrize("shape", [(3, 16), (9, 576), (65, 4096)])
def test_from_codes_to_codes(shape: tuple[int, int]) -> None:
    cases.norm8("cuda", shape, torch.float32)
    cases.norm8("cuda", shape, torch.bfloat16, E5M2)
    cases.gated8("cuda", shape)


@pytest.mark.parametrize("form", [E4M3, E5M2], ids=lambda form: form.name)
@pytest.mark.parametrize("name", moments())
def test_moments(name: str, form: Format) -> None:
    as_the_plain_form(moments()[name], form, expand=True, device="cuda")
    as_the_plain_form(moments()[name], form, expand=False, device="cuda")


@pytest.mark.parametrize("code", CODES.values(), ids=lambda code: code.name)
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e-40, 1e30])
def test_codes_by_blocks(code: Code, size: float) -> None:
    for runs in (Runs(lengths=(1 << 16, 4096), block=256), Runs(lengths=(4099, 1, 770), block=100)):
        x_RN = cases.normal(4, runs.values, seed=0) * size
        cases.blocks("cuda", x_RN, code, runs)
        cases.blocks("cuda", x_RN.bfloat16(), code, runs)
