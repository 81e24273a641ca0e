"""What tests of training and of methods read: a corpus, and a cache of its tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train import toy


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.corpus(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")
