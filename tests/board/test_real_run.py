"""A run that the trainer made, from its files to what the board says of it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from lmworks.board.app import Board, make
from lmworks.board.guard import Guard
from lmworks.core import recipe as recipes
from lmworks.core.journal import rows
from lmworks.plan import cluster as clusters
from lmworks.plan import residuals, score
from tests.train import toy

pytestmark = pytest.mark.slow


def test_a_real_run(tmp_path: Path) -> None:
    table = toy.table(toy.corpus(tmp_path / "text"), tmp_path / "cache", steps=12, micro_batch_size=2, threads=1)
    made = recipes.decode(table)
    client = TestClient(make(Board([tmp_path / "runs"]), Guard.of("127.0.0.1", 1)), base_url="http://127.0.0.1")
    assert client.get("/api/runs").json()["runs"] == []
    toy.stopped(made, tmp_path / "runs" / "toy", 7, signal.SIGTERM)
    other = TestClient(make(Board([tmp_path / "runs"]), Guard.of("127.0.0.1", 1)), base_url="http://127.0.0.1")
    (run,) = other.get("/api/runs").json()["runs"]
    assert (run["status"], run["why"], run["step"]) == ("stopped", "got SIGTERM. The same command goes on.", 7)
    address = f"/api/runs/{run['id']}"
    assert other.get(f"{address}/curves").json()["rows"] == 7

    folder, _ = toy.train(made, tmp_path / "runs" / "toy")
    facts = other.get(address).json()
    assert (facts["status"], facts["attempts"]) == ("done", 2)
    summary = json.loads(folder.summary.read_text())
    assert facts["loss"] == summary["loss"]
    measured = {one["name"]: one["measured"] for one in facts["memory"][0]["classes"]}
    assert measured == summary["memory"]["measured"]
    curves = other.get(f"{address}/curves").json()
    losses = [row["loss"] for row in rows(folder.metrics) if "loss" in row]
    assert curves["steps"]["loss"] == pytest.approx(losses, rel=1e-6)
    time = other.get(f"{address}/system").json()["time"]
    steps = [row["seconds"] for row in rows(folder.metrics) if "loss" in row]
    assert time["spent"]["steps"] == pytest.approx(sum(steps), rel=0.05, abs=0.01)
    assert sum(time["spent"].values()) == pytest.approx(time["wall"])

    told = other.get(f"{address}/score?cluster=laptop").json()
    assert told["rows"] == score.table_rows(score.score(folder.path, clusters.load("laptop")))
    assert not residuals.file_of(clusters.load("laptop")).exists(), "a look teaches the planner nothing"
