"""Compile every kernel to machine code for GPUs that need not be there; run by test_compiled.py in its own process.

    python -m tests.maths.kernels.compile_all [COMPUTE_CAPABILITY ...]

Prints, as JSON, a row for each: kernel, settings, variant, compute capability, bytes of machine code, and the eight-bit
conversions among its instructions.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lmworks.maths.kernels import blocks, cross_entropy, expansion, gated, gated8, norm, norm8, quantise, rotary
from lmworks.maths.kernels.grid import warps

FAMILIES = (blocks, cross_entropy, expansion, gated, gated8, norm, norm8, quantise, rotary)
FLOAT32 = {
    f"{name}_ptr" for name in ["inverse", "factor", "maxima", "found", "partial", "losses", "shares", "cos", "sin"]
}
OF_MOMENTS = {"x_ptr", "scale_ptr", "exponent_ptr", "centre_ptr", "out_ptr"}
"""Pointers of expansion's kernels, all to float32."""
INSIDE = {"_find", "_load", "_power", "_wide"}
"""Functions of kernels."""
REALS = {"eps", "floor", "most", "alike"}
"""Arguments that are no whole numbers."""
"""Pointers to float32; those with `codes` in their name point to bytes, the others to bfloat16."""
ROWS = [{"ROWS": 32, "WIDTH": 64}, {"ROWS": 1, "WIDTH": 4096}, {"ROWS": 1, "WIDTH": 16384}]
TRUE_FALSE = (True, False)
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "blocks._encode": [
        {"TOP": top, "WIDTH": width, "GROUPS": 2048 // width, "STEPS": 4} for top in (127, 7) for width in (256, 64)
    ],
    "blocks._decode": [{"WIDTH": 256, "GROUPS": 8, "STEPS": 4}],
    "blocks._pack": [{"SPAN": blocks.SPAN}],
    "blocks._unpack": [{"SPAN": blocks.SPAN}],
    "cross_entropy._losses": [
        {"IGNORE": -100, "SHARES": shares, "GRADIENT": gradient, "BLOCK": cross_entropy.BLOCK}
        for shares, gradient in ((True, True), (False, True), (False, False))
    ],
    "expansion._encode": [
        {"G": 128, "GROUPS": expansion.GROUPS, "EXPAND": expand, "WIDE": wide}
        for expand in TRUE_FALSE
        for wide in TRUE_FALSE
    ],
    "expansion._decode": [{"G": 128, "GROUPS": expansion.GROUPS, "WIDE": wide} for wide in TRUE_FALSE],
    "gated._forward": [{"BLOCK": gated.BLOCK}],
    "gated._backward": [{"BLOCK": gated.BLOCK}],
    "norm._forward": ROWS,
    "norm._backward": ROWS,
    "norm8._forward": ROWS,
    "norm8._backward": ROWS,
    "quantise._maxima": [{"BLOCK": quantise.BLOCK}],
    "quantise._cast_tile": [
        {"SIDE": quantise.SIDE, "WIDE": wide, "TRANSPOSED": turned} for wide in TRUE_FALSE for turned in TRUE_FALSE
    ],
    "rotary._rotate": [
        {"BACK": back, "HEADS": 32, "HALF": half, "REST": rest} for back, half, rest in ((True, 64, 0), (False, 16, 64))
    ],
}
"""As their launches choose them; the others work on groups."""


def kernels() -> list[tuple[str, Any]]:
    """Every kernel that is launched: those that have a program's arguments, not the functions inside them."""
    return [
        (f"{family.__name__.rpartition('.')[2]}.{name}", value)
        for family in FAMILIES
        for name, value in vars(family).items()
        if isinstance(value, triton.JITFunction) and value.fn.__module__ == family.__name__ and name not in INSIDE
    ]


def type_of(argument: str, family: str) -> str:
    """How an argument is passed."""
    if not argument.endswith("_ptr"):
        return "fp32" if argument in REALS else "i32"
    if argument in ("targets_ptr", "before_ptr", "starts_ptr"):
        return "*i64"
    if family == "blocks" and argument == "scale_ptr":
        return "*fp32"
    if family == "expansion" and argument in OF_MOMENTS:
        return "*fp32"
    return "*u8" if "codes" in argument else "*fp32" if argument in FLOAT32 else "*bf16"


def compiled(name: str, kernel: Any, settings: dict[str, Any], capability: int, variant: str) -> dict[str, Any]:
    """A row of the report.

    Triton compiles anew for other types, for sizes that are multiples of 16, and for sizes of 1. Variants: "even", all
    multiples of 16; "ones", all sizes 1; "float32", values in float32 and sizes of any kind.
    """
    words = dict(settings) | ({"NATIVE": capability >= 89} if "NATIVE" in kernel.arg_names else {})
    family = name.partition(".")[0]
    if variant == "ones":
        words |= {arg: 1 for arg in kernel.arg_names if arg not in words and type_of(arg, family) == "i32"}
    signature = {arg: "constexpr" if arg in words else type_of(arg, family) for arg in kernel.arg_names}
    if variant == "float32":
        signature = {arg: "*fp32" if kind == "*bf16" else kind for arg, kind in signature.items()}
    even = [i for i, kind in enumerate(signature.values()) if variant == "even" and kind[0] in "*i"]
    whole = {(i,): [["tt.divisibility", 16]] for i in even}
    values = settings.get("WIDTH", 0) * settings.get("ROWS", 0) or settings.get("BLOCK", 0)
    source = ASTSource(kernel, signature=signature, constexprs=words, attrs=whole)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps(values)})
    return {
        "kernel": name,
        "settings": settings,
        "variant": variant,
        "capability": capability,
        "bytes": len(made.asm["cubin"]),
        "conversions": sorted(set(re.findall(r"cvt\S*(?:e4m3|e5m2)\S*", made.asm["ptx"]))),
    }


def main(capabilities: list[int]) -> None:
    """Print the report."""
    rows = [
        compiled(name, kernel, settings, capability, variant)
        for capability in capabilities
        for name, kernel in kernels()
        for index, settings in enumerate(SETTINGS.get(name, [{"GROUPS": quantise.GROUPS}]))
        for variant in (("even",) if index else ("even", "ones", "float32"))
    ]
    sys.stdout.write(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]])
