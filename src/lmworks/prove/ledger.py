"""The ledger: what is known of each method - page, parts, claims, evidence. Read from text; torch is not loaded."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmworks.core import catalogue
from lmworks.core.errors import UsageError, did_you_mean
from lmworks.core.papers import METHODS, Method
from lmworks.prove.evidence import Evidence, evidence_of, page_file, proof_file

HEADINGS = ("What it does", "How it works", "When to use it", "Differences", "Limits")
"""Every page has these, in this order."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method in the ledger."""

    name: str
    method: Method
    claims: list[dict[str, Any]]
    """From its proof; empty while it has none."""
    evidence: list[Evidence]
    """Oldest first."""

    @property
    def state(self) -> str:
        """'planned', 'no evidence yet', or what its newest evidence found."""
        if self.method.planned:
            return "planned"
        return self.evidence[-1].summary() if self.evidence else "no evidence yet"

    def to_json(self) -> dict[str, Any]:
        """For --json and scripts."""
        newest = self.evidence[-1] if self.evidence else None
        return {
            "name": self.name,
            "title": self.method.title,
            "year": self.method.year,
            "line": self.method.line,
            "fills": list(self.method.fills),
            "planned": self.method.planned,
            "state": self.state,
            "claims": self.claims,
            "evidence": None
            if newest is None
            else {
                "file": newest.path.name,
                "date": newest.date,
                "commit": newest.commit,
                "grade": newest.content["grade"],
                "label": newest.content["label"],
                "stale": newest.stale(),
                "findings": newest.findings,
            },
        }


def entry(name: str, folder: Path | None = None) -> Entry:
    """The ledger's entry of a method, with its shipped evidence or that in `folder`. Raises UsageError with the nearest
    name."""
    if name not in METHODS:
        raise UsageError(f"no method is called '{name}'{did_you_mean(name, METHODS)}", next_step="lmworks methods")
    path = proof_file(name)
    claims = tomllib.loads(path.read_text(encoding="utf-8")).get("claims", []) if path.is_file() else []
    return Entry(name=name, method=METHODS[name], claims=claims, evidence=evidence_of(name, folder))


def entries(folder: Path | None = None) -> Iterator[Entry]:
    """All methods, by name, with their shipped evidence or that in `folder`."""
    return (entry(name, folder) for name in METHODS)


def source_file(method: Method) -> Path:
    """The file whose docstring is the method's page. Raises UsageError for a planned one."""
    if method.module is None:
        raise UsageError(f"'{method.title}' is planned: it has no page yet")
    return page_file(method.module)


def page(method: Method) -> str:
    """The method's page in Markdown: the docstring of its file."""
    tree = ast.parse(source_file(method).read_text(encoding="utf-8"))
    return ast.get_docstring(tree) or ""


def parts_of(method: Method) -> list[tuple[str, str]]:
    """(slot, part) of everything of the method that a recipe can name."""
    if method.module is None:
        return []
    return [
        (slot, name)
        for slot, shelf in catalogue.SLOTS.items()
        for name, part in shelf.parts.items()
        if part.path.partition(":")[0] == method.module or part.path.startswith(f"{method.module}.")
    ]
