"""A recipe: one TOML file that fully describes a run, decoded into frozen dataclasses.

The dataclass of a part *is* its configuration. Decoding is strict: an unknown key, a missing key, a wrong type or an
illegal pair is an error, and all errors are reported at once, before any model or data is loaded.

    load(path, sets=["optimizer.lr=1e-3"])  ->  the verb's frozen dataclass
    dump(recipe)                            ->  TOML with every default written out; it loads again as it is
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

from annotated_types import Ge, Gt, Interval

from lmworks.core import catalogue
from lmworks.core.errors import Problem, RecipeError, did_you_mean

PositiveInt = Annotated[int, Gt(0)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
"""From 0 to 1, both included."""

Table = dict[str, Any]


@dataclass(frozen=True)
class Slot:
    """Marks a field that holds a part: `optimizer: Annotated[Optimizer, Slot("optimizer")]`."""

    name: str


@runtime_checkable
class Checked(Protocol):
    """A part that can refuse the recipe it stands in."""

    def check(self, recipe: Any) -> Iterator[Problem]:
        """Yield what is wrong, with paths relative to this part."""
        ...


# --- reading -----------------------------------------------------------------------------------------------------


def recipes_folder() -> Path:
    """The recipes that lmworks ships: inside the wheel, or at the root of a source checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parents[1] / "recipes"


def find(name: str, verb: str | None = None) -> Path:
    """The recipe file meant by a path that ends in .toml, or by the name of a shipped recipe ('train/quickstart')."""
    shipped = recipes_folder()
    tries = [Path(name), shipped / name] if name.endswith(".toml") else [shipped / f"{name}.toml"]
    folder = catalogue.FOLDERS.get(verb, verb) if verb is not None else None
    if folder is not None and not name.endswith(".toml"):
        tries.append(shipped / folder / f"{name}.toml")
    for path in tries:
        if path.is_file():
            return path
    known = sorted(str(p.relative_to(shipped).with_suffix("")) for p in shipped.rglob("*.toml"))
    listed = [k for k in known if folder is None or k.startswith(f"{folder}/")]
    hint = did_you_mean(name, [*listed, *(k.rpartition("/")[2] for k in listed)])
    raise RecipeError([Problem(path="", text=f"no such file{hint} Shipped: {', '.join(listed)}")], source=name)


def read(path: Path) -> Table:
    """The table of a recipe file, with its `base` (one level) merged under it."""
    return with_base(_toml(path), path)


def with_base(table: Table, path: Path | None = None) -> Table:
    """The table with its `base` merged under it: a shipped recipe, or a file beside `path`."""
    if "base" not in table:
        return table
    source = str(path) if path is not None else "recipe"
    name = table["base"]
    if not isinstance(name, str):
        raise RecipeError([Problem(path="base", text=f"must be a path, got {name!r}")], source=source)
    beside = path.parent / name if path is not None else Path(name)
    base = _toml(beside if beside.is_file() else find(name))
    if "base" in base:
        text = f"{name} has a base of its own; a base is one level deep"
        raise RecipeError([Problem(path="base", text=text)], source=source)
    return merge(base, {key: value for key, value in table.items() if key != "base"})


def merge(under: Table, over: Table) -> Table:
    """`over` on top of `under`. A table that names another part or size replaces; any other table is merged by key."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict) and not _names_another(value, below):
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def _names_another(over: Table, under: Table) -> bool:
    return any(over.get(name, under.get(name)) != under.get(name) for name in ("use", "size"))


def apply_sets(table: Table, sets: Sequence[str]) -> Table:
    """The table with each 'a.b.0.c=value' written into it. A value is TOML; a bare word is a string."""
    values, problems = _parsed(sets)
    return with_values(table, values, source="--set", problems=problems)


def set_values(sets: Sequence[str]) -> Table:
    """The dotted path and the value of each 'a.b.0.c=value'."""
    values, problems = _parsed(sets)
    if problems:
        raise RecipeError(problems, source="--set")
    return values


def with_values(table: Table, values: Table, *, source: str = "recipe", problems: Sequence[Problem] = ()) -> Table:
    """The table with each value written at its dotted path. Raises RecipeError with `problems` and its own."""
    found = list(problems)
    for path, value in values.items():
        table = _with(table, path.split("."), value, path, found)
    if found:
        raise RecipeError(found, source=source)
    return table


def _parsed(sets: Sequence[str]) -> tuple[Table, list[Problem]]:
    values: Table = {}
    problems: list[Problem] = []
    for item in sets:
        path, equals, text = item.partition("=")
        if not equals or not path.strip():
            problems.append(Problem(path=item, text="--set takes PATH=VALUE, as in --set optimizer.lr=1e-3"))
        else:
            values[path.strip()] = _value(text.strip())
    return values, problems


def load(name: str | Path, *, verb: str | None = None, sets: Sequence[str] = ()) -> Any:
    """The decoded recipe of a file or shipped name. Raises RecipeError with every problem."""
    path = find(str(name), verb)
    return decode(apply_sets(read(path), sets), verb=verb, source=str(path))


def _toml(path: Path) -> Table:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError([Problem(path="", text=f"is not TOML: {error}")], source=str(path)) from error


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _with(node: Any, keys: list[str], value: Any, path: str, problems: list[Problem]) -> Any:
    """A copy of `node` with `value` at `keys`; tables on the way are made, list items must exist."""
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            problems.append(Problem(path=path, text=f"'{key}' is not an item of a list of {len(node)}"))
            return node
        return [_with(item, rest, value, path, problems) if i == int(key) else item for i, item in enumerate(node)]
    if isinstance(node, str):  # the shorthand  schedule = "cosine"
        node = {"use": node}
    if node is not None and not isinstance(node, dict):
        problems.append(Problem(path=path, text=f"'{key}' would be inside {node!r}, which is not a table"))
        return node
    table = dict(node or {})
    if key in ("use", "size") and not rest and table.get(key) != value:
        table = {}  # another part, or another size, has other settings
    table[key] = _with(table.get(key), rest, value, path, problems)
    return table


# --- decoding ----------------------------------------------------------------------------------------------------


def decode(table: Table, *, verb: str | None = None, source: str = "recipe") -> Any:
    """Decode a recipe table into its verb's dataclass and run every part's `check`.

    Raises RecipeError with all problems, each with its path, what is legal and the nearest name.
    """
    do = table.get("do")
    if not isinstance(do, str) or do not in catalogue.VERBS:
        other = f"'{do}' is not a verb that runs a recipe{did_you_mean(str(do), catalogue.VERBS)}"
        what = "is missing" if do is None else other
        raise RecipeError([Problem(path="do", text=f"{what} Legal: {', '.join(catalogue.VERBS)}")], source=source)
    if verb is not None and do != verb:
        text = f"this recipe is for '{do}', not for '{verb}': run  lmworks {do} {source}"
        raise RecipeError([Problem(path="do", text=text)], source=source)
    problems: list[Problem] = []
    recipe = _dataclass(catalogue.resolve(catalogue.VERBS[do]), table, "", problems)
    if not problems:
        problems.extend(_checks(recipe, recipe, ""))
    if problems:
        raise RecipeError(problems, source=source)
    return recipe


def decode_part(slot: str, value: Any, *, source: str = "part") -> Any:
    """Decode one table of a slot on its own, without checks against a recipe."""
    problems: list[Problem] = []
    part = _part(slot, value, slot, problems)
    if problems:
        raise RecipeError(problems, source=source)
    return part


def decode_as(cls: type, table: Table, *, source: str) -> Any:
    """Decode a table into a dataclass that is no recipe, such as a cluster. Raises RecipeError with all problems."""
    problems: list[Problem] = []
    found = _dataclass(cls, table, "", problems, source)
    if problems:
        raise RecipeError(problems, source=source)
    return found


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _dataclass(cls: type, table: Any, path: str, problems: list[Problem], name: str = "") -> Any:
    if not isinstance(table, dict):
        problems.append(Problem(path=path, text=f"must be a table, got {table!r}"))
        return None
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    label = name or path or "a recipe"
    before = len(problems)
    for key in table:
        if key not in fields:
            text = f"{label} has no setting '{key}'{did_you_mean(key, fields)} It has: {', '.join(sorted(fields))}"
            problems.append(Problem(path=_join(path, key), text=text))
    values: Table = {}
    for key, field in fields.items():
        if key in table:
            values[key] = _field(_hints(cls)[key], table[key], _join(path, key), problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(Problem(path=_join(path, key), text=f"{label} needs a value here; there is no default"))
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except ValueError as error:
        problems.append(Problem(path=path, text=str(error)))
        return None


def _field(hint: Any, value: Any, path: str, problems: list[Problem]) -> Any:
    slot = next((m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Slot)), None)
    if slot is not None:
        inner = hint.__origin__
        if typing.get_origin(inner) is tuple:
            if not isinstance(value, list):
                problems.append(Problem(path=path, text=f"must be a list of tables, got {value!r}"))
                return None
            return tuple(_part(slot.name, item, f"{path}.{i}", problems) for i, item in enumerate(value))
        return _part(slot.name, value, path, problems)
    plain = _without_none(hint)
    item = typing.get_args(plain)[0] if typing.get_origin(plain) is tuple else None
    if isinstance(item, type) and dataclasses.is_dataclass(item):
        if not isinstance(value, list):
            problems.append(Problem(path=path, text=f"must be a list of tables, got {value!r}"))
            return None
        return tuple(_dataclass(item, entry, f"{path}.{i}", problems) for i, entry in enumerate(value))
    if dataclasses.is_dataclass(plain) and isinstance(plain, type):
        return _dataclass(plain, value, path, problems)
    return _leaf(hint, value, path, problems)


def _part(slot: str, value: Any, path: str, problems: list[Problem]) -> Any:
    shelf = catalogue.shelf(slot)
    table = {"use": value} if isinstance(value, str) else value
    if not isinstance(table, dict):
        problems.append(Problem(path=path, text=f"must be a table with `use`, got {value!r}"))
        return None
    table = _preset(shelf, table, path, problems)
    name = table.get("use", shelf.default)
    if name is None:
        text = f"needs `use`, the name of a {slot}. Legal: {', '.join(shelf.parts)}"
        problems.append(Problem(path=_join(path, "use"), text=text))
        return None
    if not isinstance(name, str) or name not in shelf.parts:
        hint = did_you_mean(str(name), shelf.parts)
        text = f"no {slot} is called '{name}'{hint} Legal: {', '.join(shelf.parts)}"
        problems.append(Problem(path=_join(path, "use"), text=text))
        return None
    settings = {k: v for k, v in table.items() if k != "use"}
    return _dataclass(catalogue.resolve(shelf.parts[name].path), settings, path, problems, name)


def _preset(shelf: catalogue.Shelf, table: Table, path: str, problems: list[Problem]) -> Table:
    """The table with the data file it names by `size` merged under it."""
    if shelf.presets is None or "size" not in table:
        return table
    rest = {k: v for k, v in table.items() if k != "size"}
    folder = recipes_folder() / shelf.presets
    known = sorted(p.stem for p in folder.glob("*.toml"))
    if table["size"] not in known:
        text = f"no size is called {table['size']!r}{did_you_mean(str(table['size']), known)} Legal: {', '.join(known)}"
        problems.append(Problem(path=_join(path, "size"), text=text))
        return rest
    return merge(_toml(folder / f"{table['size']}.toml"), rest)


def _leaf(hint: Any, value: Any, path: str, problems: list[Problem]) -> Any:
    from pydantic import TypeAdapter, ValidationError  # noqa: PLC0415  (0.1 s that --help must not pay)

    try:
        return TypeAdapter(hint).validate_python(_tuples(value), strict=True)
    except ValidationError as error:
        reasons = list(dict.fromkeys(detail["msg"].removeprefix("Value error, ") for detail in error.errors()))
        text = f"got {value!r}; {'; or '.join(reason[0].lower() + reason[1:] for reason in reasons)}"
        problems.append(Problem(path=path, text=text))
        return None


def _checks(part: Any, recipe: Any, path: str) -> Iterator[Problem]:
    """What every part in the tree has to say against the recipe, paths made absolute."""
    if isinstance(part, Checked):
        for problem in part.check(recipe):
            yield Problem(path=_join(path, problem.path), text=problem.text)
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        items = enumerate(value) if isinstance(value, tuple) else [(None, value)]
        for i, item in items:
            if dataclasses.is_dataclass(item):
                yield from _checks(item, recipe, _join(path, field.name if i is None else f"{field.name}.{i}"))


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path and key else path or key


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _without_none(hint: Any) -> Any:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        rest = [a for a in typing.get_args(hint) if a is not types.NoneType]
        return rest[0] if len(rest) == 1 else hint
    return hint


# --- writing -----------------------------------------------------------------------------------------------------


def table_of(part: Any) -> Table:
    """A part as a plain table: every setting written out, `use` first, settings that are None left out."""
    name = catalogue.name_of(part)
    table: Table = {"use": name} if name is not None else {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if field.init and value is not None:
            table[field.name] = _plain(value)
    return table


def dump(recipe: Any) -> str:
    """The recipe as TOML with every default written out. Loading the text gives an equal recipe."""
    import tomli_w  # noqa: PLC0415  (only when a run folder is written)

    return tomli_w.dumps(table_of(recipe))


def differences(ours: Table, theirs: Table, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Settings in which two tables differ: path -> (ours, theirs), None where one has no such key."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in [*ours, *(k for k in theirs if k not in ours)]:
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differences(a, b, _join(path, key))
        elif a != b:
            found[_join(path, key)] = (a, b)
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return table_of(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
