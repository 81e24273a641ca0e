"""How long ranks wait for each other on real documents of unequal length, and what shared attention leaves of it.

Nothing is trained. Lengths are those of this machine's Python sources: every file a document ("files"), or all files of
a folder one document, as repositories are in long-context corpora ("folders"). They are packed in four ways
(`parallel/laying.py`) and put on two clocks: this CPU, whose attention is measured here by the kernel that serves
tasks, in seconds of its thread; and Llama 8B on tp = 8 H200 by a roofline, which is a model and says so. The links of
both are modelled. A picture goes beside the record.

Example: python benchmarks/attention_balance.py --steps 4
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import evidence_file
import matplotlib as mpl
import numpy as np
import torch

from lmworks.data.lengths import drawn, of_reader
from lmworks.data.pack import shuffled
from lmworks.data.read import PythonStdlib
from lmworks.maths.causal import Run, attend_runs
from lmworks.parallel.aligned import plain_pipeline, shared_pipeline
from lmworks.parallel.idle import Outcome, Packing, Setting, outcome, together
from lmworks.parallel.laying import by_work, steps
from lmworks.parallel.speeds import Roofline, Speeds, Table, Turns
from lmworks.parallel.tasks import Sizes

mpl.use("agg")
from matplotlib import pyplot as plt

BYTES_PER_TOKEN = 4
"""Of source text, as byte-level BPE of a large vocabulary makes it."""
RANKS = (2, 4, 8, 16)
PUBLISHED = 524288
"""Tokens of the rows for which DistCA's paper gives idle time, on a mix that it calls Pretrain."""
ARMS: dict[str, tuple[Packing, dict[str, Any]]] = {
    "plain": ("plain", {}),
    "by work, cap 1.0": ("by-work", {"cap": 1.0}),
    "by work, cap 1.2": ("by-work", {"cap": 1.2}),
    "by document": ("by-document", {}),
    "shared": ("shared", {}),
}
HEADS, GROUPS, HEAD_DIM, FFN = 8, 2, 64, 1408
"""Of the block that is measured on this CPU; its hidden size is HEADS x HEAD_DIM."""


def files() -> np.ndarray:
    """Tokens of the standard library's files, and of the files of installed packages by their size."""
    own = of_reader(PythonStdlib(tests=True), BYTES_PER_TOKEN)
    return np.concatenate([own, [size for size, _ in _installed()]]).astype(np.int64)


def folders() -> np.ndarray:
    """Tokens of all files of a folder, of installed packages and of the standard library."""
    found: Counter[str] = Counter()
    for size, folder in _installed():
        found[folder] += size
    root = sysconfig.get_path("stdlib")
    for file in PythonStdlib(tests=True).files():
        found[str(Path(root, file.name).parent)] += file.path.stat().st_size // BYTES_PER_TOKEN
    return np.array(sorted(found.values()), dtype=np.int64)


def _installed() -> list[tuple[int, str]]:
    """(tokens, folder) of every Python file of installed packages."""
    root = Path(sysconfig.get_path("purelib"))
    sizes = ((path.stat().st_size // BYTES_PER_TOKEN, str(path.parent)) for path in sorted(root.rglob("*.py")))
    return [(size, folder) for size, folder in sizes if size > 0]


CORPORA: dict[str, Callable[[], np.ndarray]] = {"files": files, "folders": folders}


def least_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Of the calling thread: others on the machine take wall time, not this."""
    found = []
    for _ in range(repeats + 1):
        begun = time.thread_time()
        call()
        found.append(time.thread_time() - begun)
    return min(found[1:])


def measured(queries: Sequence[int], ratios: Sequence[int], repeats: int) -> tuple[Table, float]:
    """Forward seconds of tasks on one thread of this CPU, and of a block's products for one token."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    seconds = []
    for q in queries:
        row = []
        for ratio in ratios:
            q_MNh = torch.randn(q, HEADS, HEAD_DIM, generator=generator)
            k_KGh, v_KGh = torch.randn(2, q * ratio, GROUPS, HEAD_DIM, generator=generator)
            run = [Run(0, 0, q, q * ratio)]
            row.append(least_seconds(lambda q=q_MNh, k=k_KGh, v=v_KGh, r=run: attend_runs(q, k, v, r), repeats))
        seconds.append(tuple(row))
    width, tokens = HEADS * HEAD_DIM, 1024
    x_TD = torch.randn(tokens, width, generator=generator)
    heads = [torch.randn(n, width, generator=generator) for n in (width, 2 * GROUPS * HEAD_DIM, width, FFN, FFN)]
    down_DF = torch.randn(width, FFN, generator=generator)

    def linear() -> None:
        for weight in heads:
            x_TD @ weight.T
        (x_TD @ heads[-1].T) @ down_DF.T

    table = Table(queries=tuple(queries), ratios=tuple(map(float, ratios)), seconds=tuple(seconds))
    return table, least_seconds(linear, repeats) / tokens


def clocks(queries: Sequence[int], ratios: Sequence[int], repeats: int) -> dict[str, Setting]:
    """What is the same in all arms of a clock; `ranks` is set later."""
    table, linear = measured(queries, ratios, repeats)
    own = Sizes.of(HEADS, GROUPS, HEAD_DIM, 4)
    cpu = Speeds(attention=table, linear=linear, bytes_per_second=1.25e9, sizes=own)
    tp, large = 8, Sizes.of(32 // 8, 8 // 8, 128, 2)
    roof = Roofline(flops_per_pair=4 * 4096 / tp, flops_per_second=0.6 * 989e12, sizes=large, bytes_per_second=4.8e12)
    gpu = Speeds(attention=roof, linear=2 * 218e6 / tp / (0.5 * 989e12), bytes_per_second=50e9, sizes=large)
    return {
        "cpu": Setting(ranks=1, speeds=cpu, activation_bytes=4 * 34 / 2 * HEADS * HEAD_DIM),
        "8b": Setting(ranks=1, speeds=gpu, activation_bytes=34 * 4096 / tp),
    }


def row_of(made: Outcome, setting: Setting) -> dict[str, float]:
    """What is kept of an outcome."""
    return {
        "idle": made.idle,
        "seconds": made.seconds,
        "largest_attention": made.largest,
        "memory": made.memory,
        "moved_of_gather": made.moved_bytes / made.gather_bytes,
        "moved_bytes_per_token": made.moved_bytes / made.tokens,
        "tokens": made.tokens,
        "ranks": setting.ranks,
    }


def packings(lengths: np.ndarray, base: Setting, tokens: int, count: int) -> list[dict[str, Any]]:
    """Every arm at every number of ranks, on the same rows: two of `tokens` on each rank."""
    rows = []
    for ranks in RANKS:
        taken = list(islice(steps(lengths.tolist(), ranks=ranks, tokens=tokens, rows_each=2), count))
        for arm, (packing, other) in ARMS.items() if taken else ():
            setting = dataclasses.replace(base, ranks=ranks, **other)
            made = together([outcome(packing, step, setting) for step in taken])
            offered = len(taken) * ranks * 2 * tokens
            rows.append({"arm": arm, "steps": len(taken), "left": 1 - made.tokens / offered} | row_of(made, setting))
    return rows


def varied(lengths: np.ndarray, base: Setting, tokens: int, count: int) -> list[dict[str, Any]]:
    """Shared attention on 8 ranks by tolerance, and by whose turn it is."""
    taken = list(islice(steps(lengths.tolist(), ranks=8, tokens=tokens, rows_each=2), count))
    settings = [{"tolerance": tolerance} for tolerance in (0.0, 0.05, 0.1, 0.15, 0.2)]
    settings += [{"turns": turns} for turns in get_args(Turns)]
    rows = []
    for other in settings:
        setting = dataclasses.replace(base, ranks=8, **other)
        rows.append(other | row_of(together([outcome("shared", step, setting) for step in taken]), setting))
    return rows


def pipelines(lengths: np.ndarray, base: Setting, tokens: int) -> list[dict[str, Any]]:
    """Replicas of pipelines: 1f1b as packed and by work, and stages that share their attention."""
    rows = []
    for data, stages, count in ((2, 2, 4), (4, 2, 4), (2, 4, 8), (4, 4, 8)):
        made = next(steps(lengths.tolist(), ranks=data * count, tokens=tokens, rows_each=2), None)
        if made is None:
            continue
        documents = [length for rank in made for row in rank for length in row]
        packed = by_work(documents, ranks=data * count, room=2 * tokens).held
        by_arm = {
            "plain": [made[i * count : (i + 1) * count] for i in range(data)],
            "by work": [[(row,) for row in packed[i * count : (i + 1) * count]] for i in range(data)],
        }
        setting = dataclasses.replace(base, ranks=data * stages)
        found = {arm: plain_pipeline(replicas, stages, setting) for arm, replicas in by_arm.items()}
        found["shared"] = shared_pipeline(by_arm["plain"], stages, setting)
        row: dict[str, Any] = {"data": data, "stages": stages, "micro_batches": count}
        row |= {"idle": {arm: piped.idle for arm, piped in found.items()}}
        rows.append(row | {"speed_up": {a: found[a].seconds / found["shared"].seconds for a in by_arm}})
    return rows


def verdicts(rows: Sequence[dict[str, Any]], tolerance: float) -> dict[str, Any]:
    """Does idle time grow with the ranks where attention is not shared, and stay below the tolerance where it is?"""
    by = {arm: [row["idle"] for row in rows if row["arm"] == arm] for arm in ARMS}
    growing = {
        arm: sum(b > a for a, b in zip(by[arm], by[arm][1:], strict=False)) for arm in ("plain", *list(ARMS)[1:3])
    }
    shared = [row for row in rows if row["arm"] == "shared"]
    return {
        "steps_up_with_ranks": {arm: f"{up} of {len(by[arm]) - 1}" for arm, up in growing.items()},
        "last_over_first": {arm: by[arm][-1] > by[arm][0] for arm in growing},
        "shared_below_tolerance": all(row["idle"] < tolerance for row in shared),
        "shared_at_equal_memory": all(row["memory"] == 1 for row in shared),
    }


def draw(studies: Sequence[dict[str, Any]], path: Path) -> None:
    """Idle time over ranks, a panel for each corpus and clock at the longest rows that all have."""
    longest = min(max(s["tokens_of_a_row"] for s in studies if s["corpus"] == name) for name in _names(studies))
    shown = {(s["clock"], s["corpus"]): s for s in studies if s["tokens_of_a_row"] == longest}
    named, corpora = (list(dict.fromkeys(names)) for names in zip(*shown, strict=True))
    size = (4.2 * len(corpora), 3.2 * len(named))
    figure, panels = plt.subplots(len(named), len(corpora), figsize=size, squeeze=False, sharey=True, sharex=True)
    for (clock, corpus), study in shown.items():
        panel = panels[named.index(clock)][corpora.index(corpus)]
        for arm in ARMS:
            own = [row for row in study["packings"] if row["arm"] == arm]
            panel.plot([r["ranks"] for r in own], [100 * r["idle"] for r in own], marker="o", label=arm)
        panel.set_xscale("log", base=2)
        panel.set_xticks(RANKS, [str(ranks) for ranks in RANKS], minor=False)
        panel.set_title(f"{corpus}, {clock}", fontsize=10)
    figure.supxlabel("ranks of data parallel")
    figure.supylabel("idle, % of a rank's time")
    panels[0][0].set_ylim(bottom=0)
    panels[0][-1].legend(fontsize=8)
    figure.suptitle(f"Two rows of {longest} tokens on each rank; modelled links, 8b modelled altogether", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _names(studies: Sequence[dict[str, Any]]) -> set[str]:
    return {study["corpus"] for study in studies}


def show(study: dict[str, Any]) -> None:
    """A table for people."""
    print(f"{study['corpus']}, {study['clock']}, rows of {study['tokens_of_a_row']}")
    for row in study["packings"]:
        print(
            f"  {row['ranks']:3} ranks  {row['arm']:<18} idle {100 * row['idle']:5.1f} %  memory {row['memory']:.2f}"
            f"  moved {100 * row['moved_of_gather']:5.1f} % of a gather  left {100 * row['left']:.1f} %"
        )


def main() -> None:
    """Measure, work everything out, print, write the evidence and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="micro-batches of each number of ranks, at most")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 65536, 131072], help="of a row")
    parser.add_argument("--corpora", nargs="+", choices=[*CORPORA, "pretrain"], default=[*CORPORA, "pretrain"])
    parser.add_argument("--toy", action="store_true", help="a small table, for tests")
    parser.add_argument("--no-evidence", action="store_true")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    grid = ((16, 64), (1, 4), 1) if options.toy else ((16, 64, 128, 256, 1024), (1, 4, 16), 3)
    settings = clocks(*grid)
    studies = []
    for corpus in options.corpora:
        lengths = drawn("pretrain", 20000, longest=PUBLISHED) if corpus == "pretrain" else CORPORA[corpus]()
        lengths = lengths[shuffled(len(lengths), 0)]
        for clock, base in settings.items():
            wanted = [*options.tokens, PUBLISHED] if corpus == "pretrain" and not options.toy else options.tokens
            for tokens in wanted:
                study: dict[str, Any] = {"corpus": corpus, "clock": clock, "tokens_of_a_row": tokens}
                study["documents"] = {
                    "number": len(lengths),
                    "tokens": int(lengths.sum()),
                    "longest": int(lengths.max()),
                }
                study["packings"] = packings(lengths, base, tokens, options.steps)
                study["verdicts"] = verdicts(study["packings"], base.tolerance)
                study["varied"] = varied(lengths, base, tokens, options.steps)
                study["pipelines"] = pipelines(lengths, base, tokens)
                show(study)
                studies.append(study)
    if options.no_evidence:
        return
    record = evidence_file.head("attention_balance") | {
        "bytes_per_token": BYTES_PER_TOKEN,
        "clocks": {
            name: {"link_bytes_per_second": s.speeds.bytes_per_second, "linear_seconds_per_token": s.speeds.linear}
            | {"attention": dataclasses.asdict(s.speeds.attention), "modelled": name != "cpu"}
            for name, s in settings.items()
        },
        "load_average_before": load,
        "loaded": load > (os.cpu_count() or 1),  # seconds of the thread were taken, not of the wall
        "studies": studies,
    }
    path = evidence_file.write(record, evidence_file.FOLDER)
    draw(studies, path.with_suffix(".png"))
    print(path)


if __name__ == "__main__":
    main()
