"""Batches with several sources whose rows can be recognised after they were chosen, and a selector over them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from lmworks.data.load import Batch
from lmworks.methods.colm import Colm
from lmworks.methods.colm.selector import ColmSelector
from lmworks.model.backbone import Backbone
from lmworks.train.objective import CrossEntropy
from lmworks.train.optim import AdamW
from lmworks.train.probe import Probe
from lmworks.train.slots import Optimizer
from tests.train import toy

V_PROJ = "blocks.1.attn.v_proj.weight"


def draw(sources: list[int], *, length: int = 8, seed: int = 0) -> Batch:
    """A row for each source id; `bytes_B` numbers the rows."""
    batch = toy.batch(len(sources), length, 61, seed=seed)
    ids_BT = torch.tensor(sources)[:, None].expand_as(batch.tokens_BT)
    return dataclasses.replace(batch, sources_BT=ids_BT, bytes_B=torch.arange(len(sources)))


def numbers(batch: Batch) -> list[int]:
    """Which rows of the draw these are."""
    assert batch.bytes_B is not None
    found: list[int] = batch.bytes_B.tolist()
    return found


def started(
    model: Backbone, shares: dict[str, float], optimizer: Optimizer | None = None, **settings: Any
) -> ColmSelector:
    """A running selector."""
    made = Colm(**settings).start(model, optimizer or AdamW(lr=1e-3), shares)
    assert isinstance(made, ColmSelector)
    return made


def probe_of(model: Backbone, *, seed: int = 0, micro_rows: int | None = None) -> Probe:
    """A probe for cross-entropy."""
    return Probe(model, CrossEntropy(), seed=seed, micro_rows=micro_rows)
