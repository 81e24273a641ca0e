"""Texts that the model writes while it learns, so that a person can read how far it is."""

from __future__ import annotations

from typing import Any

from lmworks.core.errors import Problem, RecipeError
from lmworks.core.seeds import seed_for
from lmworks.data.tokenizer import Tokenizer
from lmworks.generate.engine import Engine
from lmworks.generate.sampling import Sampling
from lmworks.model.backbone import Backbone
from lmworks.model.sizes import Shape
from lmworks.train.recipe import Samples


def _tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    return [tokenizer.bos, *(int(i) for i in tokenizer.encode(prompt))]


def must_fit_positions(shape: Shape, tokenizer: Tokenizer, settings: Samples) -> None:
    """Raise RecipeError when a prompt is longer than the model's position table, before anything is trained."""
    table = dict(shape.shapes()).get("positions.weight")
    if not settings.prompts or table is None:
        return
    room = table[0]
    problems = [
        Problem(
            path=f"samples.prompts.{i}", text=f"is {length} tokens long, the model has {room} positions; shorten it"
        )
        for i, prompt in enumerate(settings.prompts)
        if (length := len(_tokens(tokenizer, prompt))) > room
    ]
    if problems:
        raise RecipeError(problems)


def sample(model: Backbone, tokenizer: Tokenizer, settings: Samples, *, seed: int, step: int) -> list[dict[str, Any]]:
    """Go on with each of the recipe's prompts: rows of step, prompt, text. Touches no random state of the run."""
    prompts = [_tokens(tokenizer, prompt) for prompt in settings.prompts]
    if not prompts:
        return []
    sampling = Sampling(temperature=settings.temperature, top_k=settings.top_k, seed=seed_for(seed, "samples"))
    found = Engine(model).complete(prompts, sampling, max_tokens=settings.tokens, stop={tokenizer.eos})
    return [
        {"step": step, "prompt": prompt, "text": tokenizer.decode(ids)}
        for prompt, ids in zip(settings.prompts, found, strict=True)
    ]
