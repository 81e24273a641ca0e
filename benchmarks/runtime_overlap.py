"""What running things beside each other buys on gloo ranks of this machine, arm against arm in the same processes.

    sends     a pipeline that hands micro-batches on early, over one that hands them on in turn
    slices    tensor parallel in 2 and 4 slices, over exchange and then product
    gather    weights of the first block that travel while rows are drawn, over weights that wait
    rows      ranks that copy their rows from one reader, over ranks that each read them: seconds of a draw, and of CPU
    copy      the first stage of a checkpoint into memory that is kept, over memory that is taken each time

Ratios are taken within a round, arms take turns in it; below 1 is faster. Two cores run two or four ranks: what an
exchange waits for here is mostly the other rank's turn on a core, not a network.

Example: python benchmarks/runtime_overlap.py --rounds 9
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import evidence_file
import numpy as np
import torch

from lmworks.data import sharing
from lmworks.data.identity import Identity, SourceIdentity
from lmworks.data.load import Loader
from lmworks.data.mixture import Mixture
from lmworks.data.pack import Documents, Stream, Tokens
from lmworks.model.decoder import DecoderConfig
from lmworks.parallel import gang, readers, world
from lmworks.parallel.apply import Placement
from lmworks.parallel.layout import Layout
from lmworks.train.gradient import Clip
from lmworks.train.optim import AdamW
from lmworks.train.rehearse import Scene, placed, stepping
from lmworks.train.staging import Staging

ROWS, LENGTH = 8, 256
MODEL = DecoderConfig(vocab_size=2048, n_layers=4, hidden_size=256, n_heads=8, n_kv_heads=8, ffn_size=768)
TP = Layout(dp_shard=1, tp=2)
DIVIDED = replace(TP, sequence_parallel=True)
PAIRS: dict[str, tuple[Layout, Layout]] = {
    "sends, pp 2": (Layout(dp_shard=1, pp=2), Layout(dp_shard=1, pp=2, sends="early")),
    "sends, pp 4": (Layout(dp_shard=1, pp=4), Layout(dp_shard=1, pp=4, sends="early")),
    "slices 2, tp 2": (TP, replace(TP, tp_slices=2)),
    "slices 4, tp 2": (TP, replace(TP, tp_slices=4)),
    "slices 2, sequence parallel": (DIVIDED, replace(DIVIDED, tp_slices=2)),
    "slices 4, sequence parallel": (DIVIDED, replace(DIVIDED, tp_slices=4)),
    "gather, fsdp 2": (Layout(dp_shard=2), Layout(dp_shard=2)),
}
Arms = dict[str, Callable[[], Any]]


def scene_of(layout: Layout) -> Scene:
    """Two rows a micro-batch where there is a pipeline, else all of a rank's at once."""
    micro = 1 if layout.pp > 1 else ROWS
    return Scene(
        model=MODEL,
        layout=layout,
        rows=ROWS,
        micro_rows=micro,
        length=LENGTH,
        optimizer=AdamW(lr=1e-3),
        gradient=(Clip(),),
    )


def late(step: Callable[[], Any]) -> Callable[[], Any]:
    """A step that asks for no weights before they are needed."""
    begin = Placement.begin

    def run() -> None:
        Placement.begin = lambda self: None  # type: ignore[method-assign]
        try:
            step()
        finally:
            Placement.begin = begin  # type: ignore[method-assign]

    return run


def steps(rank: int, name: str, rounds: int, times: int) -> dict[str, list[float]]:
    """Seconds of a step of both arms, round by round, as one of the ranks."""
    made = {}
    for arm, layout in zip(("plain", "beside"), PAIRS[name], strict=True):
        scene = scene_of(layout)
        made[arm] = stepping(placed(rank, scene, torch.float32), scene)
    arms: Arms = dict(made)
    if name.startswith("gather"):
        arms["plain"] = late(arms["plain"])
    wire = made["plain"].placement.wire
    return in_turns(arms, rounds, times, wire.wait)


def draws(rank: int, rounds: int, times: int, memory: str) -> dict[str, list[float]]:
    """Seconds of a draw of 64 rows of 1,024 tokens, as one of two ranks of tp; and of CPU, of this process."""
    sharing.MEMORY = Path(memory)
    wire = world.wire(TP, world.Seat(rank=rank, world=2, local_rank=rank, local_world=2))
    how, _ = readers.appoint(wire, torch.device("cpu"), rows=64, length=1024)
    loaders = {"plain": loader(None), "beside": loader(how)}
    arms: Arms = {arm: lambda one=one: one.draw(64) for arm, one in loaders.items()}
    found = in_turns(arms, rounds, times, wire.wait)
    for one in loaders.values():
        one.close()
    return found


def loader(how: sharing.Sharing | None) -> Loader:
    """Rows of made-up documents of 20 to 2,000 tokens; nothing is prepared ahead, so a draw is what it costs."""
    random = np.random.default_rng(0)
    lengths = random.integers(20, 2000, 2000)
    ends = np.cumsum(lengths)
    documents = Documents(
        Tokens([random.integers(0, 2**15, ends[-1], dtype=np.uint16)]),
        (ends - lengths).astype(np.int64),
        lengths.astype(np.int64),
        lengths.astype(np.int64),
        np.arange(len(lengths), dtype=np.uint64),
    )
    identity = Identity(
        seed=0,
        sequence_length=1024,
        validation=0.0,
        tokenizer="none",
        sources={"a": SourceIdentity(weight=1.0, source_id="a", key="a", contents="a")},
        cache=Path("nowhere"),
        files={},
    )
    stream = Stream(documents, sequence_length=1024, seed=0, name="a")
    return Loader([stream], Mixture([1.0]), identity, prefetch=0, sharing=how)


def copies(rounds: int, times: int) -> dict[str, list[float]]:
    """Seconds of a copy of 60 tensors of 4 MiB."""
    tensors = {"model": {str(i): torch.randn(1 << 20) for i in range(60)}}
    staging = Staging()
    arms: Arms = {"plain": lambda: Staging().copy(tensors), "beside": lambda: staging.copy(tensors)}
    return in_turns(arms, rounds, times, lambda: None)


def in_turns(arms: Arms, rounds: int, times: int, wait: Callable[[], None]) -> dict[str, list[float]]:
    """Seconds of each arm by round, and those of CPU as 'ARM cpu'; the first arm of a round is another each time."""
    found: dict[str, list[float]] = {f"{arm}{kind}": [] for arm in arms for kind in ("", " cpu")}
    for arm in arms.values():
        arm(), arm()
    for number in range(rounds):
        for arm in list(arms) if number % 2 == 0 else list(reversed(arms)):
            wait()
            begun, busy = time.perf_counter(), time.process_time()
            for _ in range(times):
                arms[arm]()
            found[f"{arm} cpu"].append((time.process_time() - busy) / times)
            wait()
            found[arm].append((time.perf_counter() - begun) / times)
    return found


def ratios(seconds: dict[str, list[float]], kind: str = "") -> list[float]:
    """Of the arm that works beside over the plain one, by round."""
    pairs = zip(seconds[f"beside{kind}"], seconds[f"plain{kind}"], strict=True)
    return [beside / max(plain, 1e-9) for beside, plain in pairs]


def main() -> None:
    """Measure every case, print a line for each, write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="of an arm in a round")
    parser.add_argument("--cases", nargs="+", default=[*PAIRS, "rows, tp 2", "copy"])
    options = parser.parse_args()
    results = []
    for name in options.cases:
        load = os.getloadavg()[0]
        if name in PAIRS:
            found = gang.run(steps, PAIRS[name][0].ranks, name, options.rounds, options.steps)
        elif name.startswith("rows"):
            with tempfile.TemporaryDirectory(dir=sharing.MEMORY) as memory:
                found = gang.run(draws, 2, options.rounds, options.steps, memory)
        else:
            found = [copies(options.rounds, options.steps)]
        wall = ratios(found[0])
        cpu = [sum(each) / len(found) for each in zip(*(ratios(seconds, " cpu") for seconds in found), strict=True)]
        results.append({"case": name, "seconds": found, "ratios": wall, "cpu_ratios": cpu, "load_before": load})
        text = f"{name:28} {median(found[0]['plain']) * 1e3:8.1f} ms plain; beside / plain {median(wall):.3f}"
        print(f"{text} ({min(wall):.3f} to {max(wall):.3f}), of CPU {median(cpu):.3f}", flush=True)
    settings = {"rows": ROWS, "sequence": LENGTH, "rounds": options.rounds, "steps": options.steps}
    record = evidence_file.head("runtime_overlap") | settings | {"results": results}
    print(evidence_file.write(record, evidence_file.FOLDER))


if __name__ == "__main__":
    main()
