"""A board over a few runs, asked without a network."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from lmworks.board.app import Board, make
from lmworks.board.guard import Guard
from tests.board import folders


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with three runs: one done, one dead, one that nobody would call so."""
    root = tmp_path / "runs"
    folders.make(root / "plain")
    killed = folders.make(root / "killed", steps=90, done=False, height=3.2, optimizer={"use": "adamw", "lr": 3e-3})
    folders.lock(killed, 4_194_303)
    folders.silent(killed, 300)
    return root


@pytest.fixture
def client(runs: Path) -> TestClient:
    """A client of a board on this machine."""
    return TestClient(make(Board([runs]), Guard.of("127.0.0.1", 8472)), base_url="http://127.0.0.1:8472")
