"""Small recipes and clusters to plan with."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lmworks.core import recipe as recipes
from lmworks.plan import cluster as clusters
from lmworks.plan.cluster import Cluster, Figure, Level

MODEL = {
    "use": "decoder",
    "vocab_size": 257,
    "n_layers": 8,
    "hidden_size": 64,
    "n_heads": 8,
    "n_kv_heads": 4,
    "ffn_size": 176,
    "tied": False,
    "max_position": 256,
}


def recipe(**changes: Any) -> Any:
    """A decoded training recipe; keys are settings, `model` is laid over the small one."""
    table: dict[str, Any] = {
        "do": "train",
        "steps": 10,
        "batch_size": 16,
        "precision": "bf16",
        "device": "cpu",
        "data": {"readers": [{"use": "python-stdlib"}], "tokenizer": "bytes", "sequence_length": 128},
        "optimizer": {"use": "adamw", "lr": 1e-3},
    }
    return recipes.decode({**table, **changes, "model": {**MODEL, **changes.get("model", {})}})


def level(name: str, ranks: int | None, rate: float, latency: float = 0.0) -> Level:
    """Links for a test."""
    figure = Figure(value=rate, source="a test")
    return Level(
        name=name, ranks=ranks, bytes_per_second=figure, latency_seconds=Figure(value=latency, source="a test")
    )


@pytest.fixture
def laptop() -> Cluster:
    """Two cores."""
    return clusters.load("laptop")


@pytest.fixture
def unit() -> Cluster:
    """A cluster whose links carry a byte a second and all else at once: seconds of exchanges are bytes."""
    found = dataclasses.replace(
        clusters.load("dgx-a100"), kind="cpu", devices_per_node=8, links=(level("wire", None, 1.0),)
    )
    return dataclasses.replace(
        found, bf16=Figure(value=1e30, source="a test"), memory_bytes_per_second=Figure(value=1e30, source="a test")
    )
