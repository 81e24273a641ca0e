"""How long ranks wait on a recipe's own documents: the rows that training reads, cut as the trainer cuts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from lmworks.cli.app import app
from lmworks.core import recipe as recipes
from lmworks.core.errors import UsageError
from lmworks.parallel.laying import whole
from lmworks.parallel.tasks import plain
from lmworks.train.waiting import facts, halves, lengths, told, waiting
from tests.train import ranked


def skewed(text: Path, cache: Path, **over: Any) -> Any:
    """Rows of 96 tokens; one document in eight fills rows by itself."""
    lines = [("x" * 400 if i % 8 == 0 else f"short {i}") for i in range(160)]
    (text.parent / "skewed.txt").write_text("\n\n".join(lines), encoding="utf-8")
    readers = [{"use": "text", "paths": [str(text.parent / "skewed.txt")], "split": "block"}]
    table = ranked.table(text, cache, **over)
    table["data"] |= {"readers": readers, "sequence_length": 96}
    return recipes.decode(table)


def settled(recipe: Any, ranks: int) -> Any:
    return recipe.layout.settle(ranks, recipe)


def test_rows_are_those_that_each_rank_would_train_on(text: Path, cache: Path) -> None:
    """Pairs of plain rows, counted again from the loaders of two ranks."""
    recipe = skewed(text, cache)
    found = waiting(recipe, settled(recipe, 2), [2], steps=3)[0].outcomes["plain"]
    prepared = recipe.data.prepare(seed=recipe.seed)
    loaders = [prepared.train(share=(rank, 2), prefetch=0) for rank in range(2)]
    imbalances = []
    for _ in range(3):
        held = [[x for row in one.draw(8).documents_BT.numpy() for x in lengths(row)] for one in loaders]
        imbalances.append(plain(whole(held), 2).imbalance)
    assert found.tokens == 3 * 8 * 96
    assert found.largest == pytest.approx(np.mean(imbalances))


def test_shared_attention_leaves_less_waiting_than_rows_as_packed(text: Path, cache: Path) -> None:
    recipe = skewed(text, cache, batch_size=4, layout={"servers": {"tile": 4, "tolerance": 0.02}})
    found = waiting(recipe, settled(recipe, 2), [2, 4])
    for one in found:
        assert one.outcomes["shared"].idle < one.outcomes["plain"].idle
        assert one.moved > 0
    lines = told(found, 4)
    assert [line.split()[0] for line in lines[2:4]] == ["2", "4"]
    assert ["this layout" in line for line in lines[2:4]] == [False, True]
    assert [one["ranks"] for one in facts(found)] == [2, 4]
    recipe = skewed(text, cache, batch_size=4, layout={"servers": {"tile": 4, "tolerance": 0.02, "buffer_bytes": 8}})
    (bound,) = waiting(recipe, settled(recipe, 2), [2])
    assert bound.moved == 0
    assert "and the buffer has 8: " in facts([bound])[0]["reason"]
    assert any(line.startswith("  the first plan of 2 that is not as asked for: the e") for line in told([bound], 2))


def test_halves_are_those_that_a_block_takes() -> None:
    assert halves([(1, 2), (3,), (4,)]) == ((1, 2, 3), (4,))
    assert halves([(1, 2)]) == ((1, 2),)
    assert lengths(np.array([0, 0, 0, 1, 2, 2])) == (3, 1, 2)


def test_windows_are_refused(text: Path, cache: Path) -> None:
    recipe = skewed(text, cache, model=ranked.MODEL | {"sliding_window": 8})
    with pytest.raises(UsageError, match="sliding windows"):
        waiting(recipe, settled(recipe, 2), [2])


@pytest.mark.ranks
def test_rehearse_tells_it_before_it_rehearses() -> None:
    words = ["rehearse", "methods/distca", "--ranks", "2", "--documents", "--set", 'data.tokenizer="bytes"']
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    head, *rest = done.output.splitlines()
    assert head.startswith("documents: ")
    assert "this layout" in rest[1]
    assert rest[-1].startswith("The layout computes what one process computes")
