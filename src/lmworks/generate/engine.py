"""Decoding with a key/value cache: prompts of token ids in, tokens out as they are made.

Prompts of different lengths are padded on the left; the padding is a document of its own, so nobody sees it, and
positions count from each prompt's own first token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from lmworks.core.errors import UsageError
from lmworks.generate.sampling import Sampling, choose
from lmworks.generate.step import DecoderStep, can_step, settle_cache
from lmworks.model.backbone import Backbone
from lmworks.model.cache import KVCache

GREEDY = Sampling()


class Engine:
    """Generates with one model. The result does not depend on what was generated before.

    `take=True` gives the model to the engine: weights are rearranged instead of copied (see DecoderStep), and the model
    can no longer be trained.
    """

    def __init__(self, model: Backbone, *, take: bool = False) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self._step = DecoderStep(model, dtype=model.dtype, take=take) if can_step(model) else None

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling = GREEDY,
        *,
        max_tokens: int,
        stop: Collection[int] = (),
    ) -> Iterator[tuple[int, int]]:
        """Pairs (row, token) as they are made, rows in order at each step. A row ends at a token of `stop`, not given.

        Raises UsageError for an empty prompt, an id outside the vocabulary, or a prompt that fills a learned position
        table; generation ends early where such a table ends.
        """
        max_tokens = self._checked(prompts, max_tokens)
        if max_tokens == 0 or not prompts:
            return
        generators = sampling.generators(len(prompts))
        state = _Rows(prompts, self.device)
        cache = self._new_cache(len(prompts), state.width + max_tokens)
        logits_BV = self._read(state, cache)
        live = set(range(len(prompts)))
        for made in range(1, max_tokens + 1):
            chosen = choose(logits_BV, sampling, generators)
            live -= {row for row in live if chosen[row] in stop}
            yield from ((row, chosen[row]) for row in sorted(live))
            if not live or made == max_tokens:
                return
            logits_BV = self._next(torch.tensor(chosen, device=self.device), state, cache)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling = GREEDY,
        *,
        max_tokens: int,
        stop: Collection[int] = (),
    ) -> list[list[int]]:
        """All new tokens of each prompt; see `stream`."""
        rows: list[list[int]] = [[] for _ in prompts]
        for row, token in self.stream(prompts, sampling, max_tokens=max_tokens, stop=stop):
            rows[row].append(token)
        return rows

    def _checked(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> int:
        """The number of new tokens there is room for."""
        vocab = self.model.config.vocab_size or 0
        for row, prompt in enumerate(prompts):
            if not prompt:
                raise UsageError(
                    f"prompt {row} is empty", next_step="give at least one token, for example the bos token"
                )
            if not 0 <= min(prompt) <= max(prompt) < vocab:
                raise UsageError(
                    f"prompt {row} holds a token outside the model's vocabulary", legal=f"0 to {vocab - 1}"
                )
        if self.model.positions is None or not prompts:
            return max_tokens
        room = self.model.positions.weight.shape[0]
        longest = max(len(prompt) for prompt in prompts)
        if longest > room:
            raise UsageError(f"a prompt of {longest} tokens does not fit the model's {room} positions")
        return min(max_tokens, room - longest + 1)

    @torch.inference_mode()
    def _new_cache(self, batch: int, room: int) -> KVCache:
        return self.model.new_cache(batch, room)

    @torch.inference_mode()
    def _read(self, state: _Rows, cache: KVCache) -> Tensor:
        """(B, V) logits behind the prompts, which fill the cache."""
        documents_BT = state.documents_BT
        hidden_BTD = self.model(
            state.tokens_BT, positions_BT=state.prompt_positions_BT, documents_BT=documents_BT, cache=cache
        )
        if self._step is not None:
            settle_cache(cache)
        return self.model.logits(hidden_BTD[:, -1])

    @torch.inference_mode()
    def _next(self, tokens_B: Tensor, state: _Rows, cache: KVCache) -> Tensor:
        """(B, V) logits behind one more token per row."""
        positions_B = state.advance()
        if self._step is not None:
            return self._step.logits(tokens_B, positions_B, cache, state.seen_BK)
        documents_B1 = None if state.documents_BT is None else torch.ones_like(tokens_B)[:, None]
        hidden_B1D = self.model(
            tokens_B[:, None], positions_BT=positions_B[:, None], documents_BT=documents_B1, cache=cache
        )
        return self.model.logits(hidden_B1D[:, -1])


class _Rows:
    """A padded batch of prompts, and how far its rows are."""

    def __init__(self, prompts: Sequence[Sequence[int]], device: torch.device) -> None:
        self.width = max(len(prompt) for prompt in prompts)
        padding_B = torch.tensor([self.width - len(prompt) for prompt in prompts])
        tokens_BT = torch.tensor([[0] * (self.width - len(prompt)) + list(prompt) for prompt in prompts])
        place_1T = torch.arange(self.width)[None]
        self.tokens_BT = tokens_BT.to(device)
        self.prompt_positions_BT = (place_1T - padding_B[:, None]).clamp(min=0).to(device)
        self.padded = bool(padding_B.any())
        self.documents_BT = (place_1T >= padding_B[:, None]).long().to(device) if self.padded else None
        self.seen_BK = self.documents_BT.bool() if self.documents_BT is not None else None
        self._positions_B = (self.width - padding_B).to(device)

    def advance(self) -> Tensor:
        """Positions of the rows' next tokens; the new tokens count as seen."""
        positions_B = self._positions_B
        self._positions_B = positions_B + 1
        if self.seen_BK is not None:
            self.seen_BK = torch.cat((self.seen_BK, torch.ones_like(self.seen_BK[:, :1])), 1)
        return positions_B
