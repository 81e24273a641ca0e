"""Whole runs on a GPU: they learn what the CPU learns, in every precision, compiled or not, wherever tensors wait."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from lmworks.core.journal import rows
from lmworks.model.float8 import Scales, float8_product
from tests.oracles import float8 as oracle
from tests.train import toy

pytestmark = pytest.mark.gpu

LENGTH = 128  # from here on packed rows take FlexAttention
MODEL = {"use": "decoder", "n_layers": 3, "hidden_size": 128, "n_heads": 4, "n_kv_heads": 2, "ffn_size": 256}
CASES: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {},
    "bf16-compiled": {"compile": True},
    "float8": {"precision": "float8"},
    "float8-compiled": {"precision": "float8", "compile": True},
    "float8-rowwise-compiled": {"precision": "float8-rowwise", "compile": True},
    "recomputed": {"saved": "recompute"},
    "recomputed-compiled": {"saved": "recompute", "compile": True},
    "offloaded-host": {"saved": {"use": "offload", "to": "host", "least_bytes": 0}},
    "offloaded-disk": {"saved": {"use": "offload", "to": "disk", "least_bytes": 0}},
    "micro-batches": {"micro_batch_size": 3},
}


def losses(text: Path, cache: Path, path: Path, **over: Any) -> list[float]:
    data = toy.table(text, cache)["data"] | {"sequence_length": LENGTH}
    plain = {"steps": 10, "batch_size": 8, "precision": "bf16", "device": "cuda", "model": MODEL, "data": data}
    made = toy.recipe(text, cache, **plain | {"optimizer": {"use": "adamw", "lr": 3e-3}} | over)
    folder, _ = toy.train(made, path)
    return [row["loss"] for row in rows(folder.metrics) if "loss" in row]


@pytest.fixture(scope="module")
def on_cpu(text: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(text, cache, tmp_path_factory.mktemp("cpu") / "run", device="cpu", precision="fp32")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # what torch.compile itself looks at
@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
@pytest.mark.parametrize("case", CASES)
def test_a_run_learns_what_the_cpu_learns(
    case: str, on_cpu: list[float], text: Path, cache: Path, tmp_path: Path
) -> None:
    over = CASES[case]
    if "float8" in case and importlib.util.find_spec("torchao") is None:
        pytest.skip("needs the extra gpu")
    found = losses(text, cache, tmp_path / "run", **over)
    bound = 1e-3 if over.get("precision") == "fp32" else 0.02
    assert on_cpu[-1] < on_cpu[0] - 0.5
    assert found == pytest.approx(on_cpu, rel=bound)


@pytest.mark.parametrize("scales", ["tensorwise", "rowwise"])
def test_float8_products_are_those_of_codes(scales: Scales) -> None:
    pytest.importorskip("torchao", reason="needs the extra gpu")
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(s, generator=generator).cuda() for s in ((256, 512), (384, 512), (256, 384)))
    x, grad = x.bfloat16().requires_grad_(), grad.bfloat16()
    weight.requires_grad_()
    found = float8_product(scales)(x, weight, None)
    found.backward(grad)
    for got, want in zip((found, x.grad, weight.grad), oracle.linear(x, weight, grad, scales), strict=True):
        assert got is not None
        difference = float((got.detach().double() - want).norm() / want.norm())
        assert difference < 2**-7, "rounding of results to bf16, and sums in the matrix units' own width"
