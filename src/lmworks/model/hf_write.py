"""Writing a Hugging Face folder: into a temporary folder beside its place, synced, and renamed when it is complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lmworks.core import files
from lmworks.core.errors import ExportError
from lmworks.model.backbone import Backbone
from lmworks.model.hf_names import pack
from lmworks.model.hf_shape import Target, added_bias, pad, target
from lmworks.model.sizes import Shape

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The special token ids that generation needs; None = there is none."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None

    def table(self) -> dict[str, int | None]:
        """As config.json and generation_config.json spell them."""
        return {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    Raises ExportError when something is at `path` already, or the place cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ExportError(
            "is already there and is not empty", where=str(path), next_step="give another folder, or delete it"
        )
    temporary = path.with_name(f".writing-{path.name}-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():
            files.sync(file)
        files.sync(temporary)
        if path.exists():
            path.rmdir()
        temporary.rename(path)
        files.sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"cannot be written: {files.why_not_written(error)}", where=str(path)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write(
    model: Backbone,
    folder: Path,
    *,
    tokenizer_folder: Path | None,
    tokens: Tokens,
    dtype: torch.dtype,
    shard_bytes: int,
    card: str | None,
) -> None:
    """Write every file of the folder. Raises ExportError for a model that no family holds."""
    goal = target(model.config)
    table = {**goal.table, **tokens.table(), "dtype": NAMES[dtype], "torch_dtype": NAMES[dtype], "use_cache": True}
    _json(folder / "config.json", table)
    _json(folder / "generation_config.json", {k: v for k, v in tokens.table().items() if v is not None})
    _write_shards(folder, stored(model, goal, dtype), shard_bytes)
    for name in TOKENIZER_FILES if tokenizer_folder is not None else ():
        source = Path(tokenizer_folder or "") / name
        if source.is_file():
            shutil.copyfile(source, folder / name)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")


def stored(model: Backbone, goal: Target, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors in the order of the forward pass, one at a time; a tied table once."""
    parameters = dict(model.named_parameters())
    for ours in _names(model.config, goal):
        name, place = goal.family.place(ours)
        if place.part:
            continue  # k and v are written with q
        siblings = [ours] if place.part is None else [ours.replace("q_proj", f"{letter}_proj") for letter in "qkv"]

        def part(i: int, siblings: list[str] = siblings) -> Tensor:
            return _even(siblings[i], parameters, model.config, goal)

        tensor = pack(part, place, goal.family.fusion, goal.sizes.n_heads).detach()
        if "{e}" in name:
            for e, matrix in enumerate(tensor):
                yield name.replace("{e}", str(e)), matrix.to("cpu", dtype).contiguous()
            continue
        yield name, tensor.to("cpu", dtype).contiguous()


def _names(config: Shape, goal: Target) -> Iterator[str]:
    for name, _ in config.shapes():
        yield name
        for added in goal.added_biases:
            words = name.split(".")
            if words[0] == "blocks" and name == added.replace("{i}", words[1]).replace(".bias", ".weight"):
                yield added.replace("{i}", words[1])


def _even(name: str, parameters: Mapping[str, Tensor], config: Shape, goal: Target) -> Tensor:
    if name not in parameters:
        return added_bias(name, config, goal.sizes)
    tensor = parameters[name].detach()
    return pad(name, tensor, goal) if name.startswith("blocks.") else tensor


def _write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], limit: int) -> None:
    """One file, or several of at most `limit` bytes (a larger tensor has a file of its own) and their index."""
    shards: list[dict[str, int]] = []
    held: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if held and size + tensor.nbytes > limit:
            shards.append(_shard(folder, len(shards), held))
            held, size = {}, 0
        held[name] = tensor
        size += tensor.nbytes
    shards.append(_shard(folder, len(shards), held))
    if len(shards) == 1:
        _part(folder, 0).rename(folder / "model.safetensors")
        return
    homes: dict[str, str] = {}
    for index, names in enumerate(shards):
        path = folder / f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        _part(folder, index).rename(path)
        homes |= dict.fromkeys(names, path.name)
    total = sum(size for names in shards for size in names.values())
    _json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": homes})


def _shard(folder: Path, index: int, tensors: dict[str, Tensor]) -> dict[str, int]:
    """Write one file; names and bytes of what is in it."""
    save_file(tensors, _part(folder, index), metadata={"format": "pt"})
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def _part(folder: Path, index: int) -> Path:
    return folder / f"part-{index}.safetensors"


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
