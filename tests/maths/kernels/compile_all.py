"""Compile every kernel to machine code for GPUs that need not be there. Run by test_compiled.py in a process of its own.

Prints a line for each: family, kernel, compute capability, bytes of machine code, registers that did not fit (bytes).
"""

from __future__ import annotations

import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lmworks.maths.kernels import cross_entropy, gated, gated8, norm, norm8, quantise, rotary

FAMILIES = (cross_entropy, gated, gated8, norm, norm8, quantise, rotary)
EIGHT_BITS = {"codes_ptr", "turned_ptr"}
FLOAT32 = {"scale_ptr", "maxima_ptr", "found_ptr", "partial_ptr", "losses_ptr", "shares_ptr", "cos_ptr", "sin_ptr"}
CODED = {"gate_ptr", "silu_ptr", "up_ptr", "out_ptr"}
"""Codes in gated8, values elsewhere."""
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "cross_entropy._losses": [
        {"IGNORE": -100, "SHARES": shares, "GRADIENT": gradient, "BLOCK": 8192}
        for shares, gradient in ((True, True), (False, True), (False, False))
    ],
    "gated._forward": [{"BLOCK": 2048}],
    "gated._backward": [{"BLOCK": 2048}],
    "norm._forward": [{"ROWS": 32, "WIDTH": 64}, {"ROWS": 1, "WIDTH": 4096}, {"ROWS": 1, "WIDTH": 16384}],
    "norm._backward": [{"ROWS": 32, "WIDTH": 64}, {"ROWS": 1, "WIDTH": 4096}, {"ROWS": 1, "WIDTH": 16384}],
    "norm8._forward": [{"ROWS": 2, "WIDTH": 1024}, {"ROWS": 1, "WIDTH": 16384}],
    "norm8._backward": [{"ROWS": 2, "WIDTH": 1024}, {"ROWS": 1, "WIDTH": 16384}],
    "quantise._maxima": [{"BLOCK": quantise.BLOCK}],
    "quantise._cast_tile": [
        {"SIDE": quantise.SIDE, "WIDE": wide, "TRANSPOSED": turned} for wide in (True, False) for turned in (True, False)
    ],
    "rotary._rotate": [
        {"BACK": back, "HEADS": 32, "HALF": half, "REST": rest} for back, half, rest in ((True, 64, 0), (False, 16, 64))
    ],
}
GROUPED = [{"GROUPS": quantise.GROUPS}]


def kernels() -> list[tuple[str, Any]]:
    """Every kernel: a jitted function that gives nothing back."""
    return [
        (f"{family.__name__.rpartition('.')[2]}.{name}", value)
        for family in FAMILIES
        for name, value in vars(family).items()
        if isinstance(value, triton.JITFunction) and value.fn.__module__ == family.__name__ and name != "_load"
    ]


def type_of(kernel: str, argument: str) -> str:
    """How an argument is passed."""
    if not argument.endswith("_ptr"):
        return "fp32" if argument == "eps" else "i32"
    if argument == "targets_ptr":
        return "*i64"
    coded = kernel in ("gated8._silu", "gated8._product", "gated8._backward")
    if argument in EIGHT_BITS or (coded and argument in CODED):
        return "*u8"
    return "*fp32" if argument in FLOAT32 and not kernel.startswith(("gated8", "quantise._by", "quantise._add")) else "*bf16"


def compiled(name: str, kernel: Any, settings: dict[str, Any], capability: int) -> str:
    """One line of the report."""
    words = dict(settings)
    if "NATIVE" in kernel.arg_names:
        words["NATIVE"] = capability >= 89
    signature = {arg: "constexpr" if arg in words else type_of(name, arg) for arg in kernel.arg_names}
    if "maxima_ptr" in signature:
        signature["maxima_ptr"] = "*fp32"
    values = settings.get("WIDTH", 0) * settings.get("ROWS", 0) or settings.get("BLOCK", 0)
    source = ASTSource(kernel, signature=signature, constexprs=words)
    options = {"num_warps": min(max(values // 512, 4), 16)}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    spills = re.findall(r"(\d+) bytes spill", str(made.metadata)) or [getattr(made, "n_spills", None)]
    return f"{name} {settings} sm_{capability}: {len(made.asm['cubin'])} bytes {spills[0] or ''}"


if __name__ == "__main__":
    for capability in [int(word) for word in sys.argv[1:]] or [80, 90]:
        for name, kernel in kernels():
            for settings in SETTINGS.get(name, GROUPED):
                print(compiled(name, kernel, settings, capability), flush=True)
