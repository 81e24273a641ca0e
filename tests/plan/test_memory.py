"""Estimates of a rank's memory: exact where sizes tell, corrected and guessed where runs do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.core import recipe as recipes
from lmworks.core.errors import UsageError
from lmworks.model.init import initialise
from lmworks.parallel.footprint import Footprint, predict
from lmworks.parallel.layout import Layout
from lmworks.plan.memory import FEATURES, Correction, Network, errors, features, fit, heaviest
from tests.train import toy
from tests.train.test_saved import loss_of

GIB = 2**30


def recipe(*sets: str) -> Any:
    return recipes.load("methods/megatron", verb="train", sets=["layout.use=ranks", "device=cpu", *sets])


def told(known: float, rest: float) -> Footprint:
    return Footprint(weights=int(known), gradients=0, optimizer=0, saved=int(rest), logits=0, workspace=0)


@pytest.mark.parametrize("saved", ["keep", "recompute", "coat"])
@pytest.mark.parametrize("blocks", [4, 5, 7])
@pytest.mark.parametrize(("pp", "schedule"), [(1, "1f1b"), (2, "1f1b"), (4, "1f1b"), (4, "gpipe")])
def test_the_heaviest_rank_is_the_heaviest_of_all(pp: int, schedule: str, blocks: int, saved: str) -> None:
    sets = [f"layout.pp={pp}", f"model.n_layers={blocks}", f"saved.use={saved}"]
    sets += ["batch_size=16", "micro_batch_size=2", "precision=fp32"]
    made = recipe(*sets, *([f"layout.schedule={schedule}"] if pp > 1 else []))
    layout = made.layout.settle(2 * pp, made)
    rank, found = heaviest(made, layout, vocabulary=257)
    all_ranks = [predict(made, layout, each, vocabulary=257).total for each in range(layout.ranks)]
    assert found.total == max(all_ranks) == all_ranks[rank]


def test_where_blocks_differ_every_place_is_asked() -> None:
    sets = ["layout.pp=4", "model.n_layers=4", "model.ffn_size=[64, 64, 2048, 64]", "layout.split=[1, 1, 1, 1]"]
    made = recipe(*sets, "batch_size=16", "micro_batch_size=2", "precision=fp32", "saved.use=keep")
    rank, _ = heaviest(made, made.layout.settle(4, made), vocabulary=257)
    assert rank == 2


def test_parameters_and_state_are_those_of_a_real_model_to_the_byte() -> None:
    made = recipe("model.vocab_size=257", "precision=fp32")
    _, found = heaviest(made, Layout(dp_shard=1), vocabulary=257)
    model = made.model.build()
    initialise(model, 0)
    assert found.weights == sum(x.nbytes for x in model.state_dict(keep_vars=True).values() if x.requires_grad)
    update = made.optimizer.build(model)
    loss_of(model, toy.batch(2, 16, 257)).backward()  # type: ignore[no-untyped-call]
    update.step(None)  # AdamW asks no probe
    assert found.optimizer == sum(x.nbytes for x in update.state().values())


def test_what_nobody_can_tell_is_named() -> None:
    with pytest.raises(UsageError, match=r"nobody can tell saved of this recipe(.|\n)*compile = false"):
        heaviest(recipe("compile=true"), Layout(dp_shard=1), vocabulary=257)


# --- the correction --------------------------------------------------------------------------------------------------

SIZES = st.tuples(st.floats(1 * GIB, 40 * GIB), st.floats(1 * GIB, 40 * GIB))


@settings(max_examples=40, deadline=None)
@given(st.lists(SIZES, min_size=8, max_size=12), st.floats(0.8, 1.5), st.floats(0.0, 3.0))
def test_a_correction_finds_what_made_its_runs(sizes: list[tuple[float, float]], factor: float, gib: float) -> None:
    true = Correction(factor=factor, constant=gib * GIB)
    runs = [(told(*size), true.bytes(told(*size))) for size in sizes]
    found = fit(runs)
    assert max(map(abs, errors(runs, found.bytes))) < 0.05


@given(SIZES)
def test_without_runs_nothing_is_corrected(size: tuple[float, float]) -> None:
    assert fit([]).bytes(told(*size)) == pytest.approx(told(*size).total, rel=1e-9)


def test_runs_that_differ_make_the_correction_right() -> None:
    true = Correction(factor=1.2, constant=1.5 * GIB)
    runs = [(told(a * GIB, b * GIB), true.bytes(told(a * GIB, b * GIB))) for a, b in ((8, 2), (2, 30), (1, 1), (30, 9))]
    found = fit(runs)
    assert found.factor == pytest.approx(1.2, abs=0.02)
    assert found.constant / GIB == pytest.approx(1.5, abs=0.1)


def test_a_run_that_took_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="a run that took 0 bytes"):
        fit([(told(GIB, GIB), 0)])


# --- the network -----------------------------------------------------------------------------------------------------


def test_the_eleven_numbers_of_a_recipe() -> None:
    made = recipe("batch_size=32", "micro_batch_size=2")
    found = dict(zip(FEATURES, features(made, Layout(pp=2, dp_replicate=4, dp_shard=1)), strict=True))
    blocks, width = made.model.n_layers, made.model.hidden_size
    assert found == {
        "gpus": 8,
        "layers": blocks,
        "hidden": width,
        "heads": made.model.blocks()[0].n_heads,
        "tp": 1,
        "pp": 2,
        "dp": 4,
        "layers_per_stage": blocks / 2,
        "micro_batch": 2,
        "batch": 32,
        "rows": 8,
    }


def test_the_network_learns_its_runs_and_draws_by_its_seed() -> None:
    draw = np.random.default_rng(0)
    runs_RF = draw.uniform(1, 16, (64, len(FEATURES)))
    bytes_R = 1e9 * (2 + runs_RF[:, 0] + 0.5 * runs_RF[:, 2])
    before = torch.get_rng_state()
    first, again, other = (Network(runs_RF, bytes_R, seed=seed, epochs=100) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    said = [first.bytes(list(run)) for run in runs_RF]
    off = np.abs(np.array(said) / bytes_R - 1).mean()
    assert off < 0.25 * np.abs(bytes_R.mean() / bytes_R - 1).mean(), "better than the mean"
    assert first.bytes(list(runs_RF[0])) == again.bytes(list(runs_RF[0])) != other.bytes(list(runs_RF[0]))
