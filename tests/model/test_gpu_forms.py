"""The model on the kernels for GPUs: in Triton's interpreter on a CPU, compiled where there is a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lmworks.maths import kernels
from lmworks.model import ops
from lmworks.model.head import IGNORE, cross_entropy_each
from tests.model.toy import V, built

WEIGHTS_B = torch.tensor([1.0, 3.0])


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A GPU; or the CPU, with the kernels standing for those of a GPU."""
    if request.param == "cuda":
        return "cuda"
    if not kernels.there():
        pytest.skip("needs triton: pip install 'lmworks[dev]' brings it on Linux x86-64")
    from lmworks.maths.kernels import grid

    if not grid.INTERPRETED:
        pytest.skip("this process compiles kernels: set TRITON_INTERPRET=1 to run them on the CPU")
    monkeypatch.setattr(ops, "on_gpu", lambda x: ops.own_forms() and x.dtype in kernels.DTYPES)
    return "cpu"


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_kernels = pytest.mark.parametrize("device", DEVICES, indirect=True)


def loss_and_gradients(family: str, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    model = built(family, dtype=dtype).to(device)
    read_BT = torch.randint(V, (2, 4), generator=torch.Generator().manual_seed(seed))
    targets_BT = read_BT.roll(-1, 1)
    targets_BT[:, -1] = IGNORE
    loss = model.cross_entropy_sum(model(read_BT.to(device)), targets_BT.to(device), WEIGHTS_B.to(device))
    loss.backward()
    return loss.detach().cpu(), {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


@on_kernels
@pytest.mark.parametrize("family", ["decoder", "qwen", "mixed", "experts", "neox"])
def test_loss_and_gradients_are_those_of_the_plain_forms(family: str, device: str) -> None:
    found, gradients = loss_and_gradients(family, torch.float32, device)
    with ops.plain_forms():
        want, plain = loss_and_gradients(family, torch.float64, "cpu")
    torch.testing.assert_close(found.double(), want.double(), rtol=2e-6, atol=0)
    assert gradients.keys() == plain.keys()
    for name, gradient in gradients.items():
        error = float((gradient - plain[name]).norm() / plain[name].norm().clamp_min(1e-3))
        assert error < 1e-5, name


@on_kernels
def test_bfloat16_is_as_close_as_the_plain_forms(device: str) -> None:
    """Over some inputs: a single one says little, as errors of roundings are multiplied by chance."""
    errors, usual = [], []
    for seed in range(3):
        _, exact = loss_and_gradients("decoder", torch.float64, "cpu", seed)
        _, found = loss_and_gradients("decoder", torch.bfloat16, device, seed)
        with ops.plain_forms():
            _, plain = loss_and_gradients("decoder", torch.bfloat16, "cpu", seed)
        errors += [float((found[name] - exact[name]).norm()) for name in exact]
        usual += [float((plain[name] - exact[name]).norm()) for name in exact]
    assert math.hypot(*errors) <= 1.25 * math.hypot(*usual)


@on_kernels
def test_each_form_is_a_kernel(device: str) -> None:
    x = torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    table = torch.ones(1, 3, 4, device=device)
    forms = {
        "norm": lambda: ops.rms_norm(x, torch.ones(4, device=device), 1e-5),
        "gated": lambda: ops.swiglu(x, x),
        "rotary": lambda: ops.rotate(x, table, table),
    }
    for name, form in forms.items():
        assert module_of(form()) == f"lmworks.maths.kernels.{name}"
        with ops.plain_forms():
            assert not module_of(form()).startswith("lmworks")
    hidden_ND, weight_VD = x.detach().reshape(-1, 4), torch.randn(9, 4, device=device)
    targets_N = torch.tensor([0, 8, IGNORE, 9], device=device).repeat(3)  # 9 is no token: only the kernel gives NaN
    if device == "cpu":
        assert cross_entropy_each(hidden_ND, weight_VD, targets_N).isnan().tolist() == [False, False, False, True] * 3


def module_of(result: Tensor) -> str:
    made = result.grad_fn
    assert made is not None
    return str(getattr(made, "_forward_cls", torch).__module__) if hasattr(made, "_forward_cls") else "torch"


@on_kernels
def test_exact_types_and_wide_rows_keep_the_plain_forms(device: str) -> None:
    x = torch.ones(1, 8, dtype=torch.float64, device=device)
    assert not ops.on_gpu(x)
    wide = torch.ones(1, kernels.MOST_COLUMNS + 1, device=device, requires_grad=True)
    weight = torch.ones(kernels.MOST_COLUMNS + 1, device=device)
    assert module_of(ops.rms_norm(wide, weight, 1e-5)) != "lmworks.maths.kernels.norm"


def test_a_cpu_has_forms_of_its_own() -> None:
    assert not ops.on_gpu(torch.ones(1))
    assert not kernels.work_on(torch.device("cpu"))
