"""Published tables beside the planner's model: every row, its residual, and the one fit of each hardware.

    python benchmarks/plan_tables.py            model the tables, write a record
    python benchmarks/plan_tables.py --fit      fit A100 to rows 1 to 4 of Megatron's table, and H100 to two rows of
                                                TorchTitan's; write recipes/clusters/fits/

A row counts as reproduced within 10 %. Exit 0: all are; 4: some are not, and the record says which and why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from lmworks.core import recipe as recipes
from lmworks.methods import megatron
from lmworks.parallel.layout import Layout
from lmworks.plan import cluster as clusters
from lmworks.plan import simulate
from lmworks.plan.cluster import Cluster, Efficiency, Point
from lmworks.plan.shape import Choice, Ground
from lmworks.plan.work import Practice, Work

WITHIN = 0.10
HEADS = {2304: 24, 3072: 32, 4096: 32, 6144: 48, 8192: 64, 10240: 80, 12288: 96, 16384: 128, 20480: 128, 25600: 160}
"""Attention heads of the table's models, by hidden size (SC 2021, table 1)."""
MEGATRON = Practice(square=True, scores_in_memory=True, data_overlaps=False, gradient_bytes=2, divided_sends=True)
"""Megatron-LM in 2021: no fused attention, gradients in 16 bits summed behind the last micro-batch."""


def cluster_with(name: str, found: Efficiency | None = None) -> Cluster:
    """A cluster, with another efficiency than its file's."""
    cluster = clusters.load(name)
    if found is not None:
        cluster = dataclasses.replace(cluster)
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
    return {
        "row": row.name,
        "published": row.teraflops,
        "modelled": modelled,
        "residual": modelled / row.teraflops - 1,
        "seconds": seconds.total,
        "by_class": seconds.by_class(),
    }


def fitted(residuals: Callable[[Efficiency], Sequence[float]], start: tuple[float, float], source: str) -> Efficiency:
    """Gauss-Newton on (matrix, half_width) with residuals of logarithms; half_width stays at 0 or above."""

    def made(x: Any) -> Efficiency:
        return Efficiency(matrix=float(x[0]), half_width=float(max(0.0, x[1])), source=source, fitted=True)

    x = np.array(start)
    for _ in range(12):
        here = np.array(residuals(made(x)))
        steps = np.array([0.005, 1.0])
        slopes = np.stack(
            [
                (np.array(residuals(made(x + step))) - here) / size
                for step, size in ((np.array([0.005, 0.0]), steps[0]), (np.array([0.0, 1.0]), steps[1]))
            ],
            axis=1,
        )
        change, *_ = np.linalg.lstsq(slopes, -here, rcond=None)
        x = np.maximum(x + change, [0.05, 0.0])
        if np.abs(change / np.array([1.0, 100.0])).max() < 1e-6:
            break
    return made(x)


def fit_a100() -> Efficiency:
    """To rows 1 to 4 of Megatron's table: no pipeline, so no schedule is in it."""
    rows = megatron.WEAK_SCALING

    def residuals(efficiency: Efficiency) -> list[float]:
        cluster = cluster_with("dgx-a100", efficiency)
        return [float(np.log1p(megatron_row(row, cluster)["residual"])) for row in rows[:4]]

    source = "rows 1 to 4 of Megatron's weak-scaling table (arXiv 2104.04473): python benchmarks/plan_tables.py --fit"
    found = fitted(residuals, (0.66, 30.0), source)
    cluster = cluster_with("dgx-a100", found)
    points = []
    for number, row in enumerate(rows):
        modelled = megatron_row(row, cluster)["modelled"]
        points.append(Point(name=row.name, published=row.teraflops, modelled=round(modelled, 1), used=number < 4))
    return dataclasses.replace(
        found, matrix=round(found.matrix, 4), half_width=round(found.half_width, 1), points=tuple(points)
    )


def write_fit(found: Efficiency, name: str) -> Path:
    """As a file of `recipes/clusters/fits/`."""
    path = recipes.recipes_folder() / clusters.FOLDER / "fits" / f"{name}.toml"
    path.write_text(tomli_w.dumps(dataclasses.asdict(found)), encoding="utf-8")
    return path
