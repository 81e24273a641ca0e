"""Where lmworks keeps what can be made again: token shards, fetched models, what runs taught the planner."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """$LMWORKS_HOME, or lmworks/ below the user's cache folder ($XDG_CACHE_HOME, ~/.cache)."""
    named = os.environ.get("LMWORKS_HOME")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmworks"


def models_folder() -> Path:
    """Where `lmworks fetch` puts models; a name below it is as good as a path."""
    return home() / "models"
