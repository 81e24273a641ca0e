"""Which code made something: a hash over a class's module and everything of ours that it is built on."""

from __future__ import annotations

import ast
import hashlib
import importlib
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

from lmworks.data.fingerprint import digest

CORE = "lmworks.core"
"""Names, errors, recipes: what a stage answers does not hang on them, and they change with every new part."""


def code_id(*parts: object) -> str:
    """A hash over the sources that decide what parts do, and over the versions of their `libraries`."""
    libraries = sorted({name for part in parts for name in getattr(part, "libraries", ())})
    sources = [sources_id(type(part).__module__) for part in parts]
    return digest([sources, [[name, _version(name)] for name in libraries]])


@cache
def sources_id(module: str) -> str:
    """A hash over the source of a module and of the modules of ours that it is built on, those of CORE left out."""
    found: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        path = importlib.import_module(name).__file__
        assert path is not None, "our modules are files"
        source = Path(path).read_bytes()
        found[name] = hashlib.sha256(source).hexdigest()
        waiting.extend(_ours(source))
    return digest(sorted(found.items()))


def _ours(source: bytes) -> Iterator[str]:
    """The modules of ours that a source imports, those of CORE left out."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith("lmworks.") and not name.startswith(CORE) and _is_module(name):
                yield name


@cache
def _is_module(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return False
    return True


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
