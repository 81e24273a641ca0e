"""Another policy for other blocks: which blocks a rule names, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core import recipe as recipes
from lmworks.core.errors import RecipeError
from lmworks.model.sizes import BlockBytes
from lmworks.train.by_block import ByBlock, Rule
from lmworks.train.saved import Keep, Recompute
from tests.train import toy


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4))
def test_ranges_name_what_they_say(pairs: list[tuple[int, int]]) -> None:
    ranges = [(min(pair), max(pair)) for pair in pairs]
    rule = Rule(blocks=", ".join(f"{a}-{b}" if a != b else str(a) for a, b in ranges), policy=Keep())
    expected = {block for a, b in ranges for block in range(a, b + 1)}
    assert {block for block in range(20) if rule.names(block)} == expected
    assert Rule(blocks=tuple(sorted(expected)), policy=Keep()).names(min(expected))


def test_open_ranges() -> None:
    assert [b for b in range(6) if Rule(blocks="-2, 4-", policy=Keep()).names(b)] == [0, 1, 2, 4, 5]


@pytest.mark.parametrize("blocks", ["", "a", "1,,2", "-", "3-1", "1 2", "0--2", ()])
def test_what_names_no_blocks_is_refused(blocks: Any) -> None:
    with pytest.raises(ValueError, match="blocks"):
        Rule(blocks=blocks, policy=Keep())


RULE = {"blocks": "0", "policy": "recompute"}


@pytest.mark.parametrize(
    ("saved", "path", "words"),
    [
        ({"rules": []}, "saved.rules", "none"),
        ({"rules": [{"blocks": "1-2", "policy": "recompute"}]}, "saved.rules.0.blocks", "names block 2"),
        ({"rules": [RULE, {"blocks": "-1", "policy": "recompute"}]}, "saved.rules.1.blocks", "stands in rules.0"),
        ({"rules": [{"blocks": "0-", "policy": "keep"}], "rest": "recompute"}, "saved.rest", "no effect"),
        ({"rules": [RULE], "rest": {"use": "by-block", "rules": [RULE]}}, "saved.rest", "does not stand in"),
        ({"rules": [{"blocks": "0", "policy": "offload"}]}, "saved.rules.0.policy.last", "nothing would go out"),
        ({"rules": [{"blocks": "2-1", "policy": "recompute"}]}, "saved.rules.0", "write 1-2"),
        ({"rules": [{"blocks": "x", "policy": "recompute"}]}, "saved.rules.0", "names no blocks"),
        ({"rules": [{"blocks": "0", "policy": "recompue"}]}, "saved.rules.0.policy.use", "did you mean 'recompute'"),
    ],
)
def test_mistakes_are_told_with_their_place(
    saved: dict[str, Any], path: str, words: str, text: Path, cache: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        toy.recipe(text, cache, saved={"use": "by-block", **saved})
    assert [(p.path, words in p.text) for p in caught.value.problems] == [(path, True)]


def test_it_survives_being_written_out(text: Path, cache: Path) -> None:
    rules = [
        {"blocks": "0", "policy": {"use": "recompute", "keep": "products"}},
        {"blocks": [1], "policy": "recompute"},
    ]
    made = toy.recipe(text, cache, saved={"use": "by-block", "rules": rules})
    import tomllib

    assert recipes.decode(tomllib.loads(recipes.dump(made))) == made


def test_each_block_is_told_by_its_own_policy() -> None:
    made = ByBlock(rules=(Rule(blocks="1", policy=Recompute()),))
    blocks = [BlockBytes(number=n, whole=100 + n, entrance=10, products=30) for n in (0, 1, 2)]
    held = made.held(blocks)
    assert held is not None
    assert [(h.waiting, h.working) for h in held] == [(100, 0), (10, 91), (102, 0)]
    assert [made.again(n) for n in range(3)] == [False, True, False]


def test_a_run_learns_the_same(text: Path, cache: Path, tmp_path: Path) -> None:
    saved = {"use": "by-block", "rules": [RULE], "rest": {"use": "recompute", "keep": "products"}}
    plain, _ = toy.train(toy.recipe(text, cache, steps=3), tmp_path / "plain")
    mixed, report = toy.train(toy.recipe(text, cache, steps=3, saved=saved), tmp_path / "mixed")
    assert toy.learned(plain) == toy.learned(mixed)
    assert [row["saved_bytes"] > 0 for row in report.rows if "saved_bytes" in row] == [True]
