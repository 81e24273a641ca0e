"""Megatron's arithmetic against our own counts, the simulator, and the paper's figures."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core import recipe as recipes
from lmworks.core.errors import RecipeError, UsageError
from lmworks.methods import megatron
from lmworks.methods.megatron import WEAK_SCALING, Row
from lmworks.model.gpt2 import GPT2Config
from lmworks.parallel import gang
from lmworks.parallel.schedule import Action, Kind, Order, next_micro_batches, order
from lmworks.parallel.timeline import simulate
from tests.oracles import schedules as oracle
from tests.train import ranked

SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 16).map(lambda n: 8 * n), st.integers(1, 64), st.integers(1, 500))
"""l, h, s, V."""


def gpt2(layers: int, hidden: int, sequence: int, vocabulary: int) -> GPT2Config:
    return GPT2Config(
        vocab_size=vocabulary,
        n_layers=layers,
        hidden_size=hidden,
        n_heads=4,
        ffn_size=4 * hidden,
        max_position=sequence,
    )


# --- size and work ---------------------------------------------------------------------------------------------------


@given(SHAPES)
def test_parameters_are_those_of_a_gpt2_without_its_last_norm(shape: tuple[int, int, int, int]) -> None:
    layers, hidden, sequence, vocabulary = shape
    counted = sum(math.prod(each) for _, each in gpt2(*shape).shapes())
    found = megatron.parameters(layers=layers, hidden=hidden, sequence=sequence, vocabulary=vocabulary)
    assert found == counted - 2 * hidden
    written = 12 * layers * hidden**2 * (1 + 13 / (12 * hidden) + (vocabulary + sequence) / (12 * layers * hidden))
    assert found == pytest.approx(written, rel=1e-12)


@given(SHAPES, st.integers(1, 9))
def test_flops_are_our_counts_with_the_whole_square_of_attention(shape: tuple[int, int, int, int], batch: int) -> None:
    layers, hidden, sequence, vocabulary = shape
    sizes = {"batch": batch, "layers": layers, "hidden": hidden, "sequence": sequence, "vocabulary": vocabulary}
    tokens = batch * sequence
    ours = gpt2(*shape).cost(sequence=sequence)
    upper_half = 4 * layers * hidden * (sequence - (sequence + 1) / 2)
    plain = megatron.flops(**sizes, recompute=False)
    assert plain == pytest.approx(tokens * (ours.train_flops_per_token + 3 * upper_half), rel=1e-12)
    head = 2 * vocabulary * hidden
    again = tokens * (ours.forward_flops_per_token + upper_half - head)
    assert megatron.flops(**sizes) == pytest.approx(plain + again, rel=1e-12)


def test_flops_are_the_papers_form() -> None:
    for row in WEAK_SCALING:
        size, s, v = row.layers * row.hidden**2, 2048, 51_200
        written = 96 * row.batch * s * size * (1 + s / (6 * row.hidden) + v / (16 * row.layers * row.hidden))
        found = megatron.flops(batch=row.batch, layers=row.layers, hidden=row.hidden, sequence=s, vocabulary=v)
        assert found == pytest.approx(written, rel=1e-12)


@pytest.mark.parametrize(
    ("tokens", "parameters", "gpus", "teraflops", "days"),
    [(300e9, 175e9, 1024, 140, 33.9), (450e9, WEAK_SCALING[-1].parameters, 3072, 163, 83.9)],
)
def test_training_days(tokens: float, parameters: float, gpus: int, teraflops: float, days: float) -> None:
    speed = teraflops * 1e12
    found = megatron.training_days(tokens=tokens, parameters=parameters, gpus=gpus, flops_per_second=speed)
    assert round(found, 1) == days
    plain = megatron.training_days(
        tokens=tokens, parameters=parameters, gpus=gpus, flops_per_second=speed, recompute=False
    )
    assert plain == pytest.approx(found * 3 / 4)


def test_the_short_form_of_the_work_is_near_the_long_one_at_the_papers_sizes() -> None:
    for row in WEAK_SCALING[5:]:
        days = megatron.training_days(
            tokens=row.batch * 2048, parameters=row.parameters, gpus=row.gpus, flops_per_second=row.teraflops * 1e12
        )
        assert days * 86_400 == pytest.approx(row.seconds, rel=0.035)


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "billions", "data", "micro_batches", "share_of_peak", "seconds"),
    [
        (WEAK_SCALING[0], 1.7, 32, 1, 44, 3.5),
        (WEAK_SCALING[1], 3.6, 32, 1, 44, 3.7),
        (WEAK_SCALING[2], 7.5, 32, 1, 46, 3.7),
        (WEAK_SCALING[3], 18.4, 32, 4, 43, 9.4),
        (WEAK_SCALING[4], 39.1, 32, 12, 44, 14.5),
        (WEAK_SCALING[5], 76.1, 32, 28, 45, 16.1),
        (WEAK_SCALING[6], 145.6, 24, 48, 47, 24.8),
        (WEAK_SCALING[7], 310.1, 15, 144, 50, 37.6),
        (WEAK_SCALING[8], 529.6, 9, 280, 52, 54.1),
        (WEAK_SCALING[9], 1008.0, 6, 512, 52, 102.6),
    ],
    ids=[row.name for row in WEAK_SCALING],
)
def test_weak_scaling(
    row: Row, billions: float, data: int, micro_batches: int, share_of_peak: int, seconds: float
) -> None:
    assert row.parameters / 1e9 == pytest.approx(billions, abs=max(0.05, 0.005 * billions))
    assert (row.data, row.micro_batches) == (data, micro_batches)
    assert row.data * row.tensor * row.pipeline == row.gpus
    assert row.data * row.micro_batch * row.micro_batches == row.batch
    assert row.layers % (row.pipeline * row.chunks) == 0
    assert round(100 * row.teraflops / 312) == share_of_peak
    assert round(row.seconds, 1) == seconds


# --- the pipeline ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 18), st.integers(1, 4))
def test_bubble_and_live_micro_batches_are_those_of_the_orders(pipeline: int, micro_batches: int, chunks: int) -> None:
    name = "1f1b" if chunks == 1 else "interleaved-1f1b"
    m = next_micro_batches(name, ranks=pipeline, micro_batches=micro_batches)
    found = order(name, ranks=pipeline, micro_batches=m, stages_per_rank=chunks)
    for rank, live in enumerate(found.peak_live):
        assert live / chunks == megatron.live_micro_batches(
            pipeline=pipeline, micro_batches=m, chunks=chunks, rank=rank
        )
    if m >= pipeline:
        timeline = simulate(found, forward_seconds=1 / chunks, backward_seconds=2 / chunks)
        expected = megatron.bubble(pipeline=pipeline, micro_batches=m, chunks=chunks)
        assert timeline.bubble_share == pytest.approx(expected, abs=1e-9)


def test_live_micro_batches_with_fewer_than_ranks() -> None:
    assert megatron.live_micro_batches(pipeline=8, micro_batches=3) == 3.0


@pytest.mark.parametrize(("pipeline", "chunks"), [(2, 2), (4, 2), (4, 3), (8, 2)])
def test_all_forward_first_where_m_is_p_waits_as_long(pipeline: int, chunks: int) -> None:
    """The paper's order of m = p, which torch does not make."""
    kinds = {"F": Kind.FORWARD, "B": Kind.BACKWARD}
    ranks = oracle.interleaved(pipeline, pipeline, chunks, whole_when_equal=True)
    papers = Order(name="paper", ranks=tuple(tuple(Action(kinds[k], s, j) for k, s, j in steps) for steps in ranks))
    assert papers.peak_live == (pipeline * chunks,) * pipeline
    timeline = simulate(papers, forward_seconds=1 / chunks, backward_seconds=2 / chunks)
    expected = megatron.bubble(pipeline=pipeline, micro_batches=pipeline, chunks=chunks)
    assert timeline.bubble_share == pytest.approx(expected)


def test_with_t_1_more_data_parallel_ranks_wait_less() -> None:
    gpus, rows, micro_batch = 64, 512, 2
    shares = []
    for data in (1, 2, 4, 8, 16, 32, 64):
        shares.append(megatron.bubble(pipeline=gpus // data, micro_batches=rows // (micro_batch * data)))
        assert shares[-1] == pytest.approx((gpus - data) * micro_batch / rows)
    assert shares == sorted(shares, reverse=True)


# --- the rule --------------------------------------------------------------------------------------------------------

HEADS = {"1.7B": 24, "3.6B": 32, "7.5B": 32, "18B": 48, "39B": 64, "76B": 80, "145B": 96, "310B": 128, "530B": 128}
"""Of the paper's models; the last has 160."""


def recipe_of(row: Row, **over: Any) -> Any:
    """What the rule reads of a recipe for a row of the table: full recomputation, half precision."""
    model = GPT2Config(
        vocab_size=megatron.VOCABULARY,
        n_layers=row.layers,
        hidden_size=row.hidden,
        n_heads=HEADS.get(row.name, 160),
        ffn_size=4 * row.hidden,
        max_position=megatron.SEQUENCE,
    )
    table = {
        "do": "train",
        "steps": 1,
        "batch_size": row.batch,
        "micro_batch_size": row.micro_batch,
        "precision": "bf16",
        "model": recipes.table_of(model),
        "data": {"readers": [{"use": "python-stdlib"}], "tokenizer": "bytes", "sequence_length": megatron.SEQUENCE},
        "saved": {"use": "recompute"},
        "optimizer": {"use": "adamw", "lr": 1e-3},
        "layout": {"use": "megatron"},
    }
    return recipes.decode(recipes.with_values(table, over))


def test_the_rule_picks_most_of_the_papers_layouts() -> None:
    found = {row.name: recipe_of(row).layout.settle(row.gpus, recipe_of(row)) for row in WEAK_SCALING}
    assert sum(found[row.name].tp == row.tensor for row in WEAK_SCALING) == 8
    assert sum(found[row.name].pp == row.pipeline for row in WEAK_SCALING) == 7
    for row in WEAK_SCALING:
        layout = found[row.name]
        assert layout.ranks == row.gpus
        assert layout.tp <= row.tensor, "never more than the paper"
        assert layout.pp <= row.pipeline
        assert layout.tp == 8 or layout.pp == 1, "a pipeline only where a node is not enough"


def test_the_rule_is_the_least_that_fits() -> None:
    row = WEAK_SCALING[6]
    small, large = (recipe_of(row, **{"layout.memory_gib": size}) for size in (30.0, 400.0))
    assert (small.layout.settle(1536, small).tp, small.layout.settle(1536, small).pp) == (8, 16)
    assert (large.layout.settle(1536, large).tp, large.layout.settle(1536, large).pp) == (8, 1)


def test_recomputing_every_other_block_needs_more_than_all_and_less_than_none() -> None:
    row = WEAK_SCALING[3]
    needs = []
    for over in ({}, {"saved.every": 2}, {"saved": {"use": "keep"}}):
        made = recipe_of(row, **over, **{"layout.memory_gib": 1e-3})
        with pytest.raises(RecipeError) as told:
            made.layout.settle(row.gpus, made)
        needs.append(float(re.findall(r"needs ([0-9.]+)\. Take", str(told.value))[0]))
    assert needs == sorted(needs)
    assert needs[0] < needs[1] < needs[2]


def test_stages_are_equal_or_plain() -> None:
    row = WEAK_SCALING[5]  # 60 blocks on 4 ranks: 15 each
    assert recipe_of(row).layout.settle(1024, recipe_of(row)).schedule == "1f1b"
    three = recipe_of(row, **{"layout.stages_per_rank": 3})
    found = three.layout.settle(1024, three)
    assert (found.schedule, found.stages_per_rank, found.pp) == ("interleaved-1f1b", 3, 4)


@pytest.mark.ranks
def test_a_run_of_the_rules_layout(text: Path, cache: Path, tmp_path: Path) -> None:
    """So little room that four ranks are tp 2 x pp 2; losses are those of one rank."""
    picked = {"use": "megatron", "ranks_per_node": 2, "memory_gib": 4.5e-4}
    gang.run(ranked.train, 4, ranked.table(text, cache, layout=picked, micro_batch_size=2), str(tmp_path / "run"))
    kept = recipes.load(str(tmp_path / "run" / "recipe.toml"), verb="train").layout
    assert (kept.tp, kept.pp, kept.schedule) == (2, 2, "interleaved-1f1b")
    gang.run(ranked.train, 1, ranked.table(text, cache), str(tmp_path / "one"))
    assert ranked.losses(tmp_path / "run") == pytest.approx(ranked.losses(tmp_path / "one"), rel=1e-5)
    shares = ranked.losses(tmp_path / "run", "pipeline/idle_share")
    assert len(shares) == 12
    assert all(share > 0 for share in shares)


# --- bytes -----------------------------------------------------------------------------------------------------------


def ring_all_reduce(values: int, ranks: int) -> int:
    """Sum `values` numbers over a ring of ranks, piece by piece; gives how many values each rank sent."""
    own = np.random.default_rng(0).integers(0, 9, (ranks, values))
    pieces = [np.array_split(row, ranks) for row in own.copy()]
    sent = [0] * ranks
    for gather in (False, True):
        for step in range(ranks - 1):
            moves = [(rank, (rank - step + gather) % ranks) for rank in range(ranks)]
            copies = [pieces[rank][which].copy() for rank, which in moves]
            for (rank, which), piece in zip(moves, copies, strict=True):
                to = (rank + 1) % ranks
                pieces[to][which] = piece if gather else pieces[to][which] + piece
                sent[rank] += len(piece)
    for row in pieces:
        np.testing.assert_array_equal(np.concatenate(row), own.sum(axis=0))
    assert len(set(sent)) == 1
    return sent[0]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_bytes_of_tensor_and_data_parallelism_are_those_of_rings(ranks: int) -> None:
    micro_batch, sequence, hidden = 2, 6, 8
    values = micro_batch * sequence * hidden
    tensor = megatron.tensor_bytes(micro_batch=micro_batch, sequence=sequence, hidden=hidden, tensor=ranks)
    assert tensor == 2 * 4 * ring_all_reduce(values, ranks)
    data = megatron.data_bytes(parameters=6 * values, pipeline=3, tensor=2, data=ranks)
    assert data == 4 * ring_all_reduce(values, ranks)


@pytest.mark.parametrize(("chunks", "divided"), [(1, 1), (2, 1), (2, 4)])
def test_bytes_of_the_pipeline_are_what_the_order_sends(chunks: int, divided: int) -> None:
    ranks, micro_batches, values = 4, 8, 3 * 5 * 8
    name = "1f1b" if chunks == 1 else "interleaved-1f1b"
    found = order(name, ranks=ranks, micro_batches=micro_batches, stages_per_rank=chunks)
    sends = [0] * ranks
    for rank, actions in enumerate(found.ranks):
        sends[rank] = sum(a.kind is Kind.FORWARD and a.stage < found.stages - 1 for a in actions)
    each = megatron.pipeline_bytes(micro_batch=3, sequence=5, hidden=8, chunks=chunks, divided=divided)
    assert [n * 2 * values / divided for n in sends[:-1]] == [each * micro_batches] * (ranks - 1)
    assert sends[-1] * 2 * values / divided == each * micro_batches * (chunks - 1) / chunks


# --- choosing --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.sampled_from([1, 2, 4]))
def test_the_best_micro_batch_is_the_one_that_the_simulator_likes_best(seed: int, pipeline: int, data: int) -> None:
    random = np.random.default_rng(seed)
    batch = 32 * data
    forward = {b: float(random.uniform(0.5, 1.0)) + 0.3 * b for b in (1, 2, 3, 4)}
    backward = {b: 2 * seconds for b, seconds in forward.items()}
    chosen = megatron.best_micro_batch(
        batch=batch, data=data, pipeline=pipeline, forward_seconds=forward, backward_seconds=backward
    )
    makespans = {
        b: simulate(
            order("1f1b", ranks=pipeline, micro_batches=32 // b),
            forward_seconds=forward[b],
            backward_seconds=backward[b],
        ).makespan
        for b in (1, 2, 4)
    }
    assert makespans[chosen] == pytest.approx(min(makespans.values()))
    told = megatron.step_seconds(
        batch=batch, micro_batch=chosen, data=data, pipeline=pipeline, seconds=3 * forward[chosen]
    )
    assert told == pytest.approx(makespans[chosen])


@pytest.mark.parametrize(
    ("batch", "data", "told"),
    [
        (20, 2, "no measured micro-batch divides 10 rows\n  legal: 1, 2, 5, 10"),
        (21, 2, "2 ranks do not divide 21 rows"),
    ],
)
def test_micro_batches_that_do_not_fit_are_refused(batch: int, data: int, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        megatron.best_micro_batch(
            batch=batch, data=data, pipeline=2, forward_seconds={3: 1.0}, backward_seconds={3: 2.0, 5: 1.0}
        )


@given(st.integers(1, 200), st.floats(0.1, 10), st.floats(0.1, 100))
def test_the_best_number_of_checkpoints_needs_least(layers: int, kept: float, inner: float) -> None:
    def needed(count: float) -> float:
        return count * kept + layers / count * inner

    best = megatron.best_checkpoints(layers=layers, input_bytes=kept, inner_bytes=inner)
    assert all(needed(best) <= needed(best * factor) * (1 + 1e-12) for factor in np.geomspace(0.1, 10, 41))
