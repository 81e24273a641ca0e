"""The settings of a part as a table for people: name, type, default, and the docstring below the field."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of a part."""

    name: str
    kind: str
    default: str
    """As it would stand in a recipe; 'required' when there is no default, '' when the setting may be left out."""
    help: str


def settings(cls: type) -> list[Setting]:
    """Every setting of a part's dataclass, in order, with inherited ones first."""
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls.__name__} is not a part")
    texts: dict[str, tuple[str, str]] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            texts |= _field_texts(base)
    return [
        Setting(name=f.name, kind=texts[f.name][0], default=_default(f), help=texts[f.name][1])
        for f in dataclasses.fields(cls)
        if f.init
    ]


def _field_texts(cls: type) -> dict[str, tuple[str, str]]:
    """Field name -> (annotation as written, string literal that stands below it)."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    found: dict[str, tuple[str, str]] = {}
    for item, below in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            text = ""
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                text = inspect.cleandoc(str(below.value.value))
            found[item.target.id] = (ast.unparse(item.annotation), text)
    return found


def _default(field: dataclasses.Field[object]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if not dataclasses.is_dataclass(value) else type(value).__name__
