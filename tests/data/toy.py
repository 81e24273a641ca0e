"""Small data for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lmworks.data.identity import Identity, SourceIdentity
from lmworks.data.load import Loader
from lmworks.data.mixture import Mixture
from lmworks.data.pack import Documents, Stream, Tokens
from lmworks.data.sharing import Sharing

BOS = 7
"""Both ends of every toy document."""


def documents(lengths: Sequence[int], *, first: int = 1000, arrays: int = 1) -> Documents:
    """Documents of the given lengths; inner tokens count upwards from `first`, so every one is unique."""
    lists, token = [], first
    for length in lengths:
        lists.append([BOS, *range(token, token + length - 2), BOS])
        token += length - 2
    flat = np.array([token for document in lists for token in document], dtype=np.uint16)
    ends = np.cumsum(lengths)
    return Documents(
        Tokens(np.array_split(flat, arrays)),
        (ends - lengths).astype(np.int64),
        np.array(lengths, dtype=np.int64),
        np.array([3 * (length - 2) for length in lengths], dtype=np.int64),
        np.arange(len(lengths), dtype=np.uint64) * np.uint64(2**50),
    )


def as_lists(toy: Documents) -> list[list[int]]:
    """The documents as plain lists."""
    flat = np.concatenate(toy.tokens.arrays).tolist()
    return [flat[start : start + length] for start, length in zip(toy.starts, toy.lengths, strict=True)]


def identity(names: Sequence[str], *, seed: int = 0, length: int = 4) -> Identity:
    """An identity for toy sources."""
    sources = {name: SourceIdentity(weight=1.0, source_id=name, key=name, contents=name) for name in names}
    return Identity(
        seed=seed,
        sequence_length=length,
        validation=0.0,
        tokenizer="toy",
        sources=sources,
        cache=Path("nowhere"),
        files={},
    )


def loader(
    sources: Sequence[Documents],
    *,
    weights: Sequence[float] | None = None,
    length: int = 4,
    seed: int = 0,
    share: tuple[int, int] = (0, 1),
    prefetch: int = 0,
    pin: bool = False,
    sharing: Sharing | None = None,
) -> Loader:
    """A loader over toy sources called a, b, c, ..."""
    names = [chr(ord("a") + i) for i in range(len(sources))]
    streams = [
        Stream(source, sequence_length=length, seed=seed, name=name)
        for source, name in zip(sources, names, strict=True)
    ]
    mixture = Mixture(weights or [1.0] * len(sources))
    made_with = identity(names, seed=seed, length=length)
    return Loader(streams, mixture, made_with, share=share, prefetch=prefetch, pin=pin, sharing=sharing)
