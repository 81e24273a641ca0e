"""A model on disk, whatever wrote it: a Hugging Face folder, a run folder, or one checkpoint of a run.

    where = locate(path)          which of the three, where its weights and its tokenizer are
    where.config()                the shape, with the vocabulary filled in
    load(path)                    the model

A run folder means its newest complete checkpoint. Its shape is in model.toml, or in the recipe's table [model].
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import tomli_w
import torch
from torch import Tensor

from lmworks.core import files, recipe
from lmworks.core.cost import Cost
from lmworks.core.errors import CheckpointError, did_you_mean
from lmworks.core.home import models_folder
from lmworks.model import hf
from lmworks.model.backbone import Backbone
from lmworks.model.pieces import Pieces
from lmworks.model.sizes import Shape

WEIGHTS = "model.safetensors"
SHAPE = "model.toml"
NAME = re.compile(r"step-\d{8}")
"""The name of a checkpoint's folder."""


class ModelConfig(Shape, Protocol):
    """What every part of the slot 'model' can do."""

    def with_vocab(self, vocab_size: int) -> Self:
        """The same shape for another vocabulary."""
        ...

    def build(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        param_dtype: torch.dtype = torch.float32,
    ) -> Backbone:
        """The network."""
        ...

    def cost(self, *, sequence: int, bytes_per_value: int = 4) -> Cost:
        """What it costs."""
        ...


@dataclass(frozen=True, kw_only=True)
class Located:
    """Where a model lies."""

    weights: Path
    """A Hugging Face folder, or a complete checkpoint folder."""
    run: Path | None
    """The run folder of a checkpoint; None for a Hugging Face folder."""

    @property
    def tokenizer(self) -> Path:
        """The folder that holds tokenizer.json."""
        return self.weights if self.run is None else self.run / "tokenizer"

    def config(self) -> ModelConfig:
        """The shape, vocabulary included. Raises CheckpointError or RecipeError when it cannot be told."""
        if self.run is None:
            return hf.read_folder(self.weights).config
        config = _shape_of_run(self.run)
        if config.vocab_size is not None:
            return config
        return config.with_vocab(Pieces(weight_files(self.weights)).shapes()["embed.weight"][0])

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the files that hold the weights, by name."""
        if self.run is not None:
            names = [path.name for path in weight_files(self.weights)]
            listed = verify(self.weights, names)["files"]
            return {name: str(listed[name]["sha256"]) for name in names}
        return {path.name: files.sha256_of(path) for path in sorted(self.weights.glob("*.safetensors"))}

    def tensors(self) -> Mapping[str, Tensor]:
        """The parameters by our names. A checkpoint's bytes are verified first."""
        if self.run is None:
            return hf.read_folder(self.weights).tensors
        paths = weight_files(self.weights)
        verify(self.weights, [path.name for path in paths])
        return Pieces(paths).all()


def locate(path: Path) -> Located:
    """What lies at a path, or below lmworks' own folder of fetched models. Raises CheckpointError for no model."""
    if not path.exists() and (models_folder() / path).is_dir():
        path = models_folder() / path
    if not path.is_dir():
        near = [folder for folder in (path.parent, models_folder()) if folder.is_dir()]
        beside = [p.name for folder in near for p in folder.iterdir() if p.is_dir()]
        hint = did_you_mean(path.name, beside)
        raise CheckpointError(f"there is no such folder{hint}", where=str(path), legal=_LEGAL)
    if (path / "config.json").is_file():
        return Located(weights=path, run=None)
    if (path / "recipe.toml").is_file():
        found = complete(path / "checkpoints")
        if not found:
            raise CheckpointError(
                "this run has no complete checkpoint yet",
                where=str(path),
                next_step="let it train on; checkpoints.every says how often one is written",
            )
        return Located(weights=found[-1], run=path)
    if weight_files(path)[0].is_file() and path.parent.name == "checkpoints":
        return Located(weights=path, run=path.parent.parent)
    raise CheckpointError("holds no model", where=str(path), legal=_LEGAL)


_LEGAL = (
    "a run folder (recipe.toml), a checkpoint of a run (checkpoints/step-...), a Hugging Face folder (config.json), "
    "the name of a fetched model"
)


def load(
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    param_dtype: torch.dtype = torch.float32,
) -> Backbone:
    """The model at a path: computes in `dtype`, keeps its parameters in `param_dtype`."""
    where = locate(path)
    model = where.config().build(dtype=dtype, device="meta", param_dtype=param_dtype).to_empty(device=device)
    fill(model, where)
    return model


def fill(model: Backbone, where: Located) -> None:
    """Copy the weights that lie there into the model. Raises CheckpointError when names or shapes differ."""
    parameters = dict(model.named_parameters())
    tensors = checked(where, {name: tuple(parameter.shape) for name, parameter in parameters.items()})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def checked(where: Located, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Tensor]:
    """The weights that lie there, each compared with the shape that is wanted when it is taken.

    Raises CheckpointError when names or shapes differ.
    """
    tensors = where.tensors()
    missing = [name for name in shapes if name not in tensors]
    unknown = [name for name in tensors if name not in shapes]
    if missing or unknown:
        raise CheckpointError(
            f"is of another model: it {'lacks' if missing else 'also holds'} {(missing or unknown)[0]}",
            where=str(where.weights),
        )
    return _Checked(tensors, shapes, str(where.weights))


class _Checked(Mapping[str, Tensor]):
    """Tensors of which each has the shape that is wanted."""

    def __init__(self, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
        self._tensors, self._shapes, self._where = tensors, shapes, where

    def __getitem__(self, name: str) -> Tensor:
        tensor, shape = self._tensors[name], self._shapes[name]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"is of another model: {name} is {list(tensor.shape)} there, {list(shape)} in this model",
                where=self._where,
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def write_shape(run: Path, config: Any) -> None:
    """Keep the shape of a run's model in the run folder, so that it can be read when a recipe's own base is gone."""
    files.write_text(run / SHAPE, tomli_w.dumps({"model": recipe.table_of(config)}))


def _shape_of_run(run: Path) -> ModelConfig:
    path = run / SHAPE if (run / SHAPE).is_file() else run / "recipe.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))["model"]
    except FileNotFoundError as error:
        raise CheckpointError("is not there, so the model's shape is not known", where=str(path)) from error
    except (tomllib.TOMLDecodeError, KeyError) as error:
        raise CheckpointError(f"does not tell the model's shape: {error}", where=str(path)) from error
    config: ModelConfig = recipe.decode_part("model", table, source=str(path))
    return config


def weight_files(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint that hold its weights: one, or one from each rank that had some."""
    return sorted(checkpoint.glob("model-*-of-*.safetensors")) or [checkpoint / WEIGHTS]


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first. Folders of any other name are a person's own."""
    return sorted(p.parent for p in folder.glob("step-*/manifest.json") if NAME.fullmatch(p.parent.name))


def unfinished(folder: Path) -> list[str]:
    """The names of checkpoints in a folder that were not written to their end: nothing goes on from one of them."""
    named = [
        p.name.removeprefix(".writing-") for pattern in ("step-*", ".writing-step-*") for p in folder.glob(pattern)
    ]
    whole = {path.name for path in complete(folder)}
    return sorted({name for name in named if NAME.fullmatch(name)} - whole)


def step_of(path: Path) -> int:
    """The step of a checkpoint folder."""
    return int(path.name.removeprefix("step-"))


def verify(checkpoint: Path, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Compare files (all, or those named) with the sizes and SHA-256 of the checkpoint's manifest, which is returned.

    Raises CheckpointError that names the damaged file and the checkpoint before it.
    """
    path = checkpoint / "manifest.json"
    if not path.is_file():
        raise refused(checkpoint, "is not a complete checkpoint: it has no manifest.json")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        listed = {name: (int(facts["bytes"]), str(facts["sha256"])) for name, facts in manifest["files"].items()}
        wanted = {name: listed[name] for name in (names if names is not None else listed)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise refused(checkpoint, f"manifest.json is damaged ({error})") from error
    for name, (size, digest) in wanted.items():
        file = checkpoint / name
        if not file.is_file():
            raise refused(checkpoint, f"{name} is missing")
        if file.stat().st_size != size:
            raise refused(checkpoint, f"{name} has {file.stat().st_size} bytes, {size} were written")
        if files.sha256_of(file) != digest:
            raise refused(checkpoint, f"{name} does not have the bytes that were written (its SHA-256 differs)")
    return manifest


def refused(checkpoint: Path, what: str) -> CheckpointError:
    """A checkpoint that cannot be used, and the one before it."""
    earlier = [p for p in complete(checkpoint.parent) if p.name < checkpoint.name]
    step = (
        f"take the checkpoint before it, {earlier[-1]} (to train on: --resume {earlier[-1]})"
        if earlier
        else "no earlier checkpoint is there; --resume never trains anew"
    )
    return CheckpointError(what, where=str(checkpoint), next_step=step)
