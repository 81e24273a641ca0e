"""lmworks methods: every part by slot, or one part with its settings."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lmworks.cli.console import answer, table


def methods(
    name: Annotated[str | None, typer.Argument(help="A part's name: its settings are shown.")] = None,
    slot: Annotated[str | None, typer.Option(help="Only the parts of this slot.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
) -> None:
    """List the parts that recipes are made of, or show one part's settings.

    Example: lmworks methods --slot optimizer
    """
    from lmworks.core import catalogue

    if name is not None:
        _show(name, slot, as_json=as_json)
        return
    shelves = {slot: catalogue.shelf(slot)} if slot is not None else catalogue.SLOTS
    listed = [
        {"slot": key, "name": part, "line": entry.line, "default": part == shelf.default}
        for key, shelf in shelves.items()
        for part, entry in shelf.parts.items()
    ]
    rows = [[str(row["slot"]), f"{row['name']}{' *' if row['default'] else ''}", str(row["line"])] for row in listed]
    text = table(rows, header=["slot", "part", "what it is"])
    answer(
        listed,
        as_json=as_json,
        text=f"{text}\n\n* taken when a recipe names none.  lmworks methods NAME shows the settings.",
    )


def _show(name: str, slot: str | None, *, as_json: bool) -> None:
    from lmworks.core import catalogue
    from lmworks.core.errors import UsageError, did_you_mean
    from lmworks.core.settings import settings

    places = [key for key, shelf in catalogue.SLOTS.items() if name in shelf.parts and slot in (None, key)]
    if not places:
        known = [part for shelf in catalogue.SLOTS.values() for part in shelf.parts]
        raise UsageError(
            f"no part is called '{name}'{did_you_mean(name, known)}", next_step="lmworks methods lists them"
        )
    part = catalogue.SLOTS[places[0]].parts[name]
    cls = catalogue.resolve(part.path)
    found = settings(cls)
    rows = [[s.name, s.default, s.kind, s.help.partition("\n")[0]] for s in found]
    body = table(rows, header=["setting", "default", "type", "meaning"]) if rows else "It has no settings."
    value: dict[str, Any] = {"name": name, "slot": places[0], "line": part.line, "settings": [vars(s) for s in found]}
    doc = (cls.__doc__ or "").strip()
    answer(value, as_json=as_json, text=f"{name}: {part.line}\nfills: {places[0]}\n\n{doc}\n\n{body}")
