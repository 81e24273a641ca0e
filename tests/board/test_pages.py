"""Markdown as a tree: HTML and hostile links stay text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.board.pages import TAGS, tree

ALLOWED = set(TAGS.values()) | {"pre", "code", "span"}


def tags(nodes: list[Any]) -> set[str]:
    """Every name of an element in a tree."""
    inner = [node for node in nodes if not isinstance(node, str)]
    return {node[0] for node in inner} | {tag for node in inner for tag in tags(node[2])}


def words(nodes: list[Any]) -> str:
    """The text of a tree."""
    return "".join(node if isinstance(node, str) else words(node[2]) for node in nodes)


def test_a_page() -> None:
    found = tree("One line.\n\n## How it works\n\nTake `b` *rows*:\n\n    a = b\n\n- x\n- [y](https://a.example/b)\n")
    assert found == [
        ["p", {}, ["One line."]],
        ["h3", {}, ["How it works"]],
        ["p", {}, ["Take ", ["code", {}, ["b"]], " ", ["em", {}, ["rows"]], ":"]],
        ["pre", {}, ["a = b\n"]],
        [
            "ul",
            {},
            [["li", {}, [["p", {}, ["x"]]]], ["li", {}, [["p", {}, [["a", {"href": "https://a.example/b"}, ["y"]]]]]]],
        ],
    ]


@pytest.mark.parametrize(
    "link", ["javascript:alert(1)", "data:text/html,x", "vbscript:x", "//evil.example", "/api/runs", "JAVASCRIPT:x"]
)
def test_only_links_to_other_pages_are_links(link: str) -> None:
    assert "href" not in str(tree(f"[here]({link})"))


@given(st.text(max_size=200))
def test_any_text_gives_elements_of_the_list_only(text: str) -> None:
    assert tags(tree(text)) <= ALLOWED


@pytest.mark.parametrize("html", ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a <b onclick=x>b</b>"])
def test_html_is_text(html: str) -> None:
    found = tree(html)
    assert tags(found) <= {"p"}
    assert words(found) == html
