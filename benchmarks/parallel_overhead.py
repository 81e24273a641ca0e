"""What lmworks' step costs over a plain loop of torch's own FSDP or DDP: 1, 2 and 4 gloo ranks of this machine.

Both arms live in the same processes, with the same model, the same rows and torch's AdamW, and take turns: some steps
of one, some steps of the other. What lmworks adds is counting targets over all ranks, the guard before the update, the
global norm, and the bill of what was sent. The plain arm clips by `clip_grad_norm_`, as tutorials do.

Example: python benchmarks/parallel_overhead.py --rounds 9
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import evidence_file
import torch
import torch.distributed as dist  # noqa: TID251  (the plain arm goes without lmworks)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh  # noqa: TID251
from torch.distributed.fsdp import fully_shard  # noqa: TID251
from torch.nn.parallel import DistributedDataParallel

from lmworks.data.load import Batch
from lmworks.model.decoder import DecoderConfig
from lmworks.model.init import initialise
from lmworks.parallel import gang
from lmworks.parallel.layout import Layout
from lmworks.train.gradient import Clip
from lmworks.train.objective import CrossEntropy
from lmworks.train.optim import AdamW
from lmworks.train.rehearse import SEED, MadeUp, Scene, placed, stepping
from lmworks.train.slots import combined

ROWS, LENGTH, BAR = 8, 128, 0.02
MODEL = DecoderConfig(vocab_size=4096, n_layers=6, hidden_size=256, n_heads=4, n_kv_heads=4, ffn_size=768)
CASES = {
    "one": Layout(dp_shard=1),
    "ddp-2": Layout(dp_replicate=2, dp_shard=1),
    "fsdp-2": Layout(dp_shard=2),
    "ddp-4": Layout(dp_replicate=4, dp_shard=1),
    "fsdp-4": Layout(dp_shard=4),
}


@dataclass(frozen=True)
class Timing:
    """How often what is timed."""

    rounds: int
    steps: int


class WithLoss(nn.Module):
    """A model whose forward pass ends in its loss, so that one module can be wrapped."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """The mean loss of this rank's rows."""
        objective = CrossEntropy()
        counts = {name: value.clamp(min=1) for name, value in objective.count(batch).items()}
        return combined(objective.loss(self.model, batch), counts)


def scene_of(layout: Layout) -> Scene:
    """The scene of lmworks' arm: all rows of a rank in one pass."""
    return Scene(
        model=MODEL,
        layout=layout,
        rows=ROWS,
        micro_rows=ROWS,
        length=LENGTH,
        optimizer=AdamW(lr=1e-3),
        gradient=(Clip(),),
    )


def plain(rank: int, name: str, scene: Scene) -> Callable[[], float]:
    """A step as a good tutorial writes it."""
    layout = scene.layout
    model = MODEL.build(dtype=torch.float32, param_dtype=torch.float32)
    initialise(model, SEED)
    module: nn.Module = WithLoss(model)
    if name.startswith("fsdp"):
        mesh = init_device_mesh("cpu", (layout.ranks,))
        for block in model.blocks.values():
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
    elif name.startswith("ddp"):
        module = DistributedDataParallel(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=not name.startswith("fsdp"))
    source = MadeUp(scene, (rank, layout.ranks))

    def step() -> float:
        batch = source.draw(ROWS)
        optimizer.zero_grad()
        loss = module(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def measure(rank: int, name: str, timing: Timing) -> dict[str, list[float]]:
    """Seconds per step of both arms, round by round, as one of the ranks."""
    scene = scene_of(CASES[name])
    arms: dict[str, Callable[[], Any]] = {
        "lmworks": stepping(placed(rank, scene, torch.float32), scene),
        "plain": plain(rank, name, scene),
    }
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    for step in arms.values():
        step(), step()
    for number in range(timing.rounds):
        order = list(arms) if number % 2 == 0 else list(reversed(arms))
        for arm in order:
            dist.barrier()
            begun = time.perf_counter()
            for _ in range(timing.steps):
                arms[arm]()
            dist.barrier()
            found[arm].append((time.perf_counter() - begun) / timing.steps)
    return found


def main() -> None:
    """Measure every case, print a line for each, write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="of an arm in a round")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    timing = Timing(options.rounds, options.steps)
    results = []
    for name in options.cases:
        load = os.getloadavg()[0]
        seconds = gang.run(measure, CASES[name].ranks, name, timing, minutes=60)[0]
        ratios = [ours / theirs for ours, theirs in zip(seconds["lmworks"], seconds["plain"], strict=True)]
        overhead = median(ratios) - 1
        verdict = "met" if overhead <= BAR else "missed"
        results.append(
            {
                "case": name,
                "ranks": CASES[name].ranks,
                "seconds_per_step": seconds,
                "ratios": ratios,
                "overhead": overhead,
                "bar": BAR,
                "verdict": verdict,
                "load_average_before": load,
            }
        )
        between = f"{min(ratios) - 1:+.1%} to {max(ratios) - 1:+.1%} by round"
        times = ", ".join(f"{arm} {median(each):.3f} s" for arm, each in seconds.items())
        print(f"{name:8} {times} a step; overhead {overhead:+.1%} ({between}), bar {BAR:.0%}: {verdict}", flush=True)
    record = evidence_file.head("parallel_overhead") | {
        "rows": ROWS,
        "sequence": LENGTH,
        "rounds": timing.rounds,
        "steps": timing.steps,
        "results": results,
    }
    print(evidence_file.write(record, evidence_file.FOLDER))


if __name__ == "__main__":
    main()
