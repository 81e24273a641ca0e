"""Seeds by name: one run seed, and from it an independent seed for every named use.

A seed never depends on the order in which things are built, so every layout draws the same numbers.
"""

from __future__ import annotations

import hashlib


def seed_for(run_seed: int, *names: str | int) -> int:
    """A 63-bit seed for one named use: the first 8 bytes of SHA-256 over the run seed and the names."""
    text = "\x1f".join([str(run_seed), *(str(name) for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
