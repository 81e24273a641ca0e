"""lmworks doctor: what is installed here and what works, found by trying it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from lmworks.cli.console import answer, count, table


@dataclass(frozen=True)
class Finding:
    """One thing that was tried: 'ok', 'absent' (optional and not here) or 'broken' (should work and does not)."""

    what: str
    state: str
    detail: str


def doctor(
    compile: Annotated[bool, typer.Option("--compile", help="Also compile a small function: up to a minute.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
) -> None:
    """Say what is installed and try whether it works; exit 1 when something that must work does not.

    Example: lmworks doctor --json
    """
    checks = {**CHECKS, "compile": _compile} if compile else CHECKS
    tried = [_try(name, check) for name, check in checks.items()]
    rows = [[finding.what, finding.state, finding.detail] for finding in tried]
    answer([asdict(f) for f in tried], as_json=as_json, text=table(rows, header=["what", "state", "detail"]))
    if any(finding.state == "broken" for finding in tried):
        raise typer.Exit(1)


class _Absent(Exception):
    """Something optional is not here."""


def _try(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, "ok", check())
    except _Absent as reason:
        return Finding(name, "absent", str(reason))
    except Exception as error:  # noqa: BLE001  (a doctor reports whatever is wrong)
        return Finding(name, "broken", f"{type(error).__name__}: {error}".partition("\n")[0])


def _python() -> str:
    from lmworks.core.run import hardware, versions

    found, machine = versions(), hardware()
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
    return (
        f"Python {found['python']}, torch {found['torch']}, {machine['cores']} cores, {memory}, {machine['processor']}"
    )


def _products() -> str:
    import torch

    from lmworks.model.ops import bf16_is_fast
    from lmworks.train.rate import peak_flops

    cpu = torch.device("cpu")
    rates = [
        f"{name} {count(peak_flops(cpu, dtype)[0])}FLOP/s"
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    ]
    return f"{', '.join(rates)}; precision = 'auto' takes {'bf16' if bf16_is_fast(cpu) else 'fp32'}"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        raise _Absent("torch sees no CUDA device; everything runs on the CPU")
    from lmworks.train.rate import peak_flops

    device = torch.device("cuda")
    flops, source = peak_flops(device, torch.bfloat16)
    return f"{torch.cuda.get_device_name()}: bf16 {count(flops)}FLOP/s ({source})"


def _training() -> str:
    import torch

    from lmworks.model.decoder import DecoderConfig
    from lmworks.model.head import cross_entropy_sum
    from lmworks.model.init import initialise

    config = DecoderConfig(vocab_size=64, n_layers=1, hidden_size=32, n_heads=2, ffn_size=64)
    model = config.build()
    initialise(model, 0)
    tokens_BT = torch.arange(16)[None]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(2):
        loss = cross_entropy_sum(model(tokens_BT)[0], model.head_weight(), tokens_BT[0])
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if not losses[1] < losses[0]:
        raise RuntimeError(f"the loss went from {losses[0]} to {losses[1]}")
    return "forward, backward and an update lower the loss"


def _float8() -> str:
    from importlib import util

    if util.find_spec("torchao") is None:
        raise _Absent("precision = 'float8' needs torchao: pip install 'lmworks[gpu]'")
    import torch

    from lmworks.model.float8 import float8_product
    from lmworks.train.precision import CAPABILITY

    cuda = torch.cuda.is_available()
    if cuda and torch.cuda.get_device_capability() < CAPABILITY:
        raise _Absent("this GPU has no products for eight-bit floats (compute capability 8.9 or more)")
    x, weight = (torch.randn(64, 64, device="cuda" if cuda else "cpu", requires_grad=True) for _ in range(2))
    found = float8_product("tensorwise")(x.bfloat16(), weight, None)
    torch.autograd.backward(found.sum())
    error = float((found - x @ weight.t()).norm().detach() / found.norm().detach())
    if not error < 0.1:
        raise RuntimeError(f"a product in float8 is off by {100 * error:.0f} %")
    return "a product and its gradients work" + ("" if cuda else ", slowly: a CPU is for trying a recipe")


def _kernels() -> str:
    import torch

    from lmworks.maths import kernels

    if not torch.cuda.is_available():
        raise _Absent("kernels run on a GPU; the CPU has forms of its own")
    if not kernels.there():
        raise _Absent("Triton is not installed: the plain forms run, with more passes over memory")
    if not kernels.work_on(torch.device("cuda", torch.cuda.current_device())):
        raise RuntimeError(
            "Triton cannot build kernels here, so the plain forms run; a C compiler is what it often misses"
        )
    return "Triton builds them"


def _compiler() -> str:
    import shutil

    if shutil.which("g++") is None and shutil.which("clang++") is None:
        raise _Absent("no C++ compiler: compile = true cannot work on the CPU (apt install g++)")
    return "found; lmworks doctor --compile tries it"


def _compile() -> str:
    import torch

    start = time.perf_counter()
    torch.compile(lambda x: torch.nn.functional.silu(x) * x)(torch.randn(8))
    return f"torch.compile works ({time.perf_counter() - start:.1f} s for a small function)"


def _cache() -> str:
    from lmworks.core.home import home

    folder = home()
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".doctor"
    probe.write_text("ok")
    probe.unlink()
    import shutil

    return f"{folder} can be written, {shutil.disk_usage(folder).free / 2**30:.0f} GiB free"


def _here() -> str:
    probe = Path(".lmworks-doctor")
    probe.write_text("ok")
    probe.unlink()
    return f"{Path.cwd()} can be written"


def _extra(*modules: str) -> Callable[[], str]:
    def check() -> str:
        from importlib import metadata, util

        missing = [module for module in modules if util.find_spec(module) is None]
        if missing:
            raise _Absent(f"not installed: {', '.join(missing)}")
        return ", ".join(f"{module} {metadata.version(module)}" for module in modules)

    return check


CHECKS: dict[str, Callable[[], str]] = {
    "python": _python,
    "products": _products,
    "gpu": _gpu,
    "float8": _float8,
    "kernels": _kernels,
    "training": _training,
    "C++ compiler": _compiler,
    "cache": _cache,
    "this folder": _here,
    "extra hf": _extra("transformers", "datasets"),
    "extra trackers": _extra("wandb", "mlflow", "trackio"),
    "extra board": _extra("starlette", "uvicorn"),
    "extra gpu": _extra("torchao"),
    "extra eval": _extra("lm_eval"),
}
