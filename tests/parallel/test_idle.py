"""Idle time of the four packings: what each number is made of, and the order that they must stand in."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest

from lmworks.data.lengths import drawn
from lmworks.parallel.idle import Outcome, Packing, Setting, outcome, together
from lmworks.parallel.laying import Row, steps
from lmworks.parallel.speeds import Roofline, Speeds
from lmworks.parallel.tasks import Sizes

SIZES = Sizes(query=8, keys=4, found=10)
ROOF = Roofline(flops_per_pair=1.0, flops_per_second=1.0, sizes=SIZES, tile=1)
FREE = Speeds(attention=ROOF, linear=10.0, bytes_per_second=float("inf"), sizes=SIZES)
Step = tuple[tuple[Row, ...], ...]


def skewed(ranks: int, tokens: int = 4096) -> list[Step]:
    """Two steps of a mix with a long tail."""
    made = steps(drawn("log-uniform", 4000, longest=tokens, seed=3).tolist(), ranks=ranks, tokens=tokens, rows_each=2)
    return [step for _, step in zip(range(2), made, strict=False)]


def of(packing: Packing, ranks: int, speeds: Speeds = FREE, **other: object) -> Outcome:
    setting = dataclasses.replace(Setting(ranks=ranks, speeds=speeds, tile=16), **other)  # type: ignore[arg-type]
    return together([outcome(packing, step, setting) for step in skewed(ranks)])


def test_a_step_by_hand() -> None:
    """Rank 0: one document of 4 (10 pairs) and one of 2 (3); rank 1: six of 1. Linear 10 a token, thrice; pairs 3.5."""
    step = (((4,), (2,)), ((1,) * 4, (1,) * 2))
    made = outcome("plain", step, Setting(ranks=2, speeds=FREE))
    assert made.seconds == 3 * 60 + 3.5 * 13
    assert made.busy == 3 * 60 + 3.5 * (13 + 6) / 2
    assert made.idle == pytest.approx(1 - made.busy / made.seconds)
    assert made.largest == 13 / 9.5
    assert (made.memory, made.tokens, made.gather_bytes, made.moved_bytes) == (1, 12, 12 * 4, 0)
    by_work = outcome("by-work", step, Setting(ranks=2, speeds=FREE))
    assert (by_work.tokens, by_work.memory) == (12, 1)
    slow = dataclasses.replace(FREE, bytes_per_second=2.0)
    by_document = outcome("by-document", step, Setting(ranks=2, speeds=slow, activation_bytes=8.0))
    assert by_document.moved_bytes == by_document.gather_bytes == 12 * 4
    assert by_document.memory == (8 + 4) / 8
    assert by_document.seconds >= 3 * 60 + 3.5 * 9.5 + 3 * 6 * 4 / 2


def test_shared_attention_in_balance_moves_nothing_and_waits_for_nothing() -> None:
    made = outcome("shared", (((4,), (2,)),) * 3, Setting(ranks=3, speeds=FREE))
    assert (made.moved_bytes, made.memory, made.largest, made.idle) == (0, 1, 1, pytest.approx(0, abs=1e-12))
    assert made.seconds == pytest.approx(3 * 60 + 3.5 * 13)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_shared_attention_waits_least_at_equal_memory(ranks: int) -> None:
    found = {packing: of(packing, ranks) for packing in get_args(Packing)}
    assert found["shared"].idle < 0.06 < found["plain"].idle
    assert found["shared"].seconds < found["plain"].seconds
    assert found["shared"].memory == found["plain"].memory == 1
    assert found["by-work"].idle < found["plain"].idle
    assert found["shared"].busy == pytest.approx(found["plain"].busy)
    assert found["by-document"].largest == pytest.approx(1, abs=0.01)
    assert 0 < found["shared"].moved_bytes < found["by-document"].moved_bytes


def test_more_ranks_wait_longer_with_plain_rows_and_not_with_shared_attention() -> None:
    idle = {packing: [of(packing, ranks).idle for ranks in (2, 4, 8)] for packing in ("plain", "shared")}
    assert idle["plain"] == sorted(idle["plain"])
    assert max(idle["shared"]) < 0.06


def test_a_slow_link_makes_shared_attention_wait_and_a_higher_cap_lays_more_tokens_on_a_rank() -> None:
    slow = dataclasses.replace(FREE, bytes_per_second=0.01)
    assert of("shared", 4, slow).idle > 0.3
    assert of("shared", 4, slow, turns="signal").idle == pytest.approx(of("shared", 4, turns="signal").idle)
    assert 1 < of("by-work", 8, cap=1.2).memory <= 1.2
    assert of("by-work", 8).memory <= 1
