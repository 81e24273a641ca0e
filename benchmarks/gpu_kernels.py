"""Each Triton kernel of lmworks against the same formula in plain PyTorch, eager and compiled, on one GPU.

For each case: the bytes that must be read and written at least, and the rate at which that happened, also as a share of
the rate of a plain copy on the same device. Kernels of the model run forward and backward together. The second-level
cache is overwritten before each call; arms take turns; a value is the median of the rounds. Before anything is timed,
a kernel's results are held against the plain form's.

Example: python benchmarks/gpu_kernels.py
Without a GPU, to try the program itself in Triton's interpreter: python benchmarks/gpu_kernels.py --interpret
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import evidence_file
import torch
from torch import Tensor

from lmworks.maths import float8, kernels
from lmworks.maths.float8 import E4M3, E5M2, Scaled
from lmworks.model import ops
from lmworks.model.head import IGNORE

Arm = Callable[[], Sequence[Tensor | Scaled]]
CLOSE = 2.0**-7
"""How far a kernel's result may be from the plain form's, norm over norm: less than the roundings of bfloat16."""
FLUSH_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Tokens, hidden width, heads of what size, feed-forward width, vocabulary, and tokens whose logits exist."""

    tokens: int
    width: int
    heads: int
    head: int
    ffn: int
    vocab: int
    rows: int


LARGE = Sizes(tokens=8192, width=4096, heads=32, head=128, ffn=11008, vocab=128256, rows=2048)
TOY = Sizes(tokens=6, width=48, heads=2, head=8, ffn=32, vocab=67, rows=5)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel, its plain form, that form compiled, and the bytes that all must move at least."""

    name: str
    nbytes: int
    kernel: Arm
    plain: Arm
    compiled: Arm


def made(device: str, *shape: int, seed: int = 0) -> Tensor:
    """bfloat16 normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(device)


def trained(form: Callable[..., Tensor], *inputs: Tensor) -> Arm:
    """Forward, and backward for every input that is a leaf with a gradient."""
    leaves = [x for x in inputs if x.requires_grad]

    def both() -> Sequence[Tensor]:
        out = form(*inputs)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    return both


def plainly(form: Callable[..., Any]) -> Callable[..., Any]:
    """The form as plain PyTorch, whatever the device."""

    def run(*words: Any) -> Any:
        with ops.plain_forms():
            return form(*words)

    return run


def layer(name: str, nbytes: int, kernel: Callable[..., Tensor], form: Callable[..., Tensor], *inputs: Tensor) -> Case:
    """A kernel that a model calls in training; `form` as the model names it."""
    compiled = trained(torch.compile(form, dynamic=False), *inputs)
    plain = trained(plainly(form), *inputs)
    return Case(name=name, nbytes=nbytes, kernel=trained(kernel, *inputs), plain=plain, compiled=compiled)


def piece(name: str, nbytes: int, kernel: Arm, plain: Arm) -> Case:
    """A kernel without a gradient of its own."""
    return Case(name=name, nbytes=nbytes, kernel=kernel, plain=plain, compiled=torch.compile(plain, dynamic=False))


def model_cases(sizes: Sizes, device: str) -> Iterator[Case]:
    """What a model calls in training. Read and written: inputs and outputs, forward and backward."""
    x = made(device, sizes.tokens, sizes.width).requires_grad_()
    weight = torch.ones(sizes.width, device=device, requires_grad=True)
    norm, plain_norm = (lambda x, w: kernels.norm.rms_norm(x, w, 1e-5)), (lambda x, w: ops.rms_norm(x, w, 1e-5))
    yield layer("norm", 5 * x.nbytes, norm, plain_norm, x, weight)

    q = made(device, 1, sizes.tokens, sizes.heads, sizes.head).requires_grad_()
    angles = torch.rand(1, sizes.tokens, sizes.head // 2, device=device)
    tables = angles.cos().repeat(1, 1, 2), torch.cat((-angles.sin(), angles.sin()), -1)
    yield layer("rotary", 4 * q.nbytes + 4 * tables[0].nbytes, kernels.rotary.rotate, ops.rotate, q, *tables)

    gate, up = (made(device, sizes.tokens, sizes.ffn, seed=i).requires_grad_() for i in (1, 2))
    yield layer("gated", 8 * gate.nbytes, kernels.gated.swiglu, ops.swiglu, gate, up)

    logits = made(device, sizes.rows, sizes.vocab, seed=3)
    targets = torch.arange(sizes.rows, device=device) % sizes.vocab

    def losses() -> Sequence[Tensor]:
        gradient = logits.clone()
        return [kernels.cross_entropy.losses_in_place(gradient, targets, ignore=IGNORE), gradient]

    def plain_losses() -> Sequence[Tensor]:
        log_probs = torch.log_softmax(logits, -1, dtype=torch.float32)
        picked = log_probs.gather(1, targets[:, None])
        gradient = log_probs.exp().scatter_add(1, targets[:, None], -torch.ones_like(picked))
        return [-picked[:, 0], gradient.to(logits.dtype)]

    yield piece("cross_entropy", 4 * logits.nbytes, losses, plain_losses)  # the copy that it overwrites is counted


def eight_bit_cases(sizes: Sizes, device: str) -> Iterator[Case]:
    """What COAT's blocks call. Codes are one byte a value, scales 1/8 of a byte."""
    x, other, grad = (made(device, sizes.tokens, sizes.width, seed=i) for i in range(3))
    weight = torch.ones(sizes.width, device=device)
    count = x.numel()
    coded = float8.by_group(x, E4M3)

    def plain_cast(form: float8.Format) -> Sequence[Scaled]:
        whole = float8.by_tensor(x, form)
        turned = whole.codes.view(torch.uint8).t().contiguous().view(form.dtype)
        return [whole, Scaled(codes=turned, scale=whole.scale)]

    def plain_norm() -> Sequence[Tensor]:
        wide = coded.decode()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
        y = (wide * inverse * weight).bfloat16()
        return [y, inverse[:, 0]]

    coded_bytes = 9 * count // 8
    yield piece(
        "by_group",
        x.nbytes + coded_bytes,
        lambda: [kernels.quantise.by_group(x)],
        lambda: [float8.by_group(x, E4M3)],
    )
    for form in (E4M3, E5M2):
        kernel, plain = functools.partial(kernels.quantise.by_tensor_both, x, form), functools.partial(plain_cast, form)
        yield piece(f"by_tensor_both {form.name}", 2 * x.nbytes + 2 * count, kernel, plain)
    added = functools.partial(kernels.quantise.add, x, other)
    yield piece("add", 3 * x.nbytes + coded_bytes, added, lambda: [x + other, float8.by_group(x + other, E4M3)])
    forward = functools.partial(kernels.norm8.forward, coded, weight, 1e-5)
    yield piece("norm8 forward", coded_bytes + x.nbytes, lambda: forward()[:2], plain_norm)
    yield from gated8_cases(sizes, device)
    inverse = plain_norm()[1].contiguous()

    def plain_norm_backward() -> Sequence[Tensor]:
        normed, weighted = coded.decode() * inverse[:, None], grad.float() * weight
        dx = inverse[:, None] * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
        return [dx.bfloat16(), (grad.float() * normed).sum(0)]

    backward = functools.partial(kernels.norm8.backward, grad, coded, weight, inverse)
    yield piece("norm8 backward", coded_bytes + 2 * x.nbytes, backward, plain_norm_backward)


def gated8_cases(sizes: Sizes, device: str) -> Iterator[Case]:
    """SwiGLU between codes."""
    gate, up, opened = (float8.by_group(made(device, sizes.tokens, sizes.ffn, seed=i), E4M3) for i in (4, 5, 6))
    grad = made(device, sizes.tokens, sizes.ffn, seed=7)

    def plain_backward() -> Sequence[Tensor]:
        wide, s = grad.float(), torch.sigmoid(gate.decode())
        d_gate = wide * up.decode() * s * (1 + gate.decode() * (1 - s))
        return [d_gate.bfloat16(), (wide * opened.decode()).bfloat16()]

    yield piece(
        "gated8 silu",
        2 * gate.nbytes,
        lambda: [kernels.gated8.silu(gate)],
        lambda: [float8.by_group(torch.nn.functional.silu(gate.decode()), E4M3)],
    )
    yield piece(
        "gated8 product",
        2 * gate.nbytes + grad.nbytes,
        lambda: kernels.gated8.product(opened, up)[:1],
        lambda: [(opened.decode() * up.decode()).bfloat16()],
    )
    yield piece(
        "gated8 backward",
        3 * gate.nbytes + 3 * grad.nbytes,
        lambda: kernels.gated8.backward(grad, gate, opened, up)[:2],
        plain_backward,
    )


def difference(case: Case) -> float:
    """How far the kernel's results are from the plain form's, codes decoded: the largest of norm over norm."""
    worst = 0.0
    for pair in zip(case.kernel(), case.plain(), strict=True):
        found, want = (x.decode(torch.float64) if isinstance(x, Scaled) else x.double() for x in pair)
        worst = max(worst, float((found - want).norm() / want.norm().clamp_min(1e-30)))
    return worst


def seconds(arm: Callable[[], Any], device: str, calls: int) -> float:
    """The median time of a call."""
    if device == "cpu":
        start = time.perf_counter()
        arm()
        return time.perf_counter() - start
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for begin, end in marks:
        flush.zero_()
        begin.record()
        arm()
        end.record()
    torch.cuda.synchronize()
    return median(begin.elapsed_time(end) for begin, end in marks) / 1e3


def copy_rate(device: str, calls: int) -> float:
    """Bytes per second read and written by a copy of 1 GiB (64 KiB on a CPU)."""
    x = torch.empty(1 << (30 if device == "cuda" else 16), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    y.copy_(x)
    return 2 * x.nbytes / seconds(lambda: y.copy_(x), device, calls)


def measured(case: Case, device: str, options: argparse.Namespace, copy: float) -> dict[str, Any]:
    """A row of the table: every round of every arm, and what follows."""
    arms: dict[str, Arm] = {"kernel": case.kernel, "plain": case.plain}
    if device == "cuda":
        arms["compiled"] = case.compiled
    for arm in arms.values():
        arm()
    rounds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(options.rounds):
        for name, arm in arms.items():
            rounds[name].append(seconds(arm, device, options.calls))
    middle = {name: median(found) for name, found in rounds.items()}
    rate = case.nbytes / middle["kernel"]
    return {
        "kernel": case.name,
        "bytes": case.nbytes,
        "difference": difference(case),
        "seconds": rounds,
        "bytes_per_second": rate,
        "share_of_copy": rate / copy,
        "faster_than": {name: middle[name] / middle["kernel"] for name in middle if name != "kernel"},
    }


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        prog="gpu_kernels.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--interpret", action="store_true", help="toy sizes on the CPU; times mean nothing there")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--calls", type=int, default=20, help="timed calls of a round; default: %(default)s")
    parser.add_argument("--only", help="cases whose name begins so")
    parser.add_argument("--json", action="store_true", help="the record on standard output instead of the table")
    parser.add_argument("--no-evidence", action="store_true", help="write no record")
    return parser.parse_args(argv)


def missing(options: argparse.Namespace) -> str | None:
    """Why nothing can be measured here, and what to do."""
    if not kernels.there():
        return "Triton is not installed: pip install triton"
    if not options.interpret and not kernels.work_on(torch.device("cuda", 0)):
        return "no GPU on which the kernels can be built; --interpret tries the program at toy size without one"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the record. Exit: 0 done, 1 a kernel's results differ, 2 nothing to run on."""
    options = arguments(argv)
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, by the first kernel
    why = missing(options)
    if why:
        print(why, file=sys.stderr)
        return 2
    device, sizes = ("cpu", TOY) if options.interpret else ("cuda", LARGE)
    copy = copy_rate(device, options.calls)
    cases = [*model_cases(sizes, device), *eight_bit_cases(sizes, device)]
    chosen = [case for case in cases if case.name.startswith(options.only or "")]
    rows = [measured(case, device, options, copy) for case in chosen]
    record = evidence_file.head("gpu_kernels") | {"settings": vars(options), "sizes": vars(sizes)}
    record |= {"gpu": torch.cuda.get_device_name() if device == "cuda" else None, "copy_bytes_per_second": copy}
    record |= {"kernels": rows, "wrong": [row["kernel"] for row in rows if not row["difference"] <= CLOSE]}
    if options.json:
        print(json.dumps(record, indent=1))
    else:
        print(f"copy: {copy / 1e9:.0f} GB/s" + ("" if device == "cuda" else " (interpreted: times mean nothing)"))
        for row in rows:
            faster = "  ".join(f"{name} {times:5.2f}x" for name, times in row["faster_than"].items())
            rate = f"{row['bytes_per_second'] / 1e9:8.1f} GB/s  {row['share_of_copy']:6.1%} of copy"
            print(f"{row['kernel']:<20} {row['bytes'] / 1e6:9.3f} MB  {rate}  time of: {faster}")
    if not options.no_evidence and device == "cuda":
        print(f"record: {evidence_file.write(record, evidence_file.FOLDER)}", file=sys.stderr)
    for name in record["wrong"]:
        print(f"{name} differs from its plain form", file=sys.stderr)
    return 1 if record["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
