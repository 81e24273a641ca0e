"""Optional packages: imported where they are used, with an error that says what to install."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from lmworks.core.errors import MissingExtra


def need(module: str, *, extra: str, why: str = "") -> Any:
    """Import an optional package or say which extra brings it.

    Raises MissingExtra (exit 2) when the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        root = module.partition(".")[0]
        if error.name is not None and error.name.partition(".")[0] != root:
            raise
        raise _missing(root, extra, why) from error


def must_be_there(module: str, *, extra: str, why: str = "") -> None:
    """Raise MissingExtra when the package is not installed, without importing it: early, and in no time."""
    root = module.partition(".")[0]
    if importlib.util.find_spec(root) is None:
        raise _missing(root, extra, why)


def _missing(root: str, extra: str, why: str) -> MissingExtra:
    return MissingExtra(
        f"the package '{root}' is not installed" + (f", and {why} needs it" if why else ""),
        next_step=f"pip install 'lmworks[{extra}]'",
    )
