"""How far frequency distributions lie apart."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def smoothed(counts_SV: NDArray[np.integer], added: float) -> Floats:
    """shares_SV of S sources over V tokens, with `added` occurrences more of every token: (c + a) / (n + a V).

    Raises ValueError for a source that has none and is given none.
    """
    counts = counts_SV.astype(np.float64) + added
    totals_S = counts.sum(axis=1, keepdims=True)
    if added < 0 or (totals_S <= 0).any():
        raise ValueError("every source needs tokens, and what is added must not be negative")
    return np.asarray(counts / totals_S)


def kl_bits(shares_SV: Floats) -> Floats:
    """kl_SS, bits: row p, column q is sum p log2(p / q) over tokens. Infinite where q never has what p has."""
    p_SV = shares_SV
    with np.errstate(divide="ignore", invalid="ignore"):
        logs_SV = np.log2(p_SV)
        own_S = np.where(p_SV > 0, p_SV * logs_SV, 0.0).sum(axis=1)
        cross_SS = np.stack([np.where(p > 0, p * logs_SV, 0.0).sum(axis=1) for p in p_SV])
    return np.asarray(np.maximum(own_S[:, None] - cross_SS, 0.0))
