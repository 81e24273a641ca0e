"""Clusters whose links differ, the layouts of a model on them, and what a step of one really takes: for
pipette_regret.py.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmworks.core import recipe as recipes
from lmworks.core.seeds import seed_for
from lmworks.methods.pipette.plans import ROWS, Terms, terms
from lmworks.model.gpt2 import GPT2Config
from lmworks.parallel.footprint import Footprint
from lmworks.parallel.layout import Layout, problems_of
from lmworks.parallel.links import Profile, empty
from lmworks.parallel.schedule import order
from lmworks.parallel.timeline import Link, simulate
from lmworks.plan.latency import Pipeline, pipette_seconds, ring_seconds
from lmworks.plan.memory import Correction, heaviest
from lmworks.plan.placement import Ground

MODELS = {"1B": (24, 1920, 24), "3B": (32, 2560, 32), "7B": (32, 4096, 32), "11B": (36, 5120, 40)}
"""Layers, width, heads."""
GPUS, MEMORY = 8, 40e9
"""Of a machine; bytes of each."""
FLOPS, NOMINAL, INSIDE, LATENCY = 140e12, 3.125e9, 250e9, 1e-5
"""Of a GPU in training; bytes per second of a GPU's share of a 200 Gb/s card, and inside; seconds."""
SPREAD, BAD, OFF_STAGE, OFF_LINK, OFF_MEMORY = 0.3, 0.1, 0.03, 0.05, 0.03
BATCH, SEQUENCE, VOCABULARY = 512, 2048, 51_200
HIDDEN = Correction(factor=1.12, constant=1.3e9)
"""What memory is beside what sizes tell; planners see runs of one machine only."""


@dataclass(frozen=True)
class Candidate:
    """A layout and a micro-batch of a model on so many machines."""

    model: str
    machines: int
    pp: int
    tp: int
    micro: int

    @property
    def layout(self) -> Layout:
        """All other ranks are data parallel."""
        data = self.machines * GPUS // (self.pp * self.tp)
        few = BATCH // data // self.micro < self.pp
        return Layout(
            pp=self.pp,
            dp_replicate=data,
            dp_shard=1,
            tp=self.tp,
            sequence_parallel=self.tp > 1,
            schedule="gpipe" if few else "1f1b",
        )

    @property
    def share(self) -> int:
        """Data-parallel ranks of a machine."""
        return GPUS // self.tp


@functools.cache
def recipe_of(model: str, micro: int, batch: int = BATCH) -> Any:
    """A GPT in bf16 on a GPU, every block's tensors kept."""
    layers, hidden, heads = (MODELS | SMALL)[model]
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_layers=layers,
        hidden_size=hidden,
        n_heads=heads,
        ffn_size=4 * hidden,
        max_position=SEQUENCE,
    )
    table = {
        "do": "train",
        "steps": 1,
        "batch_size": batch,
        "micro_batch_size": micro,
        "precision": "bf16",
        "model": recipes.table_of(config),
        "data": {"readers": [{"use": "python-stdlib"}], "tokenizer": "bytes", "sequence_length": SEQUENCE},
        "optimizer": {"use": "adamw", "lr": 1e-3},
    }
    return dataclasses.replace(recipes.decode(table), device="cuda")


SMALL = {"0.1B": (12, 768, 12), "0.4B": (24, 1024, 16), "0.7B": (24, 1536, 16)}
"""Models that planners have run on one machine, to fit their estimators."""


@functools.cache
def told(candidate: Candidate) -> Footprint:
    """What sizes tell of the rank that takes most."""
    recipe = recipe_of(candidate.model, candidate.micro)
    return heaviest(recipe, candidate.layout, vocabulary=VOCABULARY)[1]


@functools.cache
def made_of(candidate: Candidate) -> Terms:
    """Seconds and bytes of its parts; links do not enter, but inside of a machine."""
    names = tuple(f"m{i}" for i in range(candidate.machines))
    table = ((INSIDE,) * candidate.machines,) * candidate.machines
    facts = {"ranks_per_machine": GPUS, "device": "", "driver": "", "flops_per_second": FLOPS, "message_bytes": 0}
    links: Profile = dataclasses.replace(empty(names, **facts), bytes_per_second=table)
    return terms(recipe_of(candidate.model, candidate.micro), candidate.layout, links, FLOPS)


@functools.cache
def candidates(model: str, machines: int) -> tuple[Candidate, ...]:
    """All that a layout may be."""
    found = []
    for pp in (p for p in range(1, machines + 1) if machines % p == 0):
        for tp in (1, 2, 4, 8):
            for micro in ROWS:
                each = Candidate(model, machines, pp, tp, micro)
                rows, rest = divmod(BATCH, each.layout.dp_replicate)
                recipe = recipe_of(model, micro)
                if rest == 0 and rows % micro == 0 and not problems_of(dataclasses.replace(recipe, layout=each.layout)):
                    found.append(each)
    return tuple(found)


@dataclass
class Cluster:
    """Links as they are, and as a probe found them."""

    number: int
    machines: int = 0
    true: Any = None
    seen: Any = None
    draw: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        draw = np.random.default_rng(seed_for(0, "cluster", self.number))
        n = self.machines = (8, 12, 16)[self.number % 3]
        upper = np.triu(NOMINAL * np.exp(draw.normal(0, SPREAD, (n, n))), 1)
        bad = draw.choice(n * (n - 1) // 2, 2, replace=False)
        rows, columns = np.triu_indices(n, 1)
        upper[rows[bad], columns[bad]] *= BAD
        self.true = upper + upper.T + np.diag([INSIDE] * n)
        self.seen = self.true * np.exp(draw.normal(0, OFF_LINK, (n, n)))

    def off(self, candidate: Candidate, what: str, size: int, spread: float) -> Any:
        """Factors of this cluster and candidate, the same whenever they are asked for."""
        seed = seed_for(self.number, what, *dataclasses.astuple(candidate))
        return np.exp(np.random.default_rng(seed).normal(0, spread, size))


@functools.cache
def alike(machines: int) -> Any:
    """Links as the datasheet has them."""
    return np.full((machines, machines), NOMINAL)


def ground_of(candidate: Candidate, bandwidth: Any, *, papers: bool = False) -> Ground:
    """What is sent, on some links; `papers`: its objective, C once and the first stages' ring."""
    made = made_of(candidate)
    n = candidate.machines
    return Ground(
        bytes_per_second=bandwidth.tolist(),
        latency_seconds=[[LATENCY] * n] * n,
        stages=candidate.pp,
        boundary_bytes=made.boundary_bytes,
        gradient_bytes=made.gradient_bytes / candidate.share,
        rounds=1.0 if papers else max(1.0, made.micro_batches / candidate.pp),
        rings="first" if papers else "slowest",
    )


def pipeline_of(candidate: Candidate, crossing: float) -> Pipeline:
    """For the closed forms: every stage as the dearest."""
    made = made_of(candidate)
    return Pipeline(
        ranks=candidate.pp,
        micro_batches=made.micro_batches,
        forward=max(made.forward),
        backward=max(made.backward),
        crossing=crossing,
    )


def inside_of(candidate: Candidate) -> float:
    """T_in."""
    return ring_seconds(made_of(candidate).gradient_bytes, candidate.share, INSIDE)


def closed(candidate: Candidate, places: tuple[int, ...], bandwidth: Any, *, papers: bool = False) -> float:
    """T by Pipette's form."""
    ground = ground_of(candidate, bandwidth, papers=papers)
    pipe = pipette_seconds(pipeline_of(candidate, ground.slowest(places)), whole_rounds=papers)
    return pipe + ground.exchange(places) + inside_of(candidate)


def clock(candidate: Candidate, places: tuple[int, ...], bandwidth: Any, stages: Any = 1.0) -> float:
    """T by the order of actions, on the pipeline with the longest way."""
    made, ground = made_of(candidate), ground_of(candidate, bandwidth)
    row = max(ground.rows(places), key=ground.crossing)
    lines = {
        (k, other): Link(bytes_per_second=float(bandwidth[row[k], row[other]]), latency_seconds=LATENCY)
        for k in range(candidate.pp)
        for other in (k - 1, k + 1)
        if 0 <= other < candidate.pp
    }
    found = simulate(
        order(candidate.layout.schedule, ranks=candidate.pp, micro_batches=made.micro_batches),
        forward_seconds=[float(x) for x in made.forward * np.ones(candidate.pp) * stages],
        backward_seconds=[float(x) for x in made.backward * np.ones(candidate.pp) * stages],
        link=lines,
        boundary_bytes=made.boundary_bytes,
    )
    return found.makespan + ground.exchange(places) + inside_of(candidate)


def truth(cluster: Cluster, candidate: Candidate, places: tuple[int, ...]) -> float:
    """Seconds of a step as it is."""
    stages = cluster.off(candidate, "stages", candidate.pp, OFF_STAGE)
    return clock(candidate, places, cluster.true, stages)


def fits(cluster: Cluster, candidate: Candidate) -> bool:
    """Whether it runs."""
    off = float(cluster.off(candidate, "memory", 1, OFF_MEMORY)[0])
    return HIDDEN.bytes(told(candidate)) * off <= MEMORY


def model_of(cluster: Cluster) -> str:
    """In turn."""
    return tuple(MODELS)[cluster.number % len(MODELS)]


def all_of(cluster: Cluster) -> tuple[Candidate, ...]:
    """The candidates of a cluster."""
    return candidates(model_of(cluster), cluster.machines)
