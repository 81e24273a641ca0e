"""MkDocs hook: the pages of the reference, made from the code when the site is built.

    reference/commands.md   what every verb answers to --help
    reference/settings.md   every setting of every part, from the dataclasses and the docstrings below their fields
    reference/FOLDER.md     the modules of src/lmworks/FOLDER, for mkdocstrings

Nothing of it is kept in the repository, so it cannot differ from the code.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import pkgutil
import re
import types
import typing
from collections.abc import Iterator

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from lmworks.cli.app import app
from lmworks.core import catalogue
from lmworks.core.settings import settings

FOLDERS = ("core", "model", "data", "generate", "train", "evaluate", "serve")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {"commands": commands(), "settings": all_settings(), **{folder: modules(folder) for folder in FOLDERS}}
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def commands() -> str:
    """A section for each verb with its help text."""
    os.environ["COLUMNS"] = "110"
    group = typer.main.get_command(app)
    context = group.make_context("lmworks", [], resilient_parsing=True)
    lines = ["# Commands", "", "What each verb answers to `--help`.", ""]
    for verb in group.list_commands(context):
        command = group.get_command(context, verb)
        below = command.make_context(verb, [], parent=context, resilient_parsing=True)
        lines += [f"## lmworks {verb}", "", "```text", command.get_help(below).rstrip(), "```", ""]
    return "\n".join(lines)


def all_settings() -> str:
    """A section for each verb that runs a recipe, and one for each slot with its parts."""
    lines = ["# Settings", "", "Made from the dataclasses that recipes are decoded into.", ""]
    for verb, path in catalogue.VERBS.items():
        cls = catalogue.resolve(path)
        lines += [f'## A recipe with `do = "{verb}"`', "", _doc(cls), "", *_table(cls)]
        for name, below in _tables_inside(cls):
            lines += [f"### `[{name}]`", "", _doc(below), "", *_table(below)]
    for slot, shelf in catalogue.SLOTS.items():
        lines += [f"## Slot `{slot}`", "", f"{shelf.line[0].upper()}{shelf.line[1:]}.", ""]
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
    rows = [
        f"| `{s.name}` | `{_cell(s.kind)}` | {f'`{_cell(s.default)}`' if s.default else ''} | {_cell(s.help)} |"
        for s in settings(cls)
    ]
    if not rows:
        return ["It has no settings.", ""]
    return ["| setting | type | default | meaning |", "| --- | --- | --- | --- |", *rows, ""]


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


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
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return typing.get_args(hint)
    return (hint,)
