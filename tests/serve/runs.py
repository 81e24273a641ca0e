"""A finished run folder as train.save writes it, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomli_w

from lmworks.core.recipe import table_of
from lmworks.data.tokenizer import Bytes
from lmworks.model.backbone import Backbone
from lmworks.model.decoder import DecoderConfig
from lmworks.model.init import initialise
from lmworks.train.save import Snapshot, write

CONFIG = DecoderConfig(n_layers=2, hidden_size=32, n_heads=4, n_kv_heads=2, ffn_size=48, tied=True, max_position=64)


def make_run(folder: Path, config: Any = CONFIG, *, steps: tuple[int, ...] = (5,), seed: int = 0) -> Backbone:
    """Write recipe, byte tokenizer (V = 257) and one checkpoint for each of `steps`; the last checkpoint's model."""
    Bytes().make([]).save(folder / "tokenizer")
    (folder / "recipe.toml").write_text(tomli_w.dumps({"do": "train", "model": table_of(config)}))
    (folder / "checkpoints").mkdir()
    sized = config.with_vocab(257)
    model: Backbone = sized.build()
    for step in steps:
        initialise(model, seed + step)
        tensors = dict(model.named_parameters())
        write(folder / "checkpoints" / f"step-{step:08d}", Snapshot(tensors={"model": tensors}, state={"step": step}))
    return model
