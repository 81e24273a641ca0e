"""What the wheel carries, and that the places which name a version or a range agree."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import lmworks

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_the_same_in_both_places() -> None:
    assert PROJECT["version"] == lmworks.__version__


def test_the_makefile_names_the_range_of_torch_that_the_project_needs() -> None:
    (torch,) = [need for need in PROJECT["dependencies"] if need.startswith("torch")]
    assert f"TORCH := '{torch}'" in (ROOT / "Makefile").read_text()
    assert "<" in torch, "without an upper bound pip takes the newest CUDA build instead of a CPU build it is offered"


def test_every_extra_that_the_code_asks_for_exists() -> None:
    asked = {
        extra
        for path in (ROOT / "src").rglob("*.py")
        for extra in re.findall(r"extra=\"(\w+)\"", path.read_text(encoding="utf-8"))
    }
    assert asked
    assert asked <= set(PROJECT["optional-dependencies"])


@pytest.mark.slow
def test_the_wheel_carries_recipes_types_and_licence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {f"lmworks/{path.relative_to(ROOT)}" for path in (ROOT / "recipes").rglob("*.toml")}
    assert recipes
    assert recipes <= names
    assert {"lmworks/py.typed", "lmworks/cli/app.py", "lmworks/core/energy/figures/grids.toml"} <= names
    assert {f"lmworks/board/static/{name}" for name in ("index.html", "vendor.js", "LICENSES.txt")} <= names
    assert any(name.endswith("LICENSE") for name in names)
    assert not any(name.startswith("tests") for name in names)
