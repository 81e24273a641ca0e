"""What a recipe's sources are to each other: tokens, how often a run reads them, how far their tokens lie apart."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmworks.core.errors import UsageError
from lmworks.data.prepared import Prepared
from lmworks.data.read import Progress
from lmworks.data.shards import Shards
from lmworks.maths.divergence import kl_bits, smoothed
from lmworks.train.recipe import Train


def report(recipe: Train, *, smoothing: float = 1.0, progress: Progress | None = None) -> dict[str, Any]:
    """Tokens, share and epochs of each source, and the matrix of divergences, as JSON values.

    `smoothing`: how many occurrences of every token are added to a source's counts; 0 gives infinite divergences where
    a source lacks a token. Raises UsageError for a negative one.
    """
    if smoothing < 0:
        raise UsageError(f"{smoothing:g} occurrences cannot be added", legal="--smoothing 0 or more")
    prepared = recipe.data.prepare(seed=recipe.seed, progress=progress)
    names = list(recipe.data.shares)
    counts_SV = np.stack([tokens_of(prepared, shards) for shards in prepared.shards])
    divergence_SS = kl_bits(smoothed(counts_SV, smoothing))
    rows = recipe.steps * recipe.batch_size
    epochs = prepared.epochs({name: share * rows for name, share in recipe.data.shares.items()})
    return {
        "vocabulary": int(counts_SV.shape[1]),
        "tokenizer": prepared.tokenizer.id,
        "smoothing": smoothing,
        "sources": {
            name: {"tokens": int(counts.sum()), "share": recipe.data.shares[name], "epochs": epochs[name]}
            for name, counts in zip(names, counts_SV, strict=True)
        },
        "kl_bits": {
            name: {other: float(bits) for other, bits in zip(names, row, strict=True)}
            for name, row in zip(names, divergence_SS, strict=True)
        },
    }


def tokens_of(prepared: Prepared, shards: Shards) -> NDArray[np.int64]:
    """counts_V: how often each token occurs in a source's documents; what begins or ends one is not text."""
    size = prepared.tokenizer.vocab_size
    counts_V = np.zeros(size, dtype=np.int64)
    for array in shards.training(0.0).tokens.arrays:
        counts_V += np.bincount(array, minlength=size)
    counts_V[[prepared.tokenizer.bos, prepared.tokenizer.eos]] = 0
    return counts_V
