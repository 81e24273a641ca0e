"""Optional packages: imported where they are used, with an error that says what to install."""

from __future__ import annotations

import importlib
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
        raise MissingExtra(
            f"the package '{root}' is not installed" + (f", and {why} needs it" if why else ""),
            next_step=f"pip install 'lmworks[{extra}]'",
        ) from error
