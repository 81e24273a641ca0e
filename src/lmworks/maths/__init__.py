"""Floor 1: pure functions."""
