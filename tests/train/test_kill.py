"""kill -9 at random moments, during saves as well; then the run is bitwise the one that nobody killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmworks.core.journal import rows
from lmworks.core.run import RunFolder
from lmworks.model.checkpoint import complete
from lmworks.train import save
from tests.train import toy

KILLS = 20


def bitwise(folder: RunFolder) -> list[tuple[Any, ...]]:
    names = ("step", "tokens", "loss", "grad_norm", "val_loss")
    return [tuple(row.get(name) for name in names) for row in rows(folder.metrics)]


@pytest.mark.slow
@pytest.mark.parametrize("background", [True, False], ids=["background", "foreground"])
def test_twenty_kills_at_random_moments_change_nothing(tmp_path: Path, background: bool) -> None:
    """The same losses, the same tokens (no row lost or doubled), the same weights."""
    text = toy.corpus(tmp_path / "text", 120)
    model = {"use": "decoder", "n_layers": 2, "hidden_size": 128, "n_heads": 2, "ffn_size": 512}
    table = toy.table(
        text,
        tmp_path / "cache",
        steps=120,
        threads=1,
        model=model,
        checkpoints={"every": 3, "keep": 2, "background": background},
        validation={"every": 40, "rows": 4},
    )
    (tmp_path / "whole.json").write_text(json.dumps({"table": table, "run": str(tmp_path / "whole"), "delays": []}))
    command = [sys.executable, "-m", "tests.train.killed"]
    subprocess.run([*command, str(tmp_path / "whole.json")], check=True, timeout=300)
    whole = RunFolder(tmp_path / "whole")
    seconds = max(0.3, sum(row["seconds"] for row in rows(whole.metrics) if "seconds" in row))
    delays = np.random.default_rng(20).uniform(0.0, 0.25 * seconds, size=KILLS).tolist()
    writing = False
    for number in range(KILLS):  # a run may end before it was killed as often as planned: then another one begins
        killed = RunFolder(tmp_path / f"run-{number}")
        (tmp_path / "run.json").write_text(json.dumps({"table": table, "run": str(killed.path), "delays": delays}))
        found = subprocess.run([*command, str(tmp_path / "run.json")], check=True, timeout=600, capture_output=True)
        attempts = [json.loads(line) for line in found.stdout.splitlines()]
        kills = sum(attempt["status"] != 0 for attempt in attempts)
        writing = writing or any(attempt["writing"] for attempt in attempts)
        same_as(killed, whole)
        delays = delays[kills:]
        if not delays:
            assert writing, "no kill fell into a save"
            return
    pytest.fail(f"{len(delays)} kills of {KILLS} came too late")


def same_as(killed: RunFolder, whole: RunFolder) -> None:
    """Losses, weights, optimizer, place in the data; and no leftovers."""
    assert bitwise(killed) == bitwise(whole)
    a, b = (save.read(complete(folder.checkpoints)[-1]) for folder in (killed, whole))
    assert all((a.tensors["model"][name] == b.tensors["model"][name]).all() for name in b.tensors["model"])
    assert all((a.tensors["optimizer"][name] == b.tensors["optimizer"][name]).all() for name in b.tensors["optimizer"])
    assert a.state["source"] == b.state["source"]
    assert not list(killed.checkpoints.glob(".writing-*"))
