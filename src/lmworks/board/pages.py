"""A method's page, which is Markdown, as a tree of plain values: the browser gets names and texts, never HTML."""

from __future__ import annotations

from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

Node = str | list[Any]
"""A text, or [tag, attributes, children]."""

TAGS = {
    "h1": "h3",
    "h2": "h3",
    "h3": "h4",
    "h4": "h5",
    "p": "p",
    "ul": "ul",
    "ol": "ol",
    "li": "li",
    "em": "em",
    "strong": "strong",
    "blockquote": "blockquote",
    "table": "table",
    "thead": "thead",
    "tbody": "tbody",
    "tr": "tr",
    "th": "th",
    "td": "td",
    "a": "a",
    "hr": "hr",
}
"""What the page may hold, and what stands for it below a heading of the second level."""
SCHEMES = ("https://", "http://")


def tree(markdown: str) -> list[Node]:
    """The page as a list of nodes. HTML in it is text, and a link that is not http(s) is text too."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    return _nodes(parser.parse(markdown))


def _nodes(tokens: list[Token]) -> list[Node]:
    root: list[Node] = []
    stack: list[list[Node]] = [root]
    for token in tokens:
        if token.nesting == 1:
            children: list[Node] = []
            stack[-1].append([TAGS.get(token.tag, "span"), _attributes(token), children])
            stack.append(children)
        elif token.nesting == -1:
            stack.pop()
        else:
            stack[-1].extend(_leaf(token))
    return root


def _leaf(token: Token) -> list[Node]:
    if token.type == "inline":
        return _nodes(token.children or [])
    if token.type in ("fence", "code_block"):
        return [["pre", {}, [token.content]]]
    if token.type == "code_inline":
        return [["code", {}, [token.content]]]
    if token.type == "hr":
        return [["hr", {}, []]]
    if token.type in ("softbreak", "hardbreak"):
        return [" "]
    return [token.content] if token.content else []


def _attributes(token: Token) -> dict[str, str]:
    href = str(token.attrs.get("href", ""))
    return {"href": href} if token.tag == "a" and href.startswith(SCHEMES) else {}
