"""DistCA's layouts: what they become, what is refused, the bound, and that runs are those of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core import recipe as recipes
from lmworks.core.errors import RecipeError
from lmworks.methods.distca import document_bytes, hidden_shards
from lmworks.model.checkpoint import complete
from lmworks.parallel import gang
from lmworks.parallel.layout import Layout
from lmworks.parallel.servers import Servers
from lmworks.parallel.tasks import Piece, Sizes, arranged
from lmworks.train.build import settle
from tests.train import ranked


def recipe(*sets: str) -> Any:
    return recipes.load("methods/distca", verb="train", sets=sets)


def llama_34b() -> Sizes:
    """8192 values of queries, 16 key/value heads of 128, bf16; the bound of the paper counts no lse."""
    return Sizes(query=2 * 8192, keys=2 * 2 * 16 * 128, found=2 * 8192)


@pytest.mark.parametrize(
    ("ranks", "sets", "want"),
    [
        (1, [], {"dp_shard": 1}),
        (4, [], {"dp_shard": 4, "servers": Servers(tile=32)}),
        (8, ["layout.cp=2", "layout.tp=2"], {"cp": 2, "tp": 2, "dp_shard": 2, "servers": Servers(tile=32)}),
        (2, ["layout.tp=2"], {"tp": 2, "dp_shard": 1}),
        (
            2,
            ["layout.dp_shard=2", "layout.tolerance=0.0", "layout.keep=cache", "layout.ping_pong=false"],
            {"dp_shard": 2, "servers": Servers(tile=32, tolerance=0.0, keep="cache", ping_pong=False)},
        ),
    ],
)
def test_it_becomes_a_plain_layout(ranks: int, sets: list[str], want: dict[str, Any]) -> None:
    assert settle(recipe(*sets), ranks).layout == Layout(**want)


@pytest.mark.parametrize(
    ("sets", "ranks", "told"),
    [
        (["layout.cp=3"], 8, r"cp 3 = 3 ranks or a multiple, but 8 were started"),
        (["layout.dp_shard=3"], 2, r"dp_shard 3 = 3 ranks, but 2 were started"),
        (["model.sliding_window=64"], 2, r"the model's window is 64 tokens"),
        (["compile=true"], 2, r"works on blocks that are not compiled"),
        (["layout.link=1e9"], 2, r"layout\.link: has no effect without rate"),
        (["layout.rate=1e12"], 2, r"layout\.rate: has no effect without link"),
        (["layout.link=1e6", "layout.rate=1e12"], 2, r"layout\.link: a document could be shared by 0 ranks .* Legal: "),
        (["micro_batch_size=1", "layout.ping_pong=true"], 2, r"needs two rows or more"),
    ],
)
def test_what_cannot_be_or_does_not_pay_is_refused(sets: list[str], ranks: int, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        settle(recipe(*sets), ranks)


def test_the_link_that_is_asked_for_is_the_slowest_that_is_taken() -> None:
    with pytest.raises(RecipeError) as refused:
        recipe("layout.link=1e6", "layout.rate=1e12")
    asked = float(str(refused.value).split("a link of ")[1].split(" bytes")[0])
    assert recipe(f"layout.link={asked * 1.01}", "layout.rate=1e12").layout.cp == 1
    with pytest.raises(RecipeError, match="too slow"):
        recipe(f"layout.link={asked * 0.99}", "layout.rate=1e12")


@pytest.mark.parametrize(("gigabyte", "want"), [(1e9, 29.1), (2**30, 31.65)])
def test_the_bound_of_the_paper(gigabyte: float, want: float) -> None:
    """Llama 34B, 1320 x 2^20 FLOPs of linear work per token and block at half of 990 TFLOP/s, 50 GB/s."""
    seconds = 1320 * 2**20 / (0.5 * 990e12)
    assert hidden_shards(seconds, 50 * gigabyte, llama_34b()) == pytest.approx(want, abs=0.05)


@given(st.integers(1, 20), st.integers(1, 30), st.floats(1e-6, 1e-3))
def test_at_the_bound_bytes_take_as_long_as_linear_work(shards: int, tile: int, seconds: float) -> None:
    sizes, length = llama_34b(), shards * tile
    link = (sizes.query + sizes.keys * (shards + 1) / 2) / seconds
    assert hidden_shards(seconds, link, sizes) == pytest.approx(shards)
    assert document_bytes(length, shards, sizes) == pytest.approx(length * seconds * link)


@given(st.integers(1, 6), st.integers(1, 9))
def test_bytes_of_a_document_in_equal_shards_are_those_of_its_plan(shards: int, tile: int) -> None:
    """The document lies on rank 0, its shards are served by ranks 1, 2, ..."""
    sizes, length = llama_34b(), shards * tile
    tasks = [(0, i * tile, (i + 1) * tile, i + 1) for i in range(shards)]
    plan = arranged([Piece(0, 0, length, 0, 0)], tasks, shards + 1)
    assert sum(map(sum, plan.dispatch_bytes(sizes))) == pytest.approx(document_bytes(length, shards, sizes))


@pytest.mark.ranks
def test_a_run_on_two_ranks_is_the_run_of_one_and_goes_on(text: Path, cache: Path, tmp_path: Path) -> None:
    """Packed documents, grouped heads; stopped in the middle, then resumed as the plain layout that it became."""
    picked = {"layout": {"use": "distca", "tolerance": 0.0, "tile": 4}}
    gang.run(ranked.train, 2, ranked.table(text, cache, **picked), str(tmp_path / "two"))
    gang.run(ranked.train, 1, ranked.table(text, cache), str(tmp_path / "one"))
    assert ranked.losses(tmp_path / "two") == pytest.approx(ranked.losses(tmp_path / "one"), rel=1e-5)
    kept = recipes.load(str(tmp_path / "two" / "recipe.toml"), verb="train")
    assert kept.layout == Layout(dp_shard=2, servers=Servers(tolerance=0.0, tile=4))
    whole = ranked.losses(tmp_path / "two")
    plain = ranked.table(text, cache, layout={"dp_shard": 2, "servers": {"tolerance": 0.0, "tile": 4}})
    middle = complete(tmp_path / "two" / "checkpoints")[0]
    notes = gang.run(ranked.train, 2, plain, str(tmp_path / "two"), str(middle))
    assert any("going on from step 5" in note for note in notes[0])
    assert ranked.losses(tmp_path / "two") == whole
