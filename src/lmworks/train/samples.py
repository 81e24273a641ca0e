"""Texts that the model writes while it learns, so that a person can read how far it is."""

from __future__ import annotations

from typing import Any

from torch import nn

from lmworks.core.seeds import seed_for
from lmworks.data.tokenizer import Tokenizer
from lmworks.train.recipe import Samples


class Sampler:
    """Goes on with the recipe's prompts."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, settings: Samples, *, seed: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._settings = settings
        self._seed = seed

    def sample(self, step: int) -> list[dict[str, Any]]:
        """One row for each prompt: step, prompt, text."""
        return [{"step": step, "prompt": prompt, "text": ""} for prompt in self._settings.prompts]
