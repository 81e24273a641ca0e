"""Published tables beside the planner's model: every row, its residual, and the one fit of each hardware.

    python benchmarks/plan_tables.py            model the tables, write a record
    python benchmarks/plan_tables.py --fit      fit A100 to rows 1 to 4 of Megatron's table, and H100 to two rows of
                                                TorchTitan's; write recipes/clusters/fits/

A row counts as reproduced within 10 %. Exit 0: all are; 4: some are not, and the record says which and why.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import evidence_file
import numpy as np
import plan_ladders
import tomli_w

from lmworks.core import recipe as recipes
from lmworks.methods import megatron
from lmworks.parallel.layout import Layout
from lmworks.plan import cluster as clusters
from lmworks.plan import simulate
from lmworks.plan.choice import Choice
from lmworks.plan.cluster import Cluster, Efficiency, Figure, Point
from lmworks.plan.shape import Ground
from lmworks.plan.time import Seconds
from lmworks.plan.work import Practice, Work

WITHIN = 0.10
HEADS = {2304: 24, 3072: 32, 4096: 32, 6144: 48, 8192: 64, 10240: 80, 12288: 96, 16384: 128, 20480: 128, 25600: 160}
"""Attention heads of the table's models, by hidden size (SC 2021, table 1)."""
MEGATRON = Practice(square=True, scores_in_memory=True, data_overlaps=False, gradient_bytes=2, divided_sends=True)
"""Megatron-LM in 2021: no fused attention, gradients in 16 bits summed behind the last micro-batch."""


def cluster_with(name: str, found: Efficiency | None = None, **figures: float) -> Cluster:
    """A cluster, with another efficiency than its file's, and other figures."""
    changed = {setting: Figure(value=value, source="the table") for setting, value in figures.items()}
    cluster = dataclasses.replace(clusters.load(name), **changed)
    if found is not None:
        cluster.__dict__["efficiency"] = found  # a cached property of a frozen dataclass
    return cluster


def recipe_of(
    model: dict[str, Any], sequence: int, batch: int, precision: str = "bf16", saved: Any = "recompute"
) -> Any:
    """A training recipe that the planner reads."""
    table = {
        "do": "train",
        "steps": 1,
        "batch_size": batch,
        "precision": precision,
        "model": model,
        "data": {"readers": [{"use": "python-stdlib"}], "tokenizer": "bytes", "sequence_length": sequence},
        "optimizer": {"use": "adamw", "lr": 1e-4},
        "saved": saved,
    }
    return recipes.decode(table)


def megatron_choice(row: megatron.Row, recipe: Any, chunks: int | None = None) -> Choice:
    """The layout of a row."""
    v = row.chunks if chunks is None else chunks
    layout = Layout(
        pp=row.pipeline,
        dp_replicate=row.data,
        dp_shard=1,
        tp=row.tensor,
        schedule="interleaved-1f1b" if v > 1 else "1f1b",
        stages_per_rank=v if v > 1 else None,
        split=(row.layers // (row.pipeline * v),) * (row.pipeline * v) if row.pipeline > 1 else None,
    )
    return Choice(layout=layout, rows=row.micro_batch, micro_batches=row.micro_batches, saved=recipe.saved)


def megatron_recipe(row: megatron.Row) -> Any:
    """The model of a row."""
    model = {
        "use": "gpt2",
        "vocab_size": megatron.VOCABULARY,
        "n_layers": row.layers,
        "hidden_size": row.hidden,
        "n_heads": HEADS[row.hidden],
        "ffn_size": 4 * row.hidden,
        "max_position": megatron.SEQUENCE,
    }
    return recipe_of(model, megatron.SEQUENCE, row.batch)


def megatron_row(row: megatron.Row, cluster: Cluster, practice: Practice = MEGATRON) -> dict[str, Any]:
    """Modelled TFLOP/s of a GPU, counted as the paper counts."""
    recipe = megatron_recipe(row)
    work = Work(Ground(recipe, cluster), practice)
    seconds = simulate.of_choice(work, megatron_choice(row, recipe)).seconds
    flops = row.seconds * row.gpus * row.teraflops * 1e12
    modelled = flops / (row.gpus * seconds.total) / 1e12
    return _row(row.name, row.teraflops, modelled, seconds)


# --- TorchTitan -------------------------------------------------------------------------------------------------------

GRAND_TETON = {"memory_bytes": 96 * 2.0**30, "memory_bytes_per_second": 2.4e12}
"""TorchTitan's H100 (its benchmarks/llama3_h100_202412_torchtitan.md): 96 GB of HBM2e, and a limit of 500 W."""
PRODUCTS = {"use": "recompute", "keep": "products"}
GATHERS = "Float8 halves its gathers over tp, which the model sends in 16 bits; the rest is not known"
ASYNC = Practice(tensor_overlaps=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TitanRow:
    """A row of TorchTitan's table of December 2024: Llama 3.1, rows of 8,192 tokens, compiled."""

    name: str
    size: str
    layout: Layout
    rows: int
    own: int
    """Rows of a rank in a step."""
    tokens: float
    """Per second and GPU, as published."""
    precision: str = "float8"
    saved: Any = "recompute"
    practice: Practice = dataclasses.field(default_factory=Practice)
    used: bool = False
    why: str = ""
    """What the model leaves out here, where it is known."""


FSDP = {"size": "llama-3-8b", "rows": 2, "own": 2, "saved": PRODUCTS}
TP = Layout(dp_shard=32, tp=8, sequence_parallel=True)
PP = Layout(pp=8, dp_shard=8, tp=8, sequence_parallel=True)
INTERLEAVED = dataclasses.replace(PP, schedule="interleaved-1f1b", stages_per_rank=2)
MIDDLE = {"size": "llama-3-70b", "rows": 16, "own": 16, "layout": TP}
BIG = {"size": "llama-3.1-405b", "rows": 4, "own": 32, "practice": ASYNC}
TITAN_ROWS = (
    TitanRow(name="8B, FSDP 8", layout=Layout(dp_shard=8), tokens=6667, precision="bf16", used=True, **FSDP),
    TitanRow(name="8B, FSDP 8, Float8", layout=Layout(dp_shard=8), tokens=8532, used=True, **FSDP),
    TitanRow(name="8B, FSDP 128", layout=Layout(dp_shard=128), tokens=6514, precision="bf16", **FSDP),
    TitanRow(name="8B, FSDP 128, Float8", layout=Layout(dp_shard=128), tokens=8380, **FSDP),
    TitanRow(name="70B, FSDP 32, TP 8, Float8", tokens=829, why=GATHERS, **MIDDLE),
    TitanRow(name="70B, the same, AsyncTP", tokens=876, practice=ASYNC, why=GATHERS, **MIDDLE),
    TitanRow(name="405B, FSDP 8, TP 8, PP 8, 1F1B, Float8, AsyncTP", layout=PP, tokens=100, **BIG),
    TitanRow(name="405B, the same, interleaved", layout=INTERLEAVED, tokens=128, **BIG),
)


def titan_row(row: TitanRow, efficiency: Efficiency | None = None) -> dict[str, Any]:
    """Modelled tokens per second and GPU. A pipeline's micro-batch is a row's share of its ranks, TorchTitan's default
    of as many micro-batches as ranks."""
    batch = row.own * row.layout.size("batch")
    recipe = recipe_of({"size": row.size}, 8192, batch, precision=row.precision, saved=row.saved)
    work = Work(Ground(recipe, cluster_with("hgx-h100", efficiency, **GRAND_TETON)), row.practice)
    choice = Choice(layout=row.layout, rows=row.rows, micro_batches=row.own // row.rows, saved=recipe.saved)
    seconds = simulate.of_choice(work, choice).seconds
    modelled = batch * 8192 / seconds.total / row.layout.ranks
    return _row(row.name, row.tokens, modelled, seconds) | {"why": row.why}


def _row(name: str, published: float, modelled: float, seconds: Seconds) -> dict[str, Any]:
    return {
        "row": name,
        "published": published,
        "modelled": modelled,
        "residual": modelled / published - 1,
        "seconds": seconds.total,
        "by_class": {key: float(value) for key, value in seconds.by_class().items()},
    }


# --- fits -------------------------------------------------------------------------------------------------------------


def fitted(residuals: Callable[[Efficiency], Sequence[float]], start: tuple[float, float], source: str) -> Efficiency:
    """Gauss-Newton on (matrix, half_width) with residuals of logarithms; half_width stays at 0 or above."""

    def made(x: Any) -> Efficiency:
        return Efficiency(matrix=float(x[0]), half_width=float(x[1]), source=source, fitted=True)

    x, steps = np.array(start), np.diag([0.005, 1.0])
    for _ in range(20):
        here = np.array(residuals(made(x)))
        slopes = [(np.array(residuals(made(x + step))) - here) / step.sum() for step in steps]
        if x[1] == 0.0:  # on the border: only inwards
            slopes[1] = np.minimum(slopes[1], 0.0) * 0.0
        change, *_ = np.linalg.lstsq(np.stack(slopes, axis=1), -here, rcond=None)
        before, x = x, np.maximum(x + change, [0.05, 0.0])
        if np.abs((x - before) / [1.0, 100.0]).max() < 1e-6:
            break
    return Efficiency(matrix=round(float(x[0]), 4), half_width=round(float(x[1]), 1), source=source, fitted=True)


def fit_a100() -> Efficiency:
    """To rows 1 to 4 of Megatron's table: no pipeline, so no schedule is in it."""
    rows = megatron.WEAK_SCALING

    def residuals(efficiency: Efficiency) -> list[float]:
        cluster = cluster_with("dgx-a100", efficiency)
        return [float(np.log1p(megatron_row(row, cluster)["residual"])) for row in rows[:4]]

    source = "rows 1 to 4 of Megatron's weak-scaling table (arXiv 2104.04473): python benchmarks/plan_tables.py --fit"
    found = fitted(residuals, (0.66, 30.0), source)
    cluster = cluster_with("dgx-a100", found)
    modelled = [megatron_row(row, cluster)["modelled"] for row in rows]
    points = [
        Point(name=row.name, published=row.teraflops, modelled=round(told, 1), used=number < 4)
        for number, (row, told) in enumerate(zip(rows, modelled, strict=True))
    ]
    return dataclasses.replace(found, points=tuple(points))


def fit_h100() -> Efficiency:
    """To the two rows of TorchTitan's table on one node."""

    def residuals(efficiency: Efficiency) -> list[float]:
        return [float(np.log1p(titan_row(row, efficiency)["residual"])) for row in TITAN_ROWS if row.used]

    source = (
        "two rows of TorchTitan's table of December 2024 (8B, one node, bf16 and Float8), H100 of 500 W with 2.4 TB/s: "
        "boards of 700 W reach more. python benchmarks/plan_tables.py --fit"
    )
    found = fitted(residuals, (0.47, 100.0), source)
    points = []
    for row in TITAN_ROWS:
        told = titan_row(row, found)
        points.append(Point(name=row.name, published=row.tokens, modelled=round(told["modelled"], 1), used=row.used))
    return dataclasses.replace(found, points=tuple(points))


def write_fit(found: Efficiency, name: str) -> Path:
    """As a file of `recipes/clusters/fits/`."""
    path = recipes.recipes_folder() / clusters.FOLDER / "fits" / f"{name}.toml"
    path.write_text(tomli_w.dumps(dataclasses.asdict(found)), encoding="utf-8")
    return path


# --- further claims ---------------------------------------------------------------------------------------------------

GPT3 = {"layers": 96, "hidden": 12288, "tensor": 8, "pipeline": 12, "micro_batch": 1, "gpus": 96}


def interleaving(cluster: Cluster) -> list[dict[str, Any]]:
    """Figure 12's setting: 175B on 96 GPUs, interleaved (two layers a chunk) over plain, with and without dividing what
    stages send."""
    found = []
    for batch in (12, 24, 36, 48, 60):
        entry: dict[str, Any] = {"batch": batch}
        for label, chunks, practice in (
            ("plain", 1, MEGATRON),
            ("interleaved", 4, MEGATRON),
            ("interleaved, sent whole", 4, dataclasses.replace(MEGATRON, divided_sends=False)),
        ):
            row = megatron.Row(name="175B", chunks=chunks, batch=batch, teraflops=1.0, **GPT3)
            entry[label] = megatron_row(row, cluster, practice)["modelled"]
        entry["interleaving_gains"] = entry["interleaved"] / entry["plain"] - 1
        entry["dividing_gains"] = entry["interleaved"] / entry["interleaved, sent whole"] - 1
        found.append(entry)
    return found


def days() -> dict[str, float]:
    """End-to-end estimates of the paper, by its formula and its published rates."""
    return {
        "GPT-3 175B, 300B tokens, 1024 GPUs at 140": megatron.training_days(
            tokens=300e9, parameters=175e9, gpus=1024, flops_per_second=140e12
        ),
        "1T, 450B tokens, 3072 GPUs at 163": megatron.training_days(
            tokens=450e9, parameters=megatron.WEAK_SCALING[-1].parameters, gpus=3072, flops_per_second=163e12
        ),
    }


def main() -> int:
    """Fit, or model the tables and write a record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fit", action="store_true", help="fit, and write recipes/clusters/fits/")
    parser.add_argument("--dry", action="store_true", help="write no record")
    asked = parser.parse_args()
    if asked.fit:
        for name, found in (("a100", fit_a100()), ("h100", fit_h100())):
            print(write_fit(found, name))
        return 0
    cluster = clusters.load("dgx-a100")
    tables = {
        "megatron, TFLOP/s per GPU": [megatron_row(row, cluster) for row in megatron.WEAK_SCALING],
        "torchtitan, tokens/s per GPU": [titan_row(row) for row in TITAN_ROWS],
        "frontier-zero, ratios of rates": plan_ladders.frontier_rows(),
        "megascale, MFU of 175B, %": [plan_ladders.rung_row(rung) for rung in plan_ladders.rungs()],
    }
    for title, table in tables.items():
        print(title)
        for row in table:
            print(f"  {row['row']:<52}{row['published']:>9,.4g}{row['modelled']:>9,.4g}{100 * row['residual']:>8.1f} %")
    outside = [row["row"] for table in tables.values() for row in table if abs(row["residual"]) > WITHIN]
    record = evidence_file.head("plan_tables") | {
        "grade": "modelled",
        "tables": tables,
        "interleaving": interleaving(cluster),
        "days": days(),
        "within": WITHIN,
        "outside": outside,
        "holds": not outside,
    }
    for entry in record["interleaving"]:
        gains = (
            f"{100 * entry['interleaving_gains']:.1f} %, dividing what is sent {100 * entry['dividing_gains']:.1f} %"
        )
        print(f"  batch {entry['batch']}: interleaving gains {gains}")
    print("days", {name: round(value, 1) for name, value in record["days"].items()}, "outside:", outside or "none")
    if not asked.dry:
        print(evidence_file.write(record, evidence_file.FOLDER))
    return 4 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
