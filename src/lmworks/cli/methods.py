"""lmworks methods: the ledger of published methods, and every part by slot."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lmworks.cli.console import answer, table


def methods(
    name: Annotated[str | None, typer.Argument(help="A method (its page) or a part (its settings).")] = None,
    slot: Annotated[str | None, typer.Option(help="The parts of this slot, plain and published.")] = None,
    parts: Annotated[bool, typer.Option("--parts", help="Every part of every slot.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
) -> None:
    """List the published methods with what was seen of them, or the parts that recipes are made of.

    Example: lmworks methods --slot optimizer
    """
    from lmworks.core.papers import METHODS

    if name is None:
        _parts(slot, as_json=as_json) if parts or slot else _ledger(as_json=as_json)
    elif name in METHODS and slot is None:
        _method(name, as_json=as_json)
    else:
        _part(name, slot, as_json=as_json)


def _ledger(*, as_json: bool) -> None:
    from lmworks.prove.ledger import entries

    found = list(entries())
    rows = [[e.name, str(e.method.year), e.method.line, ", ".join(e.method.fills), e.state] for e in found]
    text = table(rows, header=["method", "year", "what it does", "fills", "seen here"])
    hint = "lmworks methods NAME shows a page; --parts lists everything a recipe can name."
    answer([e.to_json() for e in found], as_json=as_json, text=f"{text}\n\n{hint}")


def _parts(slot: str | None, *, as_json: bool) -> None:
    from lmworks.core import catalogue

    shelves = {slot: catalogue.shelf(slot)} if slot is not None else catalogue.SLOTS
    listed = [
        {
            "slot": key,
            "name": part,
            "line": entry.line,
            "default": part == shelf.default,
            "published": entry.path.startswith("methods."),
        }
        for key, shelf in shelves.items()
        for part, entry in shelf.parts.items()
    ]
    marks = [("*" if row["default"] else "") + ("+" if row["published"] else "") for row in listed]
    rows = [
        [str(row["slot"]), f"{row['name']} {mark}".rstrip(), str(row["line"])]
        for row, mark in zip(listed, marks, strict=True)
    ]
    text = table(rows, header=["slot", "part", "what it is"])
    hint = "* taken when a recipe names none.  + a published method.  lmworks methods NAME shows the settings."
    answer(listed, as_json=as_json, text=f"{text}\n\n{hint}")


def _method(name: str, *, as_json: bool) -> None:
    from lmworks.prove.ledger import entry, page, parts_of

    found = entry(name)
    method = found.method
    lines = [f"{name}: {method.title} ({method.year})", f"fills: {', '.join(method.fills)}   {found.state}", ""]
    value = found.to_json()
    if method.planned:
        lines.append(f"Planned: {method.line}.")
    else:
        value |= {"page": page(method), "parts": []}
        lines.append(value["page"])
        for slot, part in parts_of(method):
            settings = _settings(slot, part)
            value["parts"].append({"slot": slot, "name": part, "settings": settings})
            lines += ["", f'## {slot} = {{ use = "{part}" }}', "", _settings_table(settings)]
        lines += ["", *_claims(found.claims), "", *_evidence(name, value["evidence"])]
    answer(value, as_json=as_json, text="\n".join(lines))


def _claims(claims: list[dict[str, Any]]) -> list[str]:
    lines = ["## Claims", ""]
    for claim in claims:
        lines += [f"{claim['name']}: {claim['statement']}", f"    {claim['figure']}, {claim['condition']}"]
        lines += [f"    {claim['source']}"]
        lines += [f"    not tested here: {claim['untested']}"] if claim.get("untested") else []
    return lines


def _evidence(name: str, evidence: dict[str, Any] | None) -> list[str]:
    from lmworks.prove.report import finding_lines

    if evidence is None:
        return ["## Evidence", "", f"None yet: lmworks prove {name} --save makes some."]
    lines = ["## Evidence", "", f"{evidence['grade']}, {evidence['label']}, {evidence['date']}, {evidence['commit']}"]
    if evidence["stale"]:
        lines.append(f"stale: changed since: {', '.join(evidence['stale'])}")
    return [*lines, "", *finding_lines(evidence)]


def _settings(slot: str, part: str) -> list[dict[str, str]]:
    from lmworks.core import catalogue
    from lmworks.core.settings import settings

    return [vars(s) for s in settings(catalogue.resolve(catalogue.SLOTS[slot].parts[part].path))]


def _settings_table(found: list[dict[str, str]]) -> str:
    rows = [[s["name"], s["default"], s["kind"], s["help"].partition("\n")[0]] for s in found]
    return table(rows, header=["setting", "default", "type", "meaning"]) if rows else "It has no settings."


def _part(name: str, slot: str | None, *, as_json: bool) -> None:
    from lmworks.core import catalogue
    from lmworks.core.errors import UsageError, did_you_mean
    from lmworks.core.papers import METHODS

    places = [key for key, shelf in catalogue.SLOTS.items() if name in shelf.parts and slot in (None, key)]
    if not places:
        known = [*METHODS, *(part for shelf in catalogue.SLOTS.values() for part in shelf.parts)]
        raise UsageError(
            f"no part is called '{name}'{did_you_mean(name, known)}", next_step="lmworks methods lists them"
        )
    part = catalogue.SLOTS[places[0]].parts[name]
    found = _settings(places[0], name)
    doc = (catalogue.resolve(part.path).__doc__ or "").strip()
    value: dict[str, Any] = {"name": name, "slot": places[0], "line": part.line, "settings": found}
    text = f"{name}: {part.line}\nfills: {places[0]}\n\n{doc}\n\n{_settings_table(found)}"
    owner = next((m for m, method in METHODS.items() if method.module and part.path.startswith(method.module)), None)
    if owner is not None:
        value["method"] = owner
        text += f"\n\nfrom the method {owner}: lmworks methods {owner}"
    answer(value, as_json=as_json, text=text)
