"""Whole numbers."""

from __future__ import annotations

from functools import cache


@cache
def divisors(number: int) -> tuple[int, ...]:
    """From 1 up to the number itself."""
    return tuple(d for d in range(1, number + 1) if number % d == 0)


def legal_divisors(number: int) -> str:
    """The same, as an error lists what is legal."""
    return ", ".join(map(str, divisors(number)))
