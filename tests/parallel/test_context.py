"""Attention of every engine over every order of tokens on three ranks, forward and backward, is dense attention."""

from __future__ import annotations

from functools import cache
from typing import Any, get_args

import numpy as np
import pytest
import torch

from lmworks.parallel import gang
from lmworks.parallel.layout import Engine, Layout, Order
from lmworks.parallel.traffic import of_context
from tests.parallel.divided import HEAD_DIM, Found, Rows, attended, dense

pytestmark = pytest.mark.ranks

RANKS = 3
FORMS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "own-keys": {"groups": 6},
    "window": {"window": 7},
    "window-alone": {"window": 20, "documents": False},
    "causal": {"documents": False},
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
}
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
CASES = {
    f"{engine}-{order}-{form}": Rows(engine=engine, order=order, **settings)
    for engine in get_args(Engine)
    for order in get_args(Order)
    for form, settings in FORMS.items()
}


@cache
def ran() -> dict[str, list[Found]]:
    """All cases on one gang."""
    found = gang.run(attended, RANKS, RANKS, list(CASES.values()))
    return {name: [seen[i] for seen in found] for i, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_divided_attention_is_dense_attention(name: str) -> None:
    rows = CASES[name]
    want, found = dense(rows), ran()[name]
    assert sorted(np.concatenate([seen.places for seen in found])) == list(range(rows.length))
    for seen in found:
        for tensor, own in seen.tensors.items():
            whole = want[tensor]
            worst = np.abs(own - whole[:, seen.places]).max() / np.abs(whole).max()
            assert worst <= BOUND[rows.dtype], tensor


@pytest.mark.parametrize("name", [name for name, rows in CASES.items() if not rows.documents])
def test_what_is_sent_is_what_the_formula_says(name: str) -> None:
    """Both passes; without documents nothing else is sent."""
    rows = CASES[name]
    ways = formula(rows)
    for seen in ran()[name]:
        assert sum(seen.bills.values()) == sum((*ways.forward, *ways.backward)) * 2 * rows.length / RANKS


@pytest.mark.parametrize("form", FORMS)
def test_the_fuller_way_has_the_ratio_of_heads(form: str) -> None:
    """Forward, N h + N sums for one way against 2 G h: half as full where every query head has keys of its own."""
    ring, own = CASES[f"ring-zigzag-{form}"], CASES[f"tokenring-zigzag-{form}"]
    value = own.dtype.itemsize
    heads, groups, sums = own.heads, own.groups, max(4, value) / (HEAD_DIM * value)
    assert max(formula(own).forward) / max(formula(ring).forward) == pytest.approx(heads * (1 + sums) / (2 * groups))
    billed = ran()[f"tokenring-zigzag-{form}"][0].bills
    way = {name: billed["cp", f"send {name}"] for name in ("forth", "back")}
    tokens = 2 * own.length / RANKS
    for i, name in enumerate(("forth", "back")):
        assert way[name] == tokens * (formula(own).forward[i] + formula(own).backward[i])
    assert ("cp", "send back") not in ran()[f"ring-zigzag-{form}"][0].bills


def formula(rows: Rows) -> Any:
    layout = Layout(dp_shard=1, cp=RANKS, context=rows.engine, order=rows.order)
    return of_context(layout, rows.heads, rows.groups, HEAD_DIM, value_bytes=rows.dtype.itemsize)
