"""A run with experts: the step moves the biases, checkpoints keep them, a resumed run is the unbroken one."""

from __future__ import annotations

from pathlib import Path

import torch

from lmworks.core import recipe as recipes
from lmworks.core.journal import rows
from lmworks.model.checkpoint import load
from lmworks.train.loop import run
from lmworks.train.recipe import Train
from tests.train.toy import Silent, corpus

SETS = [
    "model.n_layers=2",
    "model.hidden_size=32",
    "model.n_heads=2",
    "data.sequence_length=32",
    "batch_size=4",
    "micro_batch_size=2",
    "precision=fp32",
    "steps=6",
    "checkpoints.every=3",
    "checkpoints.keep=5",
    "validation.every=3",
    "validation.rows=2",
    "data.validation=0.1",
    "samples.every=6",
    "samples.tokens=4",
    "schedule.warmup=1",
]


def recipe(folder: Path) -> Train:
    reader = f'data.readers=[{{ use = "text", paths = ["{corpus(folder)}/*.txt"] }}]'
    found = recipes.load("moe", verb="train", sets=[*SETS, reader])
    assert isinstance(found, Train)
    return found


def test_a_resumed_run_has_the_biases_and_losses_of_the_unbroken_one(tmp_path: Path) -> None:
    settings = recipe(tmp_path / "text")
    whole = run(settings, tmp_path / "whole", resume="never", report=Silent())
    again = run(settings, tmp_path / "again", resume=str(whole.checkpoints / "step-00000003"), report=Silent())
    first, second = load(whole.path), load(again.path)
    name = "blocks.1.ffn.router.expert_bias"
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    assert first.get_parameter(name).abs().max() > 1.5e-3  # more than one step's move
    assert not torch.equal(first.get_parameter(name), load(whole.checkpoints / "step-00000003").get_parameter(name))
    steps = [row for row in rows(whole.metrics) if "loss" in row]
    assert all(row["experts/max_load"] >= 1 and row["experts/aux_loss"] > 0 for row in steps)
    assert [row["loss"] for row in rows(again.metrics) if "loss" in row] == [row["loss"] for row in steps[3:]]
