"""The catalogue: text that points at real classes, and nothing imported before it is asked for."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from lmworks.core import catalogue
from lmworks.core.errors import UsageError
from lmworks.core.settings import settings

PARTS = [(slot, name, part) for slot, shelf in catalogue.SLOTS.items() for name, part in shelf.parts.items()]


@pytest.mark.parametrize(("slot", "name", "part"), PARTS, ids=[f"{slot}/{name}" for slot, name, _ in PARTS])
def test_every_part_is_a_frozen_keyword_only_dataclass_whose_settings_are_explained(
    slot: str, name: str, part: catalogue.Part
) -> None:
    cls = catalogue.resolve(part.path)
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert all(field.kw_only for field in dataclasses.fields(cls))
    assert [s.name for s in settings(cls) if not s.help] == []
    assert part.line
    assert slot in catalogue.SLOTS


@pytest.mark.parametrize("verb", catalogue.VERBS)
def test_every_verb_resolves(verb: str) -> None:
    assert dataclasses.is_dataclass(catalogue.resolve(catalogue.VERBS[verb]))


def test_defaults_are_on_their_shelf() -> None:
    assert [slot for slot, shelf in catalogue.SLOTS.items() if shelf.default and shelf.default not in shelf.parts] == []


def test_an_unknown_slot_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'optimizer'"):
        catalogue.shelf("optimiser")


def test_a_part_knows_its_name() -> None:
    from lmworks.train.optim import Lion

    assert catalogue.name_of(Lion(lr=1e-4)) == "lion"
    assert catalogue.name_of(object()) is None


def test_help_and_methods_load_neither_torch_nor_pydantic() -> None:
    code = (
        "import sys, lmworks.cli.app, lmworks.core.recipe, lmworks.core.run, lmworks.core.events;"
        "print(sorted({'torch', 'pydantic', 'numpy', 'rich', 'tokenizers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
