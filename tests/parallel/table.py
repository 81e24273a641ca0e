"""The models and layouts of the table, and its rows run by the code that rehearses layouts for people."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from lmworks.model.decoder import DecoderConfig
from lmworks.model.gpt2 import GPT2Config
from lmworks.model.moe import Experts
from lmworks.model.neox import NeoXConfig
from lmworks.parallel.layout import Layout
from lmworks.parallel.world import temporary_groups
from lmworks.train.gradient import Clip
from lmworks.train.optim import AdamW
from lmworks.train.rehearse import Scene, Seen, perform
from lmworks.train.saved import Keep, Recompute
from lmworks.train.slots import Saved

STEPS, ROWS, LENGTH, VOCABULARY = 10, 8, 32, 257
DECODER: dict[str, Any] = {"vocab_size": VOCABULARY, "n_layers": 4, "hidden_size": 32, "n_heads": 4, "n_kv_heads": 2}
MODELS: dict[str, Any] = {
    "tied": DecoderConfig(**DECODER, ffn_size=(40, 33, 40, 48), tied=True, qk_norm=True, qkv_bias=True),
    "untied": DecoderConfig(**DECODER, ffn_size=40),
    "untied-2": DecoderConfig(**DECODER | {"n_layers": 2}, ffn_size=40),
    "experts": DecoderConfig(
        **DECODER,
        ffn_size=40,
        experts=Experts(count=4, size=12, shared_size=9, aux_loss=0.1, bias_rate=0.01, first_dense=1),
    ),
    "window": DecoderConfig(**DECODER, ffn_size=40, sliding_window=5, parallel_block=True),
    "parallel": DecoderConfig(**DECODER, ffn_size=40, parallel_block=True),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_layers=4, hidden_size=32, n_heads=4, ffn_size=40, max_position=LENGTH),
    "neox": NeoXConfig(vocab_size=VOCABULARY, n_layers=4, hidden_size=32, n_heads=4, ffn_size=40),
}


@dataclass(frozen=True)
class Case:
    """A layout, the model that it divides, and the rows of a micro-batch."""

    name: str
    axes: dict[str, Any] = field(default_factory=dict)
    micro: int = ROWS
    model: str = "tied"
    recompute: bool = False

    @property
    def layout(self) -> Layout:
        return Layout(**{"dp_shard": 1, **self.axes})

    @property
    def scene(self) -> Scene:
        saved = Recompute() if self.recompute else Keep()
        return scene_of(self.model, self.layout, micro_rows=self.micro, saved=saved)


def scene_of(model: str, layout: Layout, *, micro_rows: int = ROWS, saved: Saved | None = None) -> Scene:
    """A model of the table on any layout."""
    return Scene(
        model=MODELS[model],
        layout=layout,
        rows=ROWS,
        micro_rows=micro_rows,
        length=LENGTH,
        optimizer=AdamW(lr=1e-2),
        gradient=(Clip(),),
        saved=saved or Keep(),
    )


def train_all(rank: int, cases: list[Case], dtype: torch.dtype, steps: int = STEPS) -> list[Seen]:
    """Several cases, one after the other, in the same processes."""
    found = []
    for case in cases:
        with temporary_groups():
            found.append(perform(rank, case.scene, dtype, steps))
    return found
