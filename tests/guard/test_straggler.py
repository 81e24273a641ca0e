"""Which rank is slow: by what each is busy in a step, among those that do the same work."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lmworks.guard.report import RankSeen
from lmworks.guard.straggler import WINDOW, Stragglers, slowest


def gang(step: int, busy: list[float], stages: list[int] | None = None) -> list[RankSeen]:
    """Ranks at a step, busy for so many seconds in each step until then."""
    return [
        RankSeen(rank=i, pid=1, step=step, busy=step * seconds, stage=(stages or [0] * len(busy))[i])
        for i, seconds in enumerate(busy)
    ]


def test_a_rank_that_is_half_as_slow_again_is_found_within_thirty_steps_of_noise() -> None:
    """Nine of ten runs of the dossier, with a tenth of noise on every step: here a hundred runs, and none missed."""
    for seed in range(100):
        drawn = np.random.default_rng(seed)
        stragglers, busy, found, at = Stragglers(), np.zeros(4), None, 0
        while found is None and at < 40:
            at += 1
            busy += np.array([1.0, 1.0, 1.5, 1.0]) * (1 + 0.1 * drawn.standard_normal(4))
            ranks = [RankSeen(rank=i, pid=1, step=at, busy=float(b)) for i, b in enumerate(busy)]
            found = stragglers.look(ranks)
        assert found == 2
        assert at <= 30


def test_equal_ranks_with_noise_are_not_slow() -> None:
    for seed in range(30):
        drawn = np.random.default_rng(seed)
        stragglers, busy = Stragglers(), np.zeros(4)
        for at in range(1, 100):
            busy += 1 + 0.1 * drawn.standard_normal(4)
            ranks = [RankSeen(rank=i, pid=1, step=at, busy=float(b)) for i, b in enumerate(busy)]
            assert stragglers.look(ranks) is None


def test_a_rank_whose_peers_were_not_seen_busy_at_all() -> None:
    """Steps so quick that no look of the heart fell outside of an exchange: nothing can be said, and nothing breaks."""
    stragglers = Stragglers()
    for at in range(0, 10 * WINDOW, WINDOW):
        assert stragglers.look(gang(at, [0.0, 0.0, 0.01])) is None
    assert slowest({0: 0.0, 1: 0.0, 2: 1.0}, dict.fromkeys(range(3), 0)) == 2


def test_quick_steps_are_not_told_apart_by_a_few_looks() -> None:
    stragglers = Stragglers()
    for at in range(0, 10 * WINDOW, WINDOW):
        assert stragglers.look(gang(at, [0.01, 0.05])) is None  # 0.24 s of a round
    for at in range(0, 100 * WINDOW, 10 * WINDOW):
        found = stragglers.look(gang(at, [0.01, 0.05]))
    assert found == 1  # 2.4 s of a round


def test_one_slow_round_is_not_enough() -> None:
    stragglers = Stragglers()
    stragglers.look(gang(0, [1, 1, 1]))
    assert stragglers.look(gang(WINDOW, [1, 1, 2])) is None


def test_stages_of_a_pipeline_may_differ() -> None:
    stragglers = Stragglers()
    for at in range(0, 10 * WINDOW, WINDOW):
        assert stragglers.look(gang(at, [1.0, 1.0, 3.0, 3.0], [0, 0, 1, 1])) is None


def test_a_new_attempt_begins_anew() -> None:
    stragglers = Stragglers()
    for at in (0, WINDOW):
        stragglers.look(gang(at, [1, 1, 2]))
    stragglers.forget()
    for at in (0, WINDOW):
        assert stragglers.look(gang(at, [1, 1, 2])) is None
    assert stragglers.look(gang(2 * WINDOW, [1, 1, 2])) == 2


@given(st.lists(st.floats(0.5, 1.0), min_size=2, max_size=8), st.integers(0, 7))
def test_against_a_slow_formula(busy: list[float], which: int) -> None:
    which %= len(busy)
    busy[which] *= 4
    others = sorted(busy[:which] + busy[which + 1 :])
    half = len(others) // 2
    middle = others[half] if len(others) % 2 else (others[half - 1] + others[half]) / 2
    assert busy[which] > 1.25 * middle
    assert slowest(dict(enumerate(busy)), dict.fromkeys(range(len(busy)), 0)) == which
