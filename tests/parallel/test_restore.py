"""A checkpoint is read by one rank of those that hold the same, and every rank has its values."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from lmworks.core.files import sha256_of
from lmworks.model.pieces import opened
from lmworks.parallel import gang
from lmworks.parallel.layout import Layout
from lmworks.parallel.state import StatePlacement
from lmworks.train import save
from tests.parallel import stored

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by four ranks that hold all of it."""
    folder = tmp_path_factory.mktemp("four") / "step-00000001"
    gang.run(stored.write, 4, Layout(dp_shard=1, dp_replicate=4), "tied", str(folder))
    return folder


AFTER = {
    "replicate-2": Layout(dp_shard=1, dp_replicate=2),
    "fsdp-2": Layout(dp_shard=2),
    "tp-2": Layout(dp_shard=1, tp=2),
    "pp-2": Layout(dp_shard=1, pp=2),
    "zero-1": Layout(dp_shard=2, state=StatePlacement(weights=1, gradients=1)),
    "hsdp": Layout(dp_shard=2, dp_replicate=2),
    "pp-2-tp-2": Layout(dp_shard=1, pp=2, tp=2),
    "ladder-4": Layout(dp_shard=4, state=StatePlacement(weights=1, gradients=2)),
    "copies": Layout(dp_shard=4, state=StatePlacement(weights=1, gradients=1, optimizer=2)),
    "tp-2-replicate-2": Layout(dp_shard=1, dp_replicate=2, tp=2),
    "pp-4": Layout(dp_shard=1, pp=4),
}


@pytest.mark.parametrize("name", AFTER)
def test_what_four_ranks_wrote_any_ranks_read(name: str, four: Path) -> None:
    layout = AFTER[name]
    found: list[stored.Read] = gang.run(stored.read, layout.ranks, layout, "tied", str(four))
    whole = save.read(four).tensors
    whole = {**whole["model"], **whole["optimizer"]}
    for seen in found:
        for tensor, (box, values) in seen.values.items():
            assert np.array_equal(values, whole[tensor].numpy()[box.index]), tensor
    assert set().union(*(seen.values for seen in found)) == set(whole)


@pytest.mark.parametrize("name", ["replicate-2", "hsdp", "tp-2-replicate-2"])
def test_of_those_that_hold_the_same_one_reads(name: str, four: Path) -> None:
    """The others are told, and it stands on the bill. A count of steps is no part of a weight: each is told it too."""
    layout = AFTER[name]
    found: list[stored.Read] = gang.run(stored.read, layout.ranks, layout, "tied", str(four))
    tensors = len(found[0].values)
    assert [seen.reads for seen in found] == {
        "replicate-2": [tensors, 0],
        "hsdp": [tensors, tensors, 0, 0],  # two halves of everything, each with two ranks
        "tp-2-replicate-2": [tensors, found[1].reads, 0, 0],
    }[name]
    alike = tensors - found[1].reads if name == "tp-2-replicate-2" else 0  # norms, and counts of steps beside them
    for rank, seen in enumerate(found):
        apart = alike if layout.place(rank, "tp") else 0  # whole ones come from the first rank of tp
        assert seen.calls == {"dp_replicate": tensors - apart} | ({"tp": alike} if alike else {})
    assert bool(alike) == (name == "tp-2-replicate-2")


def test_a_gap_is_an_error_on_every_rank(four: Path, tmp_path: Path) -> None:
    """Also on those that do not read: nobody waits for the one that met it."""
    folder, layout = tmp_path / "step-00000002", Layout(dp_shard=1, dp_replicate=2)
    gang.run(stored.write, 2, layout, "tied", str(folder))
    part = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(part)
    with opened(part) as file:
        places = file.metadata()
    tensors.pop(min(name for name in tensors if name.endswith("down_proj.weight")))
    save_file(tensors, part, metadata=places)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][part.name] = {"bytes": part.stat().st_size, "sha256": sha256_of(part)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    told = gang.run(stored.torn, 2, layout, "tied", str(folder))
    assert all("down_proj.weight" in text for text in told), told
