"""Published ladders beside the planner's model, for `plan_tables.py`: Frontier's states, and MegaScale's MFU.

Neither paper tells all that a model needs. What is assumed stands here, and each row says what it leaves out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from lmworks.core import recipe as recipes
from lmworks.methods.frontier_zero import FrontierZero, cost
from lmworks.parallel.layout import Layout
from lmworks.parallel.state import StatePlacement
from lmworks.parallel.zeropp import ZeroPlusPlus
from lmworks.plan import cluster as clusters
from lmworks.plan import simulate
from lmworks.plan.choice import Choice
from lmworks.plan.shape import Ground
from lmworks.plan.time import Seconds
from lmworks.plan.work import Practice, Work


def recipe_of(model: dict[str, Any], batch: int, saved: str) -> Any:
    """A training recipe with rows of 2,048 tokens."""
    table = {
        "do": "train",
        "steps": 1,
        "batch_size": batch,
        "precision": "bf16",
        "model": model,
        "data": {"readers": [{"use": "python-stdlib"}], "tokenizer": "bytes", "sequence_length": 2048},
        "optimizer": {"use": "adamw", "lr": 1e-4},
        "saved": saved,
    }
    return recipes.decode(table)


# --- Frontier ---------------------------------------------------------------------------------------------------------

GPT_20B = {
    "use": "gpt2",
    "vocab_size": 51_200,
    "n_layers": 44,
    "hidden_size": 6144,
    "n_heads": 48,
    "max_position": 2048,
}
ACCUMULATION = 8
"""Micro-batches, of one row: assumed."""
BARE = Practice(gathers_overlap=False, data_overlaps=False)
UNHIDDEN = (
    "the paper's rows and micro-batches are not known: with 2,048 tokens computing takes most of a step, and what is "
    "waited for stands as `waiting`"
)


def frontier_step(name: str, nodes: int) -> tuple[Seconds, float]:
    """A step of 20B on Frontier with nothing hidden, and GB of a gather of all weights."""
    ranks = 8 * nodes
    recipe = recipe_of(GPT_20B | {"ffn_size": 4 * 6144}, ranks * ACCUMULATION, "recompute")
    layouts = {
        "zero_3": Layout(dp_shard=ranks, state=StatePlacement()),
        "zero_plus_plus": ZeroPlusPlus().settle(ranks, recipe),
        "topo": FrontierZero(secondary="node").settle(ranks, recipe),
    }
    ground = Ground(recipe, clusters.load("frontier"))
    choice = Choice(layout=layouts[name], rows=1, micro_batches=ACCUMULATION, saved=recipe.saved)
    gathered = 2 * sum(math.prod(shape) for shape in ground.shapes.values()) / 1e9
    return simulate.of_choice(Work(ground, BARE), choice).seconds, gathered


def frontier_rows() -> list[dict[str, Any]]:
    """Steps of its rivals over ZeRO-topo's on 384 dies, and what 48 nodes keep of the rate of 8."""
    ours, gathered = frontier_step("topo", 48)
    closed = cost.topo(cost.Cluster(nodes=48), gathered).of(ACCUMULATION)
    found = []
    for name, word, published in (("zero_plus_plus", "ZeRO++", 1.71), ("zero_3", "ZeRO-3", 2.40)):
        theirs, _ = frontier_step(name, 48)
        row = _row(f"ZeRO-topo over {word}, 384 dies", published, theirs.total / ours.total, UNHIDDEN)
        row["waiting"] = (theirs.gather + theirs.reduce) / (ours.gather + ours.reduce)
        row["waiting_in_closed_form"] = getattr(cost, name)(cost.Cluster(nodes=48), gathered).of(ACCUMULATION) / closed
        found.append(row)
    few, _ = frontier_step("topo", 8)
    return [*found, _row("ZeRO-topo, 48 nodes over 8", 0.94, few.total / ours.total, "")]


# --- MegaScale --------------------------------------------------------------------------------------------------------

GPT_175B = {
    "use": "decoder",
    "vocab_size": 64_000,
    "n_layers": 96,
    "hidden_size": 12_288,
    "n_heads": 96,
    "ffn_size": 32_768,
    "max_position": 2048,
}
"""Three matrices of an FFN, with as many values as two of 4 x hidden."""
WINDOW = 1024
"""Tokens: assumed, the paper does not tell."""
BASE = Practice(data_overlaps=False, gathers_overlap=False)
CHUNKS = (
    "what is left of each stage's sums is added up here, where the next stage's backward pass would hide most of it"
)
FUSED = "the model knows fused operators only, and so counts what they save from the first row on"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rung:
    """A row of the ladder: all that is on, of 175B in tp 8, pp 8 with 6 stages a rank, the rest data parallel."""

    name: str
    mfu: float
    """As published, %."""
    practice: Practice = BASE
    parallel: bool = True
    window: int | None = WINDOW
    gpus: int = 256
    batch: int = 256
    why: str = FUSED


def rungs() -> Iterator[Rung]:
    """The ladder on 256 GPUs, and both ends on 12,288."""
    once = dataclasses.replace(BASE, shared_exchanges=True)
    tensor = dataclasses.replace(once, tensor_overlaps=True)
    sends = dataclasses.replace(tensor, sends_overlap=True)
    data = dataclasses.replace(sends, data_overlaps=True, gathers_overlap=True)
    yield Rung(name="baseline", mfu=47.7, parallel=False, window=None)
    yield Rung(name="+ parallel block", mfu=52.3, practice=once, window=None)
    yield Rung(name="+ sliding window", mfu=53.3, practice=once)
    yield Rung(name="+ tp overlaps", mfu=55.5, practice=tensor)
    yield Rung(name="+ sends overlap", mfu=58.0, practice=sends)
    both = f"{FUSED}; {CHUNKS}"
    yield Rung(name="+ gradients overlap", mfu=59.5, practice=data, why=both)
    yield Rung(name="+ operators, the rest", mfu=62.3, practice=data, why=both)
    yield Rung(name="+ LAMB, batch x 3", mfu=65.3, practice=data, batch=768, why=both)
    alone = f"{CHUNKS}; no rank is slow here, and no link is shared"
    large = {"gpus": 12_288, "batch": 6144, "why": f"{FUSED}; {alone}"}
    yield Rung(name="12,288 GPUs, Megatron-LM", mfu=41.2, parallel=False, window=None, **large)
    yield Rung(name="12,288 GPUs, MegaScale", mfu=55.2, practice=data, **large)


def rung_row(rung: Rung) -> dict[str, Any]:
    """Modelled MFU, %: 72 B s l h^2 (1 + s / 6 h + V / 16 l h) FLOPs of a step, the whole square of attention counted
    whatever the window."""
    model = GPT_175B | {"parallel_block": rung.parallel} | ({"sliding_window": rung.window} if rung.window else {})
    recipe = recipe_of(model, rung.batch, "keep")
    data = rung.gpus // 64
    layout = Layout(
        pp=8,
        dp_replicate=data,
        dp_shard=1,
        tp=8,
        sequence_parallel=True,
        schedule="interleaved-1f1b",
        stages_per_rank=6,
        split=(2,) * 48,
    )
    work = Work(Ground(recipe, clusters.load("dgx-a100")), rung.practice)
    choice = Choice(layout=layout, rows=1, micro_batches=rung.batch // data, saved=recipe.saved)
    seconds = simulate.of_choice(work, choice).seconds
    layers, hidden, vocabulary = 96, 12_288, 64_000
    flops = 72 * rung.batch * 2048 * layers * hidden**2
    flops *= 1 + 2048 / (6 * hidden) + vocabulary / (16 * layers * hidden)
    mfu = 100 * flops / (seconds.total * rung.gpus * work.plain_peak)
    found = _row(rung.name, rung.mfu, mfu, rung.why)
    return found | {"seconds": seconds.total, "by_class": seconds.by_class()}


def _row(name: str, published: float, modelled: float, why: str) -> dict[str, Any]:
    return {
        "row": name,
        "published": published,
        "modelled": modelled,
        "residual": modelled / published - 1,
        "why": why,
    }
