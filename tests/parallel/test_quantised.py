"""Quantised collectives on gloo ranks: against a slow oracle, in the order of torch's own, byte for byte."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
import torch

from lmworks.maths.blockwise import CODES, Runs, quantise
from lmworks.parallel import gang
from lmworks.parallel.quantised import bytes_of_gather, bytes_of_sum
from tests.oracles import blockwise as oracle
from tests.parallel.coded import AXES, Case, Seen, gathers, sums

pytestmark = pytest.mark.ranks

FOUR = {
    f"{'x'.join(map(str, hops))}-{code}": Case(hops=hops, code=code)
    for hops, code in itertools.product([(4,), (2, 2)], sorted(CODES))
} | {
    "whole-numbers": Case(hops=(2, 2), code="int4", whole=True),
    "bfloat16": Case(hops=(2, 2), code="int8", dtype="bfloat16"),
    "feedback": Case(hops=(2, 2), code="int4", feedback=1.0, times=24),
    "without": Case(hops=(2, 2), code="int4", times=24),
}
EIGHT = {
    "2x4": Case(hops=(2, 4), code="int4"),
    "4x2": Case(hops=(4, 2), code="int4"),
    "2x2x2": Case(hops=(2, 2, 2), code="int8"),
    "whole-numbers": Case(hops=(2, 4), code="int4", whole=True),
}
CASES = [(4, name, case) for name, case in FOUR.items()] + [(8, name, case) for name, case in EIGHT.items()]
NAMED = pytest.mark.parametrize(("world", "name", "case"), CASES, ids=[f"{world}-{name}" for world, name, _ in CASES])


@cache
def ran(world: int) -> dict[str, list[Seen]]:
    """All cases on one gang: by case, of each rank."""
    cases = FOUR if world == 4 else EIGHT
    found = gang.run(sums, world, world, list(cases.values()))
    return {name: [seen[i] for seen in found] for i, name in enumerate(cases)}


@NAMED
def test_a_sum_by_hops_is_what_the_slow_oracle_makes_of_it(world: int, name: str, case: Case) -> None:
    """The first one, before anything is fed back. Codes are alike; sums of float32 in another order are nearly so."""
    parts = case.parts(world).float().tolist()
    want = oracle.summed(parts, case.hops, case.lengths, case.block, CODES[case.code].top)
    bound = 1e-6 if case.dtype == "float32" else 2.0**-8
    for rank, seen in enumerate(ran(world)[name]):
        np.testing.assert_allclose(seen.sums[0], want[rank], rtol=bound, atol=bound)


@NAMED
def test_it_lands_where_torch_leaves_it(world: int, name: str, case: Case) -> None:
    """Every rank has its own slice: near the plain sum, by what a hop's codes may be off. Whole numbers are exact."""
    for seen in ran(world)[name]:
        if case.whole:
            assert (seen.sums[0] == seen.plain).all()
        else:
            off = np.abs(seen.sums[0] - seen.plain).max()
            largest = 4.5 * world  # of sums of normal values, each coded once a hop
            assert off <= len(case.hops) * largest / CODES[case.code].top


@NAMED
def test_bytes_are_those_of_the_formula(world: int, name: str, case: Case) -> None:
    want = bytes_of_sum(case.hops, CODES[case.code], case.runs)
    for seen in ran(world)[name]:
        assert seen.bills == {(AXES[i], f"all-to-all {case.code}"): case.times * size for i, size in enumerate(want)}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_on_one_rank_reaches_the_slice_that_it_is_of(bad: float) -> None:
    """The whole block of it, through both hops, also where errors are fed back: a step's guard cannot miss it."""
    case = Case(hops=(2, 2), code="int4", bad=bad, feedback=1.0, times=2)
    for rank, (seen,) in enumerate(gang.run(sums, 4, 4, [case])):
        for each in seen.sums:
            assert np.isnan(each[: case.block]).all() == (rank == 0)
            assert np.isfinite(each[case.block if rank == 0 else 0 :]).all()


def test_two_hops_of_int4_send_an_eighth_of_float32_between_nodes() -> None:
    """And scales: 4 bytes for a block. Of 2 nodes with 2 ranks, each sends half of its half to the other node."""
    runs, plain = Runs(lengths=(4096,), block=2048), 4 * 4096 * 4
    inside, across = bytes_of_sum((2, 2), CODES["int4"], runs)
    assert inside == plain / 2 / 8 + 2 * 2 * 4
    assert across == plain / 4 / 8 + 2 * 4


def test_what_is_fed_back_takes_the_error_out_of_a_mean() -> None:
    """Equal gradients again and again: without it every sum has the same error; with it errors cancel, as 1 / times."""
    for fed, bare in zip(ran(4)["feedback"], ran(4)["without"], strict=True):
        assert all((each == bare.sums[0]).all() for each in bare.sums)
        once = np.abs(bare.sums[0] - bare.plain).mean()
        mean = np.abs(np.mean(fed.sums, axis=0) - fed.plain).mean()
        assert mean < once / 8


@pytest.mark.parametrize("code", sorted(CODES))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gather_gives_all_ranks_the_same_and_leaves_their_parts(code: str, dtype: str) -> None:
    runs = Runs(lengths=(9, 5), block=4)
    found = gang.run(gathers, 3, 3, code, runs, dtype)
    parts = [torch.from_numpy(part)[None] for _, part, _ in found]
    want = torch.cat([quantise(part, CODES[code], runs).decode(getattr(torch, dtype)).float()[0] for part in parts])
    for gathered, _, bills in found:
        assert (gathered == want.numpy()).all()
        assert bills == {("cp", f"all-gather {code}"): bytes_of_gather(3, CODES[code], runs)}
