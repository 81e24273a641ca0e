"""Mixtures by name: how many per cent of the rows come from which source. They are data files, as rules are.

    about = "..."            what it is of
    source = "..."           where the shares are from
    [shares]                 per cent by name of the reader; together 100
    commoncrawl = 75.8
    github = 24.2

Nothing is scaled behind a person's back: shares that do not come to 100, a source that no reader has and a reader that
no share names are errors.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lmworks.core.errors import DataError, did_you_mean
from lmworks.core.recipe import recipes_folder

ROUNDING = 0.15
"""How far the shares may come from 100: published ones are rounded to a tenth, each."""


def shipped() -> list[str]:
    """Names of the mixtures that lmworks ships."""
    return sorted(path.stem for path in (recipes_folder() / "mixtures").glob("*.toml"))


def mixture_file(name: str) -> Path:
    """The file of a shipped mixture, or the path itself."""
    return Path(name) if name.endswith(".toml") else recipes_folder() / "mixtures" / f"{name}.toml"


def shares_in(name: str) -> dict[str, float]:
    """Per cent by source. Raises DataError for a file that is missing or is no mixture."""
    path = mixture_file(name)
    if not path.is_file():
        raise DataError(f"no such mixture{did_you_mean(name, shipped())}", where=name, legal=_legal())
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"is not TOML: {error}", where=str(path)) from error
    shares = table.get("shares")
    if not isinstance(shares, dict) or not all(type(x) in (int, float) and x > 0 for x in shares.values()):
        raise DataError("is no mixture: [shares] must give each source a number above 0", where=str(path))
    whole = sum(shares.values())
    if abs(whole - 100) > ROUNDING:
        raise DataError(f"the shares come to {whole:g}, not to 100 per cent", where=str(path))
    return {source: float(share) for source, share in shares.items()}


def _legal() -> str:
    return f"{', '.join(shipped())}, or the path of a .toml file"


def misfits(name: str, shares: Mapping[str, float], labels: Sequence[str]) -> Iterator[str]:
    """What keeps readers of these names from being mixed so."""
    for source, share in shares.items():
        if source not in labels:
            yield f"{name} takes {share:g} % from '{source}', and no reader is called so{did_you_mean(source, labels)}"
    for label in labels:
        if label not in shares:
            yield f"{name} takes nothing from '{label}': leave the reader out. It takes from {', '.join(shares)}"
