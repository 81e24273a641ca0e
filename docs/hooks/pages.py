"""MkDocs hook: the pages of the reference, made from the code when the site is built.

    reference/commands.md   what every verb answers to --help
    reference/settings.md   every setting of every part, from the dataclasses and the docstrings below their fields
    reference/FOLDER.md     the modules of src/lmworks/FOLDER, for mkdocstrings
    methods/index.md        the ledger: every published method, and which settings a paper's parts are
    methods/NAME.md         a method's page: its docstring, settings, claims, evidence, and the picture of the evidence

Nothing of it is kept in the repository, so it cannot differ from the code.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import pkgutil
import re
import tempfile
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from lmworks.cli.app import app
from lmworks.core import catalogue
from lmworks.core.settings import settings
from lmworks.prove import report
from lmworks.prove.ledger import Entry, entries, page, parts_of

FOLDERS = (
    "core",
    "maths",
    "model",
    "data",
    "jobs",
    "parallel",
    "generate",
    "train",
    "plan",
    "evaluate",
    "serve",
    "make",
    "audit",
    "prove",
    "board",
    "mix",
    "guard",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {"commands": commands(), "settings": all_settings(), **{folder: modules(folder) for folder in FOLDERS}}
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    files.append(File.generated(config, "methods/index.md", content=ledger_page()))
    for entry in entries():
        if not entry.method.planned:
            files.append(File.generated(config, f"methods/{entry.name}.md", content=method_page(entry)))
            if entry.evidence:
                picture = _picture(entry.evidence[-1].content)
                files.append(File.generated(config, f"methods/{entry.name}.png", content=picture))
    return files


def ledger_page() -> str:
    """All methods with what was seen of them, and an index from papers to settings."""
    lines = ["# Methods", "", "Every published method that lmworks has or plans, and what was seen of its claims.", ""]
    lines += ["| method | year | what it does | fills | seen here |", "| --- | --- | --- | --- | --- |"]
    index = ["", "## From paper to settings", "", "| paper | settings |", "| --- | --- |"]
    for entry in entries():
        name = entry.name if entry.method.planned else f"[{entry.name}]({entry.name}.md)"
        fills = ", ".join(entry.method.fills)
        lines.append(f"| {name} | {entry.method.year} | {_cell(entry.method.line)} | {fills} | {entry.state} |")
        if not entry.method.planned:
            parts = [f"[`{part}`](../reference/settings.md#{slot}-{part})" for slot, part in parts_of(entry.method)]
            index.append(f"| {entry.method.title} ({entry.method.year}) | {', '.join(parts)} |")
    return "\n".join([*lines, *index])


def method_page(entry: Entry) -> str:
    """A method's page for the site."""
    title, _, body = page(entry.method).partition("\n")
    lines = [f"# {entry.name}", "", f"**{title}**", body, "", "## Settings", ""]
    for slot, part in parts_of(entry.method):
        cls = catalogue.resolve(catalogue.SLOTS[slot].parts[part].path)
        lines += [f'### `{slot}`: `use = "{part}"`', "", _doc(cls), "", *_table(cls)]
    lines += ["## Smallest run", "", "```bash", f"lmworks train methods/{entry.name}", "```", "", "## Claims", ""]
    lines += _markdown(
        ["claim", "figure", "statement", "condition", "source"],
        [[c["name"], c["figure"], c["statement"] + _untested(c), c["condition"], c["source"]] for c in entry.claims],
    )
    lines += ["## Evidence", ""]
    if not entry.evidence:
        return "\n".join([*lines, f"None yet. `lmworks prove {entry.name} --save` makes some."])
    newest = entry.evidence[-1]
    content = newest.content
    lines += [f"Grade {content['grade']}, {content['label']} on {newest.date} at commit {newest.commit}, "]
    lines += [f"{content['hardware']['processor']}, {content['hardware']['cores']} cores: `{newest.path.name}`.", ""]
    if newest.stale():
        lines += [f'!!! warning "Stale"\n    Changed since: {", ".join(newest.stale())}.', ""]
    lines += [f"![The metric along the axis, and differences by seed]({entry.name}.png)", ""]
    lines += _markdown(report.FINDING_HEADER, report.finding_rows(content))
    lines += _markdown(report.ARM_HEADER, report.arm_rows(content))
    return "\n".join(lines)


def _untested(claim: dict[str, typing.Any]) -> str:
    return f" *Not tested here: {claim['untested']}.*" if claim.get("untested") else ""


def _markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    cells = [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows]
    return [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}", *cells, ""]


def _picture(content: dict[str, typing.Any]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        report.draw(content, path)
        return path.read_bytes()


def commands() -> str:
    """A section for each verb with its help text."""
    group = typer.main.get_command(app)
    context = group.make_context("lmworks", [], resilient_parsing=True)
    return "\n".join(["# Commands", "", "What each verb answers to `--help`.", "", *_help(group, context, "lmworks")])


def _help(group: typing.Any, context: typing.Any, before: str) -> Iterator[str]:
    """The verbs of a group; a verb that is a group itself (tokenizer) is followed by its own."""
    for verb in group.list_commands(context):
        command = group.get_command(context, verb)
        below = command.make_context(verb, [], parent=context, resilient_parsing=True)
        below.terminal_width = 82
        yield from (f"## {before} {verb}", "", "```text", command.get_help(below).rstrip(), "```", "")
        if hasattr(command, "list_commands"):
            yield from _help(command, below, f"{before} {verb}")


def all_settings() -> str:
    """A section for each verb that runs a recipe, and one for each slot with its parts."""
    lines = ["# Settings", "", "Made from the dataclasses that recipes are decoded into.", ""]
    for verb, path in catalogue.VERBS.items():
        cls = catalogue.resolve(path)
        lines += [f'## A recipe with `do = "{verb}"`', "", _doc(cls), "", *_table(cls)]
        for name, below in _tables_inside(cls):
            lines += [f"### `[{name}]`", "", _doc(below), "", *_table(below)]
    for slot, shelf in catalogue.SLOTS.items():
        lines += [f"## Slot `{slot}` {{ #slot-{slot} }}", "", f"{shelf.line[0].upper()}{shelf.line[1:]}.", ""]
        for name, part in shelf.parts.items():
            cls = catalogue.resolve(part.path)
            taken = " Taken when a recipe names none." if name == shelf.default else ""
            lines += [f'### `use = "{name}"` {{ #{slot}-{name} }}', "", f"{_doc(cls)}{taken}", "", *_table(cls)]
            for inner, below in _tables_inside(cls):
                lines += [f"`{inner}` is a table: {_doc(below)}", "", *_table(below)]
    return "\n".join(lines)


def modules(folder: str) -> str:
    """One mkdocstrings entry per public module of a folder."""
    package = importlib.import_module(f"lmworks.{folder}")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_"))
    entries = [f"::: lmworks.{folder}.{name}\n" for name in names]
    return "\n".join([f"# lmworks.{folder}", "", inspect.cleandoc(package.__doc__ or ""), "", *entries])


def _doc(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or "")


def _table(cls: type) -> list[str]:
    made = dataclasses.MISSING
    defaults = {
        field.name: field.default if field.default_factory is made else field.default_factory()
        for field in dataclasses.fields(cls)
    }
    rows = [
        f"| `{s.name}` | {_kind(s.kind)} | {_default(s.default, defaults[s.name])} | {_cell(s.help)} |"
        for s in settings(cls)
    ]
    if not rows:
        return ["It has no settings.", ""]
    return ["| setting | value | default | meaning |", "| --- | --- | --- | --- |", *rows, ""]


PLAIN = {
    "PositiveInt": "int > 0",
    "Positive": "int > 0",
    "NonNegativeInt": "int >= 0",
    "PositiveFloat": "float > 0",
    "NonNegativeFloat": "float >= 0",
    "Fraction": "0 to 1",
    "Beta": "0 to 1",
    "Sizes": "int, or one per block",
    "str": "text",
    "bool": "true, false",
}
"""What a person writes for a type of ours."""


def _kind(kind: str) -> str:
    """A field's annotation in the words of a recipe: parts link to their slot, alternatives are listed."""
    kind = re.sub(r"\s*\|\s*None$", "", kind)
    slot = re.search(r"Slot\('(\w+)'\)", kind)
    if slot:
        link = f"[{slot[1]}](#slot-{slot[1]})"
        return f"list of {link}" if kind.startswith("Annotated[tuple") else link
    literal = re.fullmatch(r"Literal\[(.*)\]", kind)
    if literal:
        return ", ".join(f"`{choice.strip()}`" for choice in literal[1].replace("'", '"').split(","))
    many = re.fullmatch(r"tuple\[(.*), \.\.\.\]", kind)
    if many:
        return f"list of {_kind(many[1])}"
    limited = re.fullmatch(r"Annotated\[(\w+), (.*)\]", kind)
    if limited:
        return f"{_kind(limited[1])} {_limits(limited[2])}"
    fixed = re.fullmatch(r"tuple\[(.*)\]", kind)
    if fixed:
        return f"[{', '.join(_kind(item.strip()) for item in fixed[1].split(','))}]"
    if kind[:1].isupper() and kind not in PLAIN:
        return "a table"
    return PLAIN.get(kind, kind)


def _limits(text: str) -> str:
    """'Gt(0)' as '> 0', 'Interval(ge=0, lt=1)' as '>= 0, < 1'."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = re.findall(r"(gt|ge|lt|le)(?:=|\()([-\w.]+)", text.lower())
    return ", ".join(f"{signs[sign]} {number.replace('_', ' ')}" for sign, number in found)


def _default(text: str, value: object) -> str:
    """A default as it stands in a recipe; parts by their name."""
    if text in ("", "required"):
        return text
    if dataclasses.is_dataclass(value):
        name = catalogue.name_of(value)
        return f'`"{name}"`' if name else "each as below"
    if isinstance(value, tuple):
        parts = [
            _default("part", item) if dataclasses.is_dataclass(item) else f"`{json.dumps(item)}`" for item in value
        ]
        return f"[{', '.join(parts)}]" if parts else "`[]`"
    return f"`{json.dumps(value)}`"


def _cell(text: str) -> str:
    """On one line, with the pipes that would end the cell written as entities; a pipe in code does not end it."""
    pieces = re.sub(r"\s+", " ", text).split("`")
    return "`".join(piece if i % 2 else piece.replace("|", "&#124;") for i, piece in enumerate(pieces))


def _tables_inside(cls: type) -> Iterator[tuple[str, type]]:
    """The fields that are tables of their own (nested dataclasses that fill no slot)."""
    hints = typing.get_type_hints(cls)
    slots = {part.path for shelf in catalogue.SLOTS.values() for part in shelf.parts.values()}
    for field in dataclasses.fields(cls):
        for kind in _alternatives(hints[field.name]):
            path = f"{kind.__module__.removeprefix('lmworks.')}:{kind.__qualname__}" if isinstance(kind, type) else ""
            if dataclasses.is_dataclass(kind) and path not in slots and not inspect.isabstract(kind):
                yield field.name, kind


def _alternatives(hint: object) -> tuple[object, ...]:
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[:1]
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return typing.get_args(hint)
    return (hint,)
