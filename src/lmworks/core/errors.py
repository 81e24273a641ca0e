"""Every error a person can cause or meet, in one tree.

    LmworksError                exit 1   something failed; says what, where, what is legal, what to do next
    ├── UsageError              exit 2   the command or its arguments
    │   ├── RecipeError         exit 2   one or more settings of a recipe, all reported at once
    │   └── MissingExtra        exit 2   an optional package is needed here
    ├── DataError               exit 1   documents, shards, tokenizers
    ├── CheckpointError         exit 1   a checkpoint is missing, damaged or of another model
    ├── ExportError             exit 1   an exported model is not the model that was exported
    ├── NonFinite               exit 1   loss or gradient is inf or nan; nothing was updated
    ├── OutOfMemory             exit 1   a device or the machine has no memory left; what would fit
    └── Stopped                 exit 3   a limit or a signal ended the run; it can be resumed

`assert` is kept for our own bugs. A person never sees a stack trace for their own mistake.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class LmworksError(Exception):
    """An error that speaks to a person: what happened, where, what is legal, what to do next."""

    exit_code = 1

    def __init__(
        self, what: str, *, where: str | None = None, legal: str | None = None, next_step: str | None = None
    ) -> None:
        self.what = what
        self.where = where
        self.legal = legal
        self.next_step = next_step
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.legal:
            lines.append(f"  legal: {self.legal}")
        if self.next_step:
            lines.append(f"  next:  {self.next_step}")
        return "\n".join(lines)


class UsageError(LmworksError):
    """The command line asks for something that does not exist or does not fit."""

    exit_code = 2


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong in a recipe: the dotted path of the setting and a sentence."""

    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}" if self.path else self.text


class RecipeError(UsageError):
    """A recipe that cannot be run. Holds every problem found, not only the first."""

    def __init__(self, problems: Sequence[Problem], *, source: str = "recipe") -> None:
        self.problems = tuple(problems)
        self.source = source
        count = len(self.problems)
        super().__init__(f"{count} problem{'s' if count != 1 else ''} in {source}")

    def __str__(self) -> str:
        return "\n".join([self.what, *(f"  {problem}" for problem in self.problems)])


class MissingExtra(UsageError):
    """An optional package is needed for what was asked."""


class DataError(LmworksError):
    """Documents, token shards or a tokenizer that cannot be used."""


class CheckpointError(LmworksError):
    """A checkpoint that is missing, incomplete, damaged, or of another model or run."""


class ExportError(LmworksError):
    """The exported model does not answer as the original does."""


class NonFinite(LmworksError):
    """A loss or a gradient is not finite. The update was not made."""


class OutOfMemory(LmworksError):
    """A run does not fit into the memory of its device, or of the machine."""


class Stopped(LmworksError):
    """The run was asked to stop, saved itself, and can be resumed."""

    exit_code = 3


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` most likely meant, or None when none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence: '; did you mean 'x'?' when a known name is close, '.' otherwise."""
    match = nearest(name, known)
    return f"; did you mean '{match}'?" if match else "."
