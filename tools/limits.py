"""Hold every Python file and function to the limits of the house, and refuse names that say nothing.

A file has at most 400 lines and a function at most 60. Above that the place is listed; above 600 and 100 it fails.
Run as `python tools/limits.py [ROOT ...]`; exit 0 when the limits hold, 1 when they do not.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FILE_LINES, FILE_LINES_FAIL = 400, 600
FUNCTION_LINES, FUNCTION_LINES_FAIL = 60, 100
NAMELESS = {"utils", "util", "helpers", "helper", "common", "misc"}
ROOTS = ("src", "tests", "tools", "benchmarks", "docs")


@dataclass(frozen=True)
class Finding:
    """One place over a limit; `fails` tells whether the check stops there."""

    where: str
    what: str
    fails: bool

    def __str__(self) -> str:
        """As one line of the report."""
        return f"{'FAIL' if self.fails else 'long'}  {self.where}: {self.what}"


def look(path: Path) -> Iterator[Finding]:
    """Every finding in one file."""
    if NAMELESS & {part.removesuffix(".py") for part in path.parts}:
        yield Finding(str(path), "a name that says nothing about what is inside; name it for what it holds", True)
    text = path.read_text(encoding="utf-8")
    lines = text.count("\n")
    if lines > FILE_LINES:
        what = f"{lines} lines; a file has at most {FILE_LINES} ({FILE_LINES_FAIL} fail): split it by what it holds"
        yield Finding(str(path), what, lines > FILE_LINES_FAIL)
    for node in ast.walk(ast.parse(text, filename=str(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                what = f"{node.name} has {length} lines; a function has at most {FUNCTION_LINES}"
                yield Finding(
                    f"{path}:{node.lineno}", f"{what} ({FUNCTION_LINES_FAIL} fail)", length > FUNCTION_LINES_FAIL
                )


def main(roots: list[str]) -> int:
    """Print the findings under `roots`; 1 when one of them fails."""
    files = sorted(path for root in roots for path in Path(root).rglob("*.py"))
    findings = [finding for path in files for finding in look(path)]
    for finding in findings:
        print(finding)
    failing = sum(finding.fails for finding in findings)
    print(
        f"{len(files)} files: {failing} over a limit that fails, {len(findings) - failing} longer than they should be"
    )
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or [root for root in ROOTS if Path(root).is_dir()]))
