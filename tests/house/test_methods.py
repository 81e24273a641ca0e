"""What every published method owes before it counts: code, page, test, smallest recipe, claims and proof."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lmworks.core import recipe as recipes
from lmworks.core.papers import METHODS
from lmworks.prove.ledger import HEADINGS, page, parts_of, source_file

ROOT = Path(__file__).resolve().parents[2]
THERE = [name for name, method in METHODS.items() if not method.planned]

LEAVES = {"train": ("--run", "summary.json"), "mix": ("--out", "mix.json")}
"""Verb of a smallest recipe -> the option that names its folder, and a file that it leaves there."""


def owed(name: str) -> list[str]:
    """Everything that a method lacks: the missing path, or what is missing in it."""
    method = METHODS[name]
    paths = {
        "source": source_file(method),
        "test": ROOT / "tests" / "methods" / f"test_{name.replace('-', '_')}.py",
        "smallest recipe": ROOT / "recipes" / "methods" / f"{name}.toml",
        "proof": ROOT / "recipes" / "proofs" / f"{name}.toml",
    }
    missing = [f"{what}: {path.relative_to(ROOT)}" for what, path in paths.items() if not path.is_file()]
    if paths["source"].is_file():
        found = tuple(re.findall(r"^## (.+)$", page(method), re.MULTILINE))
        if found != HEADINGS:
            missing.append(f"headings in {paths['source'].relative_to(ROOT)}: {', '.join(HEADINGS)}; found {found}")
    if paths["proof"].is_file() and not tomllib.loads(paths["proof"].read_text()).get("claims"):
        missing.append(f"claims: {paths['proof'].relative_to(ROOT)}")
    if not parts_of(method):
        missing.append("parts: src/lmworks/core/catalogue.py")
    return missing


def test_there_are_forty_seven() -> None:
    assert len(METHODS) == 47
    assert list(METHODS) == sorted(METHODS)
    assert {"sophia", "colm", "megascale"} <= set(THERE)


@pytest.mark.parametrize("name", THERE)
def test_a_method_that_is_not_planned_owes_nothing(name: str) -> None:
    assert owed(name) == []


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "new-one", METHODS["sophia"])
    missing = owed("new-one")
    assert "test: tests/methods/test_new_one.py" in missing
    assert "smallest recipe: recipes/methods/new-one.toml" in missing
    assert "proof: recipes/proofs/new-one.toml" in missing


@pytest.mark.parametrize("name", THERE)
def test_every_part_of_a_method_is_in_its_smallest_recipe(name: str) -> None:
    recipe = recipes.load(f"methods/{name}")
    text = recipes.dump(recipe)
    for slot, part in parts_of(METHODS[name]):
        if slot != "watcher":
            assert f'use = "{part}"' in text


@pytest.mark.slow
@pytest.mark.parametrize("name", THERE)
def test_the_smallest_recipe_runs(name: str, tmp_path: Path) -> None:
    verb = recipes.load(f"methods/{name}").do
    folder, left = LEAVES[verb]
    command = [sys.executable, "-m", "lmworks", verb, f"methods/{name}", folder, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / left).is_file()
