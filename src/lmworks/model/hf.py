"""Hugging Face folders in and out, from config.json and safetensors alone: transformers is not needed.

    folder = read_folder(path)        config, and tensors that are read when they are asked for
    model = load(path)                the model, in the precisions asked for
    save(model, path, ...)            config.json, generation_config.json, safetensors, tokenizer files, README.md

Families: Llama (SmolLM2 too), Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE, GPT-2, GPT-NeoX; the tables are in
hf_names.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmworks.core.errors import CheckpointError
from lmworks.model.backbone import Backbone
from lmworks.model.hf_config import Config, read_config
from lmworks.model.hf_names import Family, unpack
from lmworks.model.hf_write import Tokens, new_folder, write

__all__ = ["Folder", "Tokens", "load", "load_into", "read_folder", "save"]

NO_TOKENS = Tokens()
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class StoredTensors:
    """The tensors of a folder by their stored names, over one file or many; each is read when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[Path, Any] = {}
        self._home = self._find()

    def _find(self) -> dict[str, Path]:
        """Stored name -> file. Raises CheckpointError for a missing or damaged file."""
        index = self.folder / INDEX
        if index.is_file():
            try:
                listed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError) as error:
                raise CheckpointError(f"is damaged: {error}", where=str(index)) from error
            found = {name: self.folder / file for name, file in listed.items()}
            for path in sorted(set(found.values())):
                present = set(self._open(path).keys())
                absent = next((name for name, file in found.items() if file == path and name not in present), None)
                if absent is not None:
                    raise CheckpointError(f"holds no {absent}, though {INDEX} says so", where=str(path))
            return found
        single = self.folder / SINGLE
        if not single.is_file():
            pickled = sorted(self.folder.glob("*.bin")) + sorted(self.folder.glob("*.pt*"))
            raise CheckpointError(
                "holds no model.safetensors"
                + (f" ({pickled[0].name} is pickled: loading it runs code)" if pickled else ""),
                where=str(self.folder),
                next_step="convert it with transformers: save_pretrained writes safetensors" if pickled else None,
            )
        return dict.fromkeys(self._open(single).keys(), single)

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = safe_open(path, framework="pt")  # untyped in safetensors
            except FileNotFoundError as error:
                raise CheckpointError(f"is named by {INDEX} but is not there", where=str(path)) from error
            except SafetensorError as error:
                raise CheckpointError(f"is damaged or cut short: {error}", where=str(path)) from error
        return self._files[path]

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __getitem__(self, name: str) -> Tensor:
        path = self._home[name]
        tensor: Tensor = self._open(path).get_tensor(name)
        return tensor


class Tensors(Mapping[str, Tensor]):
    """The parameters of a folder under our names. Names and their completeness are checked at once, values are lazy."""

    def __init__(self, stored: StoredTensors, config: Config, family: Family) -> None:
        self._stored = stored
        self._family = family
        self._shapes = dict(config.shapes())
        self._heads = [block.n_heads for block in config.blocks()]
        bare = family.place("embed.weight")[0].removeprefix(family.prefix)
        self._bare = bare in stored
        self._check(config)

    def _name(self, ours: str) -> str:
        return self._names(ours, ())[0]

    def _names(self, ours: str, shape: tuple[int, ...]) -> list[str]:
        names = self._family.stored_names(ours, shape)
        return [name.removeprefix(self._family.prefix) for name in names] if self._bare else names

    def _check(self, config: Config) -> None:
        """Every parameter must be there, and every stored tensor must be a parameter or known to be none."""
        where = str(self._stored.folder)
        wanted = {name for ours, shape in self._shapes.items() for name in self._names(ours, shape)}
        missing = sorted(name for name in wanted if name not in self._stored)
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(f"lacks the tensor {missing[0]}{more}", where=where)
        head = self._name("head.weight")
        for name in self._stored:
            if name in wanted or name.endswith(self._family.buffers):
                continue
            if name == head and config.tied:
                if not torch.equal(self._stored[name], self._stored[self._name("embed.weight")]):
                    text = f"{name} is not the token table, though config.json says tie_word_embeddings = true"
                    raise CheckpointError(text, where=where, next_step="set tie_word_embeddings to false")
            elif not (name.endswith(".self_attn.o_proj.bias") and not self._stored[name].any()):
                raise CheckpointError(
                    f"{name} is no part of a {self._family.model_type} model that lmworks has", where=where
                )

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, ours: str) -> Tensor:
        place = self._family.place(ours)[1]
        words = ours.split(".")
        heads = self._heads[int(words[1])] if words[0] == "blocks" else 1
        names = self._names(ours, self._shapes[ours])
        parts = [unpack(self._stored[name], place, self._family.fusion, heads) for name in names]
        alike = all(part.shape == parts[0].shape for part in parts)
        tensor = torch.stack(parts) if "{e}" in place.name and alike else parts[0]
        if tuple(tensor.shape) != self._shapes[ours]:
            raise CheckpointError(
                f"{names[0]} gives {ours} the shape {list(tensor.shape)}; config.json says {list(self._shapes[ours])}",
                where=str(self._stored.folder),
            )
        return tensor


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A Hugging Face folder: the model's config, and its tensors under our names."""

    path: Path
    config: Config
    family: Family
    tensors: Tensors


def read_folder(path: Path) -> Folder:
    """Read config.json and the headers of the weights. Raises CheckpointError that names what is missing or unknown."""
    config, family = read_config(path)
    return Folder(path=path, config=config, family=family, tensors=Tensors(StoredTensors(path), config, family))


def load(
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    param_dtype: torch.dtype = torch.float32,
) -> Backbone:
    """The model of a folder: computes in `dtype`, keeps its parameters in `param_dtype`."""
    folder = read_folder(path)
    model = folder.config.build(dtype=dtype, device="meta", param_dtype=param_dtype).to_empty(device=device)
    load_into(model, folder.tensors)
    return model


def load_into(model: Backbone, tensors: Mapping[str, Tensor]) -> None:
    """Copy every parameter of the model from `tensors`, one at a time, in the model's own precision and place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])


def save(
    model: Backbone,
    path: Path,
    *,
    tokenizer_folder: Path | None = None,
    tokens: Tokens = NO_TOKENS,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = 5_000_000_000,
    card: str | None = None,
) -> None:
    """Write the model as a Hugging Face folder: into a temporary folder beside `path`, synced, then renamed.

    Tokenizer files are copied from `tokenizer_folder`; `tokens` are the special ids; `card` is the text of README.md.
    Weights above `shard_bytes` are split. Raises ExportError for a model that no family holds, or when the path is
    taken.
    """
    with new_folder(path) as folder:
        write(
            model,
            folder,
            tokenizer_folder=tokenizer_folder,
            tokens=tokens,
            dtype=dtype,
            shard_bytes=shard_bytes,
            card=card,
        )
