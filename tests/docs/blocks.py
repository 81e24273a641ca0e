"""The code blocks of README.md, CONTRIBUTING.md, recipes/, benchmarks/ and docs/, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("recipes/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("docs/**/*.md")]
)
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[a-z]*)[^\n]*\n(?P<body>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
EXIT = re.compile(r"#\s*exit (\d)\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced code block: where it stands and what is in it."""

    page: str
    line: int
    language: str
    body: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a bash block, and the exit code that its comment promises (`# exit 2`), 0 without one."""

    page: str
    line: int
    words: tuple[str, ...]
    code: int

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {shlex.join(self.words)}"[:90]

    @property
    def program(self) -> str:
        """The program's name, wherever it lies; settings of the environment before it are left out."""
        first = next(word for word in self.words if "=" not in word)
        return first if first.startswith(".ci/") else first.rpartition("/")[2]


def blocks() -> list[Block]:
    """Every fenced block of every page, in order."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(str(page.relative_to(ROOT)), line, match["language"], match["body"]))
    return found


def commands() -> list[Command]:
    """Every command of every bash block, in order; a line that ends with a backslash goes on in the next."""
    return [command for block in blocks() if block.language == "bash" for command in _commands(block)]


def _commands(block: Block) -> Iterator[Command]:
    lines = re.sub(r"\\\n", "  ", block.body).splitlines()
    for offset, line in enumerate(lines, start=1):
        words = tuple(shlex.split(line, comments=True))
        if words:
            match = EXIT.search(line)
            yield Command(block.page, block.line + offset, words, int(match[1]) if match else 0)
