"""How long documents are: made-up mixes with long tails, and those of a reader. Attention's cost hangs on nothing else.

Lengths are in tokens. Mixes are for plans and tests where the corpus is not at hand: their forms are those that are
told of pre-training corpora, their numbers our own.

    log-uniform    as many documents between 1 K and 2 K as between 64 K and 128 K: most tokens in long ones
    pretrain       web pages about a log-normal body, one in fifty from a Pareto tail: a few documents hold nearly half
    long           the kind of ProLong (Gao et al. 2024): three tokens of five in documents of 64 K or longer, books
                   and repositories; the others as in pretrain
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from lmworks.core.errors import UsageError, did_you_mean
from lmworks.core.seeds import seed_for
from lmworks.data.read import Reader
from lmworks.data.record import Ids, Record

Int = NDArray[np.int64]

BODY_MEDIAN, BODY_SIGMA = 700, 1.1
"""Tokens of the middle web page, and the spread of the logarithm."""
TAIL_SHARE, TAIL_START, TAIL_POWER = 0.02, 8192, 1.1
"""Documents in the tail, the shortest of them, and how fast longer ones become rare: P(length > x) = (x / start)^-p."""
LONG_TOKENS, LONG_START = 0.6, 65536
"""Tokens in long documents of the mix `long`, and the shortest of them."""


def log_uniform(rng: np.random.Generator, count: int, least: int, longest: int) -> Int:
    """Lengths whose logarithm is uniform."""
    return np.exp(rng.uniform(math.log(least), math.log(longest + 1), count)).astype(np.int64).clip(least, longest)


def pretrain(rng: np.random.Generator, count: int, least: int, longest: int) -> Int:
    """A log-normal body with a Pareto tail."""
    body = rng.lognormal(math.log(BODY_MEDIAN), BODY_SIGMA, count)
    tail = TAIL_START * (1 + rng.pareto(TAIL_POWER, count))
    return np.where(rng.random(count) < TAIL_SHARE, tail, body).clip(least, longest).astype(np.int64)


def long(rng: np.random.Generator, count: int, least: int, longest: int) -> Int:
    """Most tokens in long documents; where the longest allowed is shorter than those, all of these are as long as it
    is."""
    short = pretrain(rng, count, least, longest)
    tall = log_uniform(rng, count, min(LONG_START, longest), longest)
    odds = LONG_TOKENS / (1 - LONG_TOKENS) * short.mean() / tall.mean()
    return np.where(rng.random(count) < odds / (1 + odds), tall, short)


MIXES: Mapping[str, Callable[[np.random.Generator, int, int, int], Int]] = MappingProxyType(
    {"log-uniform": log_uniform, "pretrain": pretrain, "long": long}
)
"""By name."""


def drawn(mix: str, count: int, *, longest: int, least: int = 16, seed: int = 0) -> Int:
    """(count) lengths of a mix between `least` and `longest`, the same for the same seed. Raises UsageError for an
    unknown mix or limits that leave nothing."""
    if mix not in MIXES:
        raise UsageError(f"no mix of lengths is called '{mix}'{did_you_mean(mix, MIXES)}", legal=", ".join(MIXES))
    if not 1 <= least <= longest:
        raise UsageError(f"documents of {least} to {longest} tokens", legal="1 or more, and the longest not shorter")
    return MIXES[mix](np.random.default_rng(seed_for(seed, "lengths", mix)), count, least, longest)


def of_reader(reader: Reader, bytes_per_token: float = 1.0) -> Int:
    """Lengths of a reader's documents in reading order: token ids counted, text by its UTF-8 bytes, rounded up."""
    found = []
    for item in reader.read():
        if isinstance(item, Record):
            tokens = (
                len(part.ids) if isinstance(part, Ids) else len(part.text.encode()) / bytes_per_token
                for part in item.content
            )
            found.append(math.ceil(sum(tokens)))
    return np.array(found, dtype=np.int64)
