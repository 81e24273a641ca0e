"""Who writes what several ranks hold alike: every row once, and nobody more than the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmworks.model.pieces import BOXES, opened
from lmworks.parallel import gang
from lmworks.parallel.layout import Layout
from lmworks.parallel.spread import share
from lmworks.parallel.state import StatePlacement
from lmworks.train import save
from tests.oracles.spread import rows_of
from tests.parallel import stored
from tests.parallel.table import MODELS

NAMES = st.text("abc", min_size=1, max_size=3)
SIZES = st.dictionaries(NAMES, st.tuples(st.integers(0, 9), st.integers(1, 12)), max_size=6)


@given(SIZES, st.integers(1, 7))
def test_every_row_is_with_the_rank_in_whose_length_of_the_line_it_begins(
    sizes: dict[str, tuple[int, int]], ranks: int
) -> None:
    for place in range(ranks):
        found = share(sizes, place, ranks)
        assert {name: list(rows) for name, rows in found.items()} == rows_of(sizes, place, ranks)


@given(SIZES, st.integers(1, 7))
def test_nobody_writes_more_than_an_even_share_and_a_row(sizes: dict[str, tuple[int, int]], ranks: int) -> None:
    found = [share(sizes, place, ranks) for place in range(ranks)]
    whole = sum(rows * row for rows, row in sizes.values())
    wide = max((row for _, row in sizes.values()), default=0)
    written = [sum(len(rows) * sizes[name][1] for name, rows in part.items()) for part in found]
    assert sum(written) == whole
    assert max(written) < whole / ranks + wide or not whole


LAYOUTS = {
    "replicate-4": Layout(dp_shard=1, dp_replicate=4),
    "hsdp": Layout(dp_shard=2, dp_replicate=2),
    "tp-2-replicate-2": Layout(dp_shard=1, dp_replicate=2, tp=2),
    "pp-2-replicate-2": Layout(dp_shard=1, pp=2, dp_replicate=2),
    "zero-1-copies": Layout(dp_shard=4, state=StatePlacement(weights=1, gradients=2, optimizer=2)),
    "mics": Layout(dp_shard=4, state=StatePlacement(weights=2, gradients=2, optimizer=2)),
    "cp-2-tp-2": Layout(dp_shard=1, cp=2, tp=2),
    "ep-2": Layout(dp_shard=4, ep=2),
    "ep-2-hsdp": Layout(dp_shard=2, dp_replicate=2, ep=2),
}
EVEN = ("replicate-4", "hsdp", "tp-2-replicate-2", "zero-1-copies", "mics", "cp-2-tp-2", "ep-2", "ep-2-hsdp")
"""Where all ranks hold as much; the stages of a pipeline do not."""


@pytest.mark.ranks
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_value_is_written_once_and_each_rank_writes_as_much(name: str, tmp_path: Path) -> None:
    """Within 1.3 of each other, as the dossier asks."""
    layout, folder = LAYOUTS[name], tmp_path / "step-00000001"
    model = "experts" if layout.ep > 1 else "tied"
    written = gang.run(stored.write, 4, layout, model, str(folder))
    shapes = dict(MODELS[model].shapes())
    values: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with opened(path) as file:
            assert json.loads((file.metadata() or {}).get(BOXES, "{}")).keys() <= set(file.keys())
            for tensor in file.keys():  # noqa: SIM118  (not a dict)
                values[tensor] = values.get(tensor, 0) + torch.Size(file.get_slice(tensor).get_shape()).numel()
    for tensor, found in values.items():
        owner = tensor if tensor in shapes else tensor.rpartition("/")[0]
        assert found == (1 if tensor.endswith("/step") else torch.Size(shapes[owner]).numel()), tensor
    assert len(values) == 4 * len(shapes)
    if name in EVEN:
        assert max(written) <= 1.3 * min(written)
    else:  # stage by stage
        assert all(max(half) <= 1.3 * min(half) for half in (written[:2], written[2:]))
    whole = save.read(folder).tensors
    assert torch.equal(whole["optimizer"]["embed.weight/exp_avg"], whole["model"]["embed.weight"] * 2)
