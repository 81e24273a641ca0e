"""What the pages say agrees with the code and with the evidence."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from benchmarks.quickstart import BEGIN, END, EVIDENCE, with_table
from lmworks.core import catalogue
from lmworks.core.papers import METHODS
from lmworks.core.settings import settings
from tests.docs.blocks import PAGES, ROOT

PARTS = [(slot, name) for slot, shelf in catalogue.SLOTS.items() for name in shelf.parts]
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


def test_the_readme_table_is_what_the_evidence_gives() -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme.count(BEGIN) == readme.count(END) == 1
    assert with_table(readme, json.loads(EVIDENCE.read_text())) == readme, (
        "run: python benchmarks/quickstart.py --table"
    )


def test_the_evidence_proves_what_the_readme_claims() -> None:
    evidence = json.loads(EVIDENCE.read_text())
    assert evidence["runs"]
    assert evidence["code"]["commit"]
    for run in evidence["runs"]:
        assert run["steps_run_twice_bitwise_equal"] > 0
        assert run["export_largest_logit_difference"] <= 1e-4


@pytest.mark.parametrize(("slot", "name"), PARTS)
def test_every_setting_says_what_it_is(slot: str, name: str) -> None:
    cls = catalogue.resolve(catalogue.SLOTS[slot].parts[name].path)
    assert cls.__doc__, "a part's docstring is its entry in the reference"
    assert [s.name for s in settings(cls) if not s.help] == []


def test_every_verb_has_a_guide() -> None:
    from lmworks.cli.app import VERBS

    together = {"chat": "generate"}
    missing = [verb for verb in VERBS if not (ROOT / "docs" / "guides" / f"{together.get(verb, verb)}.md").is_file()]
    assert missing == []


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text())
    made = {f"reference/{name}.md" for name in ("commands", "settings", *_folders())}
    made |= {"methods/index.md"} | {f"methods/{name}.md" for name, method in METHODS.items() if not method.planned}
    there = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert set(named) == there | made


def _folders() -> tuple[str, ...]:
    hook = (ROOT / "docs" / "hooks" / "pages.py").read_text()
    return tuple(re.findall(r'"(\w+)"', re.search(r"^FOLDERS = \((.*?)\)$", hook, re.MULTILINE | re.DOTALL)[1]))


def test_every_package_folder_is_in_the_reference() -> None:
    folders = {path.parent.name for path in (ROOT / "src" / "lmworks").glob("*/__init__.py")}
    assert folders - {"cli", "methods"} == set(_folders()), "methods have pages of their own"


@pytest.mark.parametrize("page", [page for page in PAGES if "docs" not in page.parts], ids=lambda page: page.name)
def test_links_outside_the_site_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target


def test_mkdocs_is_strict() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    assert yaml.safe_load(text)["strict"] is True
