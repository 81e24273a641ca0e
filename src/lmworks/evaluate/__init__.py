"""Floor 4: what a model is worth, measured."""
