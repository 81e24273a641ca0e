"""Methods are tried on what training is tried on."""

from tests.train.conftest import cache, text

__all__ = ["cache", "text"]
