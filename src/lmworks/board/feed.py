"""New evidence as an Atom feed (RFC 4287), for readers that people subscribe with."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice
from xml.etree import ElementTree

from lmworks.prove import report
from lmworks.prove.evidence import Evidence, when

ATOM = "http://www.w3.org/2005/Atom"
MOST = 50
"""Entries, the newest."""
BAD = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 does not have."""


def atom(found: Iterable[tuple[str, Evidence]], base: str) -> bytes:
    """The feed of (method, evidence), newest first. `base`: where the board is, such as http://127.0.0.1:8472."""
    ElementTree.register_namespace("", ATOM)
    feed = ElementTree.Element(_name("feed"))
    newest = list(islice(found, MOST))
    _add(feed, "id", "tag:lmworks,2026:evidence")
    _add(feed, "title", "lmworks: new evidence")
    _add(feed, "updated", _moment(newest[0][1]) if newest else "2026-01-01T00:00:00Z")
    ElementTree.SubElement(_add(feed, "author"), _name("name")).text = "lmworks"
    _add(feed, "link", rel="self", href=f"{base}/feed.xml")
    _add(feed, "link", rel="alternate", href=f"{base}/")
    for method, evidence in newest:
        entry = _add(feed, "entry")
        _add(entry, "id", f"tag:lmworks,2026:evidence/{method}/{evidence.path.stem}")
        _add(entry, "title", f"{method}: {evidence.summary()}")
        _add(entry, "updated", _moment(evidence))
        _add(entry, "link", rel="alternate", href=f"{base}/#/methods/{method}")
        _add(entry, "content", "\n".join(_lines(evidence)), type="text")
    document: bytes = ElementTree.tostring(feed, encoding="utf-8", xml_declaration=True)
    return document


def _lines(evidence: Evidence) -> list[str]:
    content = evidence.content
    hardware = content["hardware"]
    made = f"{content['grade']}, {content['label']}, commit {evidence.commit}, {hardware['processor']}"
    return [made, "", *report.finding_lines(content)]


def _moment(evidence: Evidence) -> str:
    """Evidence knows its day; its number of the day, in minutes, orders what was made on one."""
    _, number = when(evidence.path)
    return f"{evidence.date}T00:{min(number, 59):02d}:00Z"


def _add(parent: ElementTree.Element, name: str, text: str | None = None, **attributes: str) -> ElementTree.Element:
    child = ElementTree.SubElement(parent, _name(name), {key: BAD.sub("", value) for key, value in attributes.items()})
    child.text = BAD.sub("", text) if text is not None else None
    return child


def _name(name: str) -> str:
    return f"{{{ATOM}}}{name}"
