"""The bundles are of the versions that the lock names, and carry their licences."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lmworks.board.app import STATIC

NPM = Path(__file__).parents[2] / "tools" / "board"


def test_the_bundles_are_of_the_locked_versions() -> None:
    bundled = json.loads((STATIC / "vendor.json").read_text())
    locked = json.loads((NPM / "package-lock.json").read_text())["packages"]
    assert set(json.loads((NPM / "package.json").read_text())["dependencies"]) <= set(bundled["packages"])
    assert bundled["packages"] == {name: locked[f"node_modules/{name}"]["version"] for name in bundled["packages"]}


def test_the_bundles_are_those_that_the_build_wrote() -> None:
    bundled = json.loads((STATIC / "vendor.json").read_text())
    found = {name: hashlib.sha256((STATIC / name).read_bytes()).hexdigest() for name in bundled["files"]}
    assert found == bundled["files"]
    assert {"vendor.js", "vendor-echarts.js", "vendor.css", "LICENSES.txt"} == set(found)


def test_every_package_has_its_licence() -> None:
    text = (STATIC / "LICENSES.txt").read_text()
    for name, version in json.loads((STATIC / "vendor.json").read_text())["packages"].items():
        assert f"\n{name} {version} (" in text
    for words in ("Apache License", "Redistribution and use", "Permission is hereby granted"):
        assert words in text
