"""Sinks: what a run writes can be read back by the tool it was written for."""

from __future__ import annotations

import importlib.util
import sqlite3
from pathlib import Path

import pytest

from lmworks.core.errors import MissingExtra
from lmworks.core.journal import rows
from lmworks.core.run import RunFolder
from lmworks.train.sinks import MLflow, TensorBoard, Trackio, WandB, Writer
from tests.train import toy

ROWS = [(1, {"step": 1, "loss": 3.0, "note": "text"}), (2, {"step": 2, "loss": 2.5, "note": "text"})]


def write(writer: Writer) -> None:
    for step, row in ROWS:
        writer.write(step, row)
    writer.close()


def test_tensorboard_reads_back_every_number(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(TensorBoard().open(RunFolder(tmp_path), {}, step=0))
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert found.Tags()["tensors"] == ["loss"]
    values = [(event.step, event.tensor_proto.float_val[0]) for event in found.Tensors("loss")]
    assert values == [(1, 3.0), (2, 2.5)]


def test_a_run_writes_its_metrics_to_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    text = toy.corpus(tmp_path / "text")
    folder, _ = toy.train(
        toy.recipe(text, tmp_path / "cache", steps=3, checkpoints={}, sinks=["tensorboard"]), tmp_path / "run"
    )
    found = EventAccumulator(str(folder.tensorboard))
    found.Reload()
    losses = [event.tensor_proto.float_val[0] for event in found.Tensors("loss")]
    assert losses == pytest.approx([row["loss"] for row in rows(folder.metrics) if "loss" in row])


@pytest.mark.parametrize(
    ("module", "sink"),
    [("wandb", WandB(project="p")), ("mlflow", MLflow(experiment="e")), ("trackio", Trackio(project="p"))],
)
def test_a_tracker_that_is_not_installed_says_what_to_install(module: str, sink: TensorBoard, tmp_path: Path) -> None:
    if importlib.util.find_spec(module) is not None:
        pytest.skip(f"{module} is installed here")
    with pytest.raises(MissingExtra, match=r"lmworks\[trackers\]"):
        sink.open(RunFolder(tmp_path), {}, step=0)


@pytest.mark.slow
def test_mlflow_gets_every_number(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="the extra 'trackers' is not installed")
    write(MLflow(experiment="e", uri=f"sqlite:///{tmp_path}/ml.db").open(RunFolder(tmp_path), {}, step=0))
    with sqlite3.connect(tmp_path / "ml.db") as base:
        assert base.execute("select step, value from metrics where key = 'loss' order by step").fetchall() == [
            (1, 3.0),
            (2, 2.5),
        ]


@pytest.mark.slow
def test_wandb_writes_an_offline_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the extra 'trackers' is not installed")
    write(WandB(project="p", mode="offline").open(RunFolder(tmp_path), {}, step=0))
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
