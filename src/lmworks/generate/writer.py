"""Text in, text out: a model, its tokenizer and its engine, opened from one folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import tokenizers
import torch

from lmworks.core.errors import CheckpointError, UsageError
from lmworks.data.tokenizer import Tokenizer, load_tokenizer
from lmworks.generate.chat import ChatTemplate, Message, load_template
from lmworks.generate.engine import Engine
from lmworks.generate.sampling import Sampling
from lmworks.model.backbone import Backbone
from lmworks.model.checkpoint import Located, load, locate

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Device = Literal["auto", "cpu", "cuda"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Writer:
    """A model that reads and writes text."""

    where: Located
    model: Backbone
    tokenizer: Tokenizer
    engine: Engine

    @cached_property
    def _raw(self) -> tokenizers.Tokenizer:
        """The tokenizer that makes special tokens out of their names, as templates need it."""
        return tokenizers.Tokenizer.from_file(str(self.where.tokenizer / "tokenizer.json"))

    @cached_property
    def start(self) -> list[int]:
        """What stands before every text: bos for a run of ours, what tokenizer.json says for other folders."""
        if self.where.run is not None:
            return [self.tokenizer.bos]
        return list(self._raw.encode("", add_special_tokens=True).ids)[:1]

    @cached_property
    def stop(self) -> frozenset[int]:
        """Tokens that end a text: eos, and those that generation_config.json names."""
        path = self.where.weights / "generation_config.json"
        named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        listed = named if isinstance(named, list) else [named]
        return frozenset([self.tokenizer.eos, *(token for token in listed if isinstance(token, int))])

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template. Raises UsageError for a model that has none."""
        found = load_template(self.where.tokenizer)
        if found is None:
            raise UsageError(
                "this model has no chat template: it goes on with a text, it was not tuned to answer",
                where=str(self.where.weights),
                next_step="lmworks generate MODEL --prompt TEXT",
            )
        return found

    def ids(self, prompt: str) -> list[int]:
        """The tokens of a prompt, with what stands before every text; never empty."""
        return [*self.start, *self.tokenizer.encode(prompt).tolist()] or [self.tokenizer.bos]

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation, up to where the answer begins."""
        return list(self._raw.encode(self.template.render(messages), add_special_tokens=False).ids)

    def write(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, max_tokens: int
    ) -> Iterator[tuple[int, str, int]]:
        """(row, text, token) as they are made; text may be '' while a character is unfinished.

        When a row is at its end, what was left unfinished comes with token -1.
        """
        streams = [self.tokenizer.stream() for _ in prompts]
        for row, token in self.engine.stream(prompts, sampling, max_tokens=max_tokens, stop=self.stop):
            # A table may have more rows than the tokenizer has tokens; such a row stands for no text.
            yield row, streams[row].push(token) if token < self.tokenizer.vocab_size else "", token
        for row, stream in enumerate(streams):
            rest = stream.end()
            if rest:
                yield row, rest, -1


def open_writer(path: Path, *, precision: Precision = "auto", device: Device = "auto") -> Writer:
    """Open a run folder, a checkpoint or a Hugging Face folder, its weights cast once.

    'auto': a GPU in bf16 when there is one, otherwise the CPU in fp32.
    """
    where = locate(path)
    place = pick_device(device)
    dtype = DTYPES[precision] if precision != "auto" else (torch.bfloat16 if place.type == "cuda" else torch.float32)
    tokenizer = tokenizer_of(where)
    model = load(path, dtype=dtype, device=place, param_dtype=dtype)
    return Writer(where, model, tokenizer, Engine(model, take=True))


def tokenizer_of(where: Located) -> Tokenizer:
    """The tokenizer of a model. Raises CheckpointError when it has tokens for which the model has no row."""
    tokenizer = load_tokenizer(where.tokenizer)
    rows = where.config().vocab_size or 0
    if tokenizer.vocab_size > rows:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model has rows for {rows}",
            where=str(where.tokenizer),
            next_step="put the tokenizer there that the model was trained with",
        )
    return tokenizer


def pick_device(device: Device) -> torch.device:
    """'auto' is a GPU when there is one. Raises UsageError for a GPU that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch sees no GPU here", legal="auto, cpu")
    return torch.device(device)
