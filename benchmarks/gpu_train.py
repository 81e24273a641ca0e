"""lmworks' training step on one GPU: eager, compiled, and compiled with float8 products where torchao is installed.

Trains a 1B Llama shape (Llama-3.2-1B) in bf16 on random tokens with the parts of `lmworks train`: step, model, loss,
AdamW and clipping. Arms take turns, each in a process of its own. Reported: tokens/s, model FLOPs utilisation (MFU) of
the dense bf16 datasheet rate, peak memory. MFU of float8 is also against the bf16 rate, so that arms can be compared.

Example: python benchmarks/gpu_train.py
Without a GPU, to try the program itself: python benchmarks/gpu_train.py --device cpu --size toy --rounds 1
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import evidence_file
import torch
from cases import size
from torch import nn
from verdicts import Verdict, spread

from lmworks.data.load import Batch
from lmworks.model.decoder import DecoderConfig
from lmworks.model.init import initialise
from lmworks.parallel.apply import whole
from lmworks.train.gradient import Clip
from lmworks.train.objective import CrossEntropy
from lmworks.train.optim import AdamW
from lmworks.train.probe import Probe
from lmworks.train.rate import peak_flops, peak_memory_bytes
from lmworks.train.slots import SelectAll
from lmworks.train.step import Step

SIZES = {
    "1b": DecoderConfig(**asdict(size("llama-3.2-1b"))),
    "toy": DecoderConfig(vocab_size=512, n_layers=2, hidden_size=64, n_heads=4, n_kv_heads=2, ffn_size=128, tied=True),
}
ARMS = ("eager", "compile", "float8")
MFU_BAR, FLOAT8_BAR = 0.55, 1.4


class RandomRows:
    """A source of random tokens that are on the device already, one document per row."""

    def __init__(self, vocab: int, sequence: int, device: torch.device) -> None:
        self._vocab, self._sequence, self._device = vocab, sequence, device
        self._generator = torch.Generator(device=device).manual_seed(0)

    def draw(self, rows: int) -> Batch:
        """New rows; the targets are the tokens one place on."""
        shape = (rows, self._sequence + 1)
        ids = torch.randint(self._vocab, shape, generator=self._generator, device=self._device)
        positions = torch.arange(self._sequence, device=self._device).expand(rows, -1)
        return Batch(
            ids[:, :-1].contiguous(),
            ids[:, 1:].contiguous(),
            positions,
            torch.zeros_like(positions),
            torch.zeros_like(positions),
        )

    def state(self) -> dict[str, Any]:
        """Nothing is resumed here."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Nothing is resumed here."""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        prog="gpu_train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--batch", type=int, default=8, help="rows of a step; default: %(default)s")
    parser.add_argument("--sequence", type=int, default=2048, help="tokens of a row; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a run; default: %(default)s")
    parser.add_argument("--warmup", type=int, default=5, help="dropped steps of a run; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="the record on standard output instead of the table")
    parser.add_argument("--no-evidence", action="store_true", help="write no record")
    parser.add_argument("--one", choices=ARMS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def to_float8(model: nn.Module, *, emulate: bool) -> None:
    """Float8 products in every linear layer of the blocks (torchao, dynamic scales per tensor)."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig(emulate=emulate)
    convert_to_float8_training(model.get_submodule("blocks"), config=config)


def step_of(arm: str, options: argparse.Namespace) -> Step:
    """The parts of a training step, wired as `lmworks train` wires them."""
    device, config = torch.device(options.device), SIZES[options.size]
    model = config.build(dtype=torch.bfloat16, device=device)
    initialise(model, 0)
    if arm == "float8":
        to_float8(model, emulate=device.type == "cpu")
    if arm != "eager":
        for block in model.get_submodule("blocks").children():
            block.compile()
    objective, optimizer = CrossEntropy(), AdamW(lr=3e-4)
    return Step(
        placement=whole(model),
        source=RandomRows(config.vocab_size or 0, options.sequence, device),
        selector=SelectAll().start(model, optimizer, {"random": 1.0}),
        objective=objective,
        gradient=(Clip(),),
        update=optimizer.build(model),
        probe=Probe(model, objective, seed=0),
        rows=options.batch,
        micro_rows=options.batch,
    )


def run_one(arm: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time one arm in this process. A step ends when its loss has reached the host, so no further wait is needed."""
    step = step_of(arm, options)
    seconds, loss = [], 0.0
    for index in range(options.warmup + options.steps):
        start = time.perf_counter()
        loss = step().loss
        if options.device == "cuda":
            torch.cuda.synchronize()
        if index >= options.warmup:
            seconds.append(time.perf_counter() - start)
    peak = peak_memory_bytes(torch.device(options.device))
    return {"seconds": seconds, "loss": loss, "peak_memory_bytes": peak}


def run_rounds(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every arm in turn, `rounds` times, each in a process of its own."""
    runs = []
    for turn in range(1, options.rounds + 1):
        for arm in options.arms:
            settings = [
                f"--{k}={getattr(options, k)}" for k in ("device", "size", "batch", "sequence", "steps", "warmup")
            ]
            command = [sys.executable, __file__, f"--one={arm}", *settings]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = done.stdout.strip().splitlines()
            run = json.loads(lines[-1]) if done.returncode == 0 else {"failed": done.stderr.strip()[-2000:]}
            runs.append({"arm": arm, "round": turn, **run})
            word = run["failed"].splitlines()[-1] if "failed" in run else f"{median(run['seconds']) * 1e3:.1f} ms"
            print(f"round {turn}/{options.rounds}  {arm:<8} {word}", file=sys.stderr, flush=True)
    return runs


def summary(runs: Sequence[dict[str, Any]], options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Verdict]]:
    """A row per arm, and the bars that the runs can be held against."""
    device = torch.device(options.device)
    rate, source = peak_flops(device, torch.bfloat16)
    flops = SIZES[options.size].cost(sequence=options.sequence).train_flops_per_token
    tokens = options.batch * options.sequence
    rows: list[dict[str, Any]] = []
    for arm in options.arms:
        good = [run for run in runs if run["arm"] == arm and "failed" not in run]
        if good:
            seconds = spread([median(run["seconds"]) for run in good])
            mfu = spread([tokens * flops / s / rate for s in seconds.each])
            peak = max(run["peak_memory_bytes"] for run in good)
            rows.append({"arm": arm, "step_seconds": seconds, "mfu": mfu, "peak_memory_bytes": peak})
            rows[-1] |= {"tokens_per_second": tokens / seconds.median, "mfu_against": source}
    by_arm = {row["arm"]: row for row in rows}
    bars = []
    bf16 = [row for row in rows if row["arm"] != "float8"]
    if bf16:
        best = max(bf16, key=lambda row: row["mfu"].median)
        bars.append(Verdict(what="MFU in bf16", bar=MFU_BAR, at_least=True, value=best["mfu"], against=best["arm"]))
        if "float8" in by_arm:
            pairs = zip(best["step_seconds"].each, by_arm["float8"]["step_seconds"].each, strict=False)
            faster = spread([ours / theirs for ours, theirs in pairs])
            bars.append(Verdict(what="float8 against bf16", bar=FLOAT8_BAR, at_least=True, value=faster))
    return rows, bars


def main(argv: Sequence[str] | None = None) -> int:
    """Run the arms, print the table, write the record. Exit: 0 bars met, 1 an arm failed, 2 usage, 4 a bar missed."""
    options = arguments(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU here; --device cpu --size toy tries the program without one", file=sys.stderr)
        return 2
    if options.one:
        print(json.dumps(run_one(options.one, options)))
        return 0
    if importlib.util.find_spec("torchao") is None and "float8" in options.arms:
        print("float8 is left out: torchao is not installed (extra gpu)", file=sys.stderr)
        options.arms = [arm for arm in options.arms if arm != "float8"]
    record = evidence_file.head("gpu_train") | {"settings": vars(options)}
    if options.device == "cuda":
        record["gpu"] = torch.cuda.get_device_name()
    runs = run_rounds(options)
    rows, bars = summary(runs, options)
    record |= {"arms": rows, "bars": [bar.table() for bar in bars], "runs": runs}
    text = json.dumps(record, indent=1, default=vars)
    if options.json:
        print(text)
    for row in [] if options.json else rows:
        speed = f"{row['step_seconds'].median * 1e3:9.1f} ms  {row['tokens_per_second']:9.0f} tok/s"
        print(f"{row['arm']:<8} {speed}  MFU {row['mfu'].text()}  {row['peak_memory_bytes'] / 2**30:.2f} GiB")
    for bar in [] if options.json else bars:
        print(f"{bar.what}: {bar.value.text()}, bar >= {bar.bar}: {bar.word()}")
    if not options.no_evidence:
        print(f"record: {evidence_file.write(json.loads(text), evidence_file.FOLDER)}", file=sys.stderr)
    if any("failed" in run for run in runs):
        return 1
    return 0 if all(bar.is_met for bar in bars) else 4


if __name__ == "__main__":
    sys.exit(main())
