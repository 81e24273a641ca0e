"""The ledger for the page: every published method with its claims and all evidence that is kept of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmworks.board.pages import tree
from lmworks.core import catalogue
from lmworks.core.errors import LmworksError
from lmworks.core.papers import METHODS
from lmworks.prove import report
from lmworks.prove.evidence import Evidence, when
from lmworks.prove.ledger import Entry, entries, entry, page, parts_of

VERDICTS = ("holds", "not seen", "contrary", "confounded", "refused")
"""In this order."""
FRESH = 5.0
"""Seconds for which the ledger is not read again."""


class Ledger:
    """The methods, read from the installed package and a folder of evidence."""

    def __init__(self, evidence: Path | None = None) -> None:
        self._folder = evidence
        self._entries: list[Entry] = []
        self._read = float("-inf")

    def entries(self) -> list[Entry]:
        """All methods; evidence that was added since is found. Raises LmworksError for what is no evidence."""
        if time.monotonic() - self._read >= FRESH:
            try:
                found = list(entries(self._folder))
                for evidence in (one for each in found for one in each.evidence):
                    evidence_facts(evidence)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                text = f"evidence cannot be read: {type(error).__name__}: {error}"
                raise LmworksError(text, where=str(self._folder), legal="files of lmworks prove --save") from error
            self._entries = found
            self._read = time.monotonic()
        return self._entries

    def rows(self) -> list[dict[str, Any]]:
        """A line for each method, with the words that a search looks in."""
        return [_row(found) for found in self.entries()]

    def method(self, name: str) -> dict[str, Any] | None:
        """A method's page, claims, parts with settings, and all evidence, newest first; None when there is none."""
        if name not in METHODS:
            return None
        found = entry(name, self._folder)
        method = found.method
        return {
            **_row(found),
            "page": [] if method.planned else tree(page(method)),
            "claims": found.claims,
            "parts": [
                {"slot": slot, "name": part, "line": catalogue.SLOTS[slot].parts[part].line}
                for slot, part in parts_of(method)
            ],
            "evidence": [evidence_facts(one) for one in reversed(found.evidence)],
        }

    def evidence(self) -> Iterator[tuple[str, Evidence]]:
        """All evidence of all methods, newest first, with the method's name."""
        found = [(one.name, evidence) for one in self.entries() for evidence in one.evidence]
        return iter(sorted(found, key=lambda pair: (when(pair[1].path), pair[0]), reverse=True))


def _row(found: Entry) -> dict[str, Any]:
    method = found.method
    newest = found.evidence[-1] if found.evidence else None
    claims = " ".join(f"{claim['name']} {claim['statement']} {claim['condition']}" for claim in found.claims)
    text = "" if method.planned else page(method)
    return {
        "name": found.name,
        "title": method.title,
        "year": method.year,
        "line": method.line,
        "fills": list(method.fills),
        "planned": method.planned,
        "state": found.state,
        "verdicts": _verdicts(found),
        "counts": dict(Counter(str(finding["verdict"]) for finding in newest.findings)) if newest else {},
        "claimed": len(found.claims),
        "date": newest.date if newest else None,
        "commit": newest.commit if newest else None,
        "grade": newest.content["grade"] if newest else None,
        "kept": len(found.evidence),
        "words": " ".join([found.name, method.title, str(method.year), method.line, *method.fills, claims, text]),
    }


def _verdicts(found: Entry) -> list[str]:
    """What a filter may ask for: the verdicts of the newest evidence, 'stale', 'no evidence yet' or 'planned'."""
    if found.method.planned:
        return ["planned"]
    if not found.evidence:
        return ["no evidence yet"]
    newest = found.evidence[-1]
    found_now = {str(finding["verdict"]) for finding in newest.findings}
    return [*(word for word in VERDICTS if word in found_now), *(["stale"] if newest.stale() else [])]


def evidence_facts(evidence: Evidence) -> dict[str, Any]:
    """One piece of evidence: what made it, what was found, every arm with its curves."""
    content = evidence.content
    return {
        "file": evidence.path.name,
        "date": evidence.date,
        "commit": evidence.commit,
        "summary": evidence.summary(),
        "stale": evidence.stale(),
        **{name: content.get(name) for name in ("grade", "label", "command", "versions", "hardware", "seeds")},
        **{name: content.get(name) for name in ("axis", "metric", "baseline", "confounded")},
        "findings": [
            {**dict(zip(FINDING, row, strict=True)), "word": finding["verdict"], "why": finding["why"]}
            for row, finding in zip(report.finding_rows(content), evidence.findings, strict=True)
        ],
        "arms": [
            {**dict(zip(ARM, row, strict=True)), "plain_name": arm["name"], "curves": _curves(arm)}
            for row, arm in zip(report.arm_rows(content), content["arms"], strict=True)
        ],
    }


FINDING = ("claim", "test", "seen", "interval", "bound", "could_see", "verdict")
ARM = ("name", "tuned", "tried", "steps", "metric", "seconds", "memory")


def _curves(arm: dict[str, Any]) -> list[list[list[float | None]]]:
    """The curves of an arm's runs that did not fail; None for what is not a number."""
    return [
        [[place, value if isinstance(value, int | float) else None] for place, value in run["curve"]]
        for run in arm["runs"]
        if run["failed"] is None
    ]
