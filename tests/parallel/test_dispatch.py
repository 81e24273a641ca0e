"""Attention served by several ranks, forward and backward, is dense attention of each document."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from lmworks.model.sizes import BlockSizes
from lmworks.parallel import gang
from lmworks.parallel.dispatch import sent
from tests.parallel.served import GROUPS, HEAD_DIM, HEADS, Found, Work, dense, repeated, served

pytestmark = pytest.mark.ranks

BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
BLOCK = BlockSizes(n_heads=HEADS, n_kv_heads=GROUPS, head_dim=HEAD_DIM, ffn_size=1, window=None)
MIXED = {"lengths": [257, 7, 31, 130, 1, 64, 89], "holders": [0, 0, 1, 1, 1, 0, 0]}
SHAPES = {
    "plain": Work(**MIXED),
    "random": Work(**MIXED, seed=1),
    "random-again": Work(**MIXED, seed=2),
    "all-served-by-the-other": Work(lengths=[33, 20], holders=[0, 0], seed=3, servers=(1,)),
    "each-serves-only-the-other": Work(lengths=[41, 41], holders=[1, 0], seed=4, servers=(1,)),
    "one-document": Work(lengths=[101], holders=[1], seed=5),
    "single-tokens": Work(lengths=[1, 1, 1, 1, 1], holders=[0, 1, 0, 1, 0], seed=6),
    "float32": Work(**MIXED, seed=7, dtype=torch.float32),
    "bfloat16": Work(**MIXED, seed=8, dtype=torch.bfloat16),
}
CASES = {f"{name}-{keep}": (work, keep) for name, work in SHAPES.items() for keep in ("resend", "cache")}


def case(name: str) -> Work:
    work, keep = CASES[name]
    return Work(**{**work.__dict__, "keep": keep})


@cache
def ran(ranks: int) -> dict[str, list[Found]]:
    """All cases on one gang; of four ranks, some hold nothing and some only serve."""
    found = gang.run(served, ranks, ranks, [case(name) for name in CASES])
    return {name: [seen[i] for seen in found] for i, name in enumerate(CASES)}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_served_attention_is_dense_attention(name: str, ranks: int) -> None:
    work = case(name)
    at = [0] * ranks
    for document, holder in enumerate(work.holders):
        start, at[holder] = at[holder], at[holder] + work.lengths[document]
        for tensor, want in dense(work, document).items():
            own = ran(ranks)[name][holder].tensors[tensor][start : at[holder]]
            assert np.abs(own - want).max() <= BOUND[work.dtype] * max(1.0, np.abs(want).max()), tensor
    assert [len(seen.tensors["out"]) for seen in ran(ranks)[name]] == at


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_what_is_sent_is_what_the_plan_says(name: str, ranks: int) -> None:
    work = case(name)
    for rank, seen in enumerate(ran(ranks)[name]):
        formula = sent(work.plan(ranks), rank, BLOCK, value_bytes=work.dtype.itemsize, keep=work.keep)
        assert (seen.forward, seen.backward) == formula
    if work.seed is None:
        assert all(seen.forward == seen.backward == 0 for seen in ran(ranks)[name]), "what is here is not sent"


def test_the_cache_sends_less_and_nothing_but_the_gradient_of_the_result_goes_out_backward() -> None:
    resent, cached = ran(2)["random-resend"], ran(2)["random-cache"]
    for rank, (one, other) in enumerate(zip(resent, cached, strict=True)):
        assert other.forward + other.backward < one.forward + one.backward
        queries = sum(case("random-cache").plan(2).sent_queries[rank])
        assert other.operations["attention", "to servers, backward"] == queries * HEADS * HEAD_DIM * 8


def test_the_same_plan_gives_the_same_bits() -> None:
    """float32 sums of several servers are added in one order."""
    for first, second in gang.run(repeated, 4, 4, case("float32-resend")):
        assert all(np.array_equal(first[name], second[name]) for name in first)
