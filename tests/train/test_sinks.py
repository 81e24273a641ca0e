"""Sinks: what a run writes can be read back by the tool it was written for."""

from __future__ import annotations

import importlib.util
import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
    for ask in (sink.must_be_installed, lambda: sink.open(RunFolder(tmp_path), {}, step=0)):
        with pytest.raises(MissingExtra, match=r"lmworks\[trackers\]"):
            ask()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed here")
def test_a_missing_tracker_is_told_before_anything_is_made(tmp_path: Path) -> None:
    text = toy.corpus(tmp_path / "text")
    made = toy.recipe(text, tmp_path / "cache", sinks=[{"use": "wandb", "project": "p"}])
    with pytest.raises(MissingExtra):
        toy.train(made, tmp_path / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text"]


def test_tensorboard_hides_the_rows_behind_the_step_that_a_run_goes_on_from(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    for step in (0, 2):  # the run begins, and goes on behind step 2
        folder = tmp_path / str(step)
        TensorBoard().open(RunFolder(folder), {}, step=step).close()
    (began,), (again,) = (list((tmp_path / name / "tensorboard").iterdir()) for name in ("0", "2"))
    hidden_from = [event.step for event in EventFileLoader(str(again)).Load() if event.HasField("session_log")]
    assert hidden_from == [3], "TensorBoard hides this step and all after it; step 2 stays"
    assert not any(event.HasField("session_log") for event in EventFileLoader(str(began)).Load())


class Server:
    """What mlflow and wandb would be told: enough of both libraries to see which run is meant."""

    def __init__(self) -> None:
        self.tags: dict[str, str] = {}
        self.started: list[str] = []

    def set_experiment(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(experiment_id=name)

    def search_runs(self, experiments: list[str], *, filter_string: str, output_format: str) -> list[SimpleNamespace]:
        assert output_format == "list"
        found = [run for run, tag in self.tags.items() if filter_string == f"tags.lmworks_id = '{tag}'"]
        return [SimpleNamespace(info=SimpleNamespace(run_id=run)) for run in found]

    def start_run(self, *, run_id: str = "", run_name: str = "", tags: dict[str, str] | None = None) -> None:
        run = run_id or f"{run_name}#{len(self.tags)}"
        if tags:
            self.tags[run] = tags["lmworks_id"]
        self.started.append(run)

    def end_run(self) -> None:
        """Nothing is left open."""

    def init(self, **settings: Any) -> SimpleNamespace:
        self.started.append(str(settings["id"]))
        return SimpleNamespace(finish=None, log=None)


@pytest.mark.parametrize(("module", "sink"), [("mlflow", MLflow(experiment="e")), ("wandb", WandB(project="p"))])
def test_a_run_is_known_by_its_own_id(
    module: str, sink: MLflow | WandB, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server()
    monkeypatch.setitem(sys.modules, module, server)
    for place in ("a", "b"):
        (tmp_path / place / "quickstart").mkdir(parents=True)
        RunFolder(tmp_path / place / "quickstart").write_record({}, {})
    for place in ("a", "b", "a"):
        sink.open(RunFolder(tmp_path / place / "quickstart"), {}, step=0)
    first, other, again = server.started
    assert first == again != other


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
