"""Where metrics go besides the run folder. A sink reads finished rows; the trainer does not know what is behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, final

from lmworks.core.need import must_be_there, need
from lmworks.core.run import RunFolder

Row = dict[str, Any]


class Writer(ABC):
    """An open sink."""

    @abstractmethod
    def write(self, step: int, row: Row) -> None:
        """Take the numbers of one row."""

    @abstractmethod
    def close(self) -> None:
        """Finish."""


class Sink(ABC):
    """The settings of a sink, which open it for a run."""

    package: ClassVar[str | None] = None
    """What it needs of the extra `trackers`."""

    def must_be_installed(self) -> None:
        """Raise MissingExtra when its package is not installed: told before anything is tokenised."""
        if self.package is not None:
            must_be_there(self.package, extra="trackers", why=f"sink '{self.package}'")

    @abstractmethod
    def open(self, folder: RunFolder, recipe: dict[str, Any], *, step: int) -> Writer:
        """An open sink for this run, which starts or goes on at `step`."""


@final
@dataclass(frozen=True, kw_only=True)
class TensorBoard(Sink):
    """TensorBoard event files in the run folder."""

    def open(self, folder: RunFolder, recipe: dict[str, Any], *, step: int) -> Writer:
        """Open `tensorboard/`; rows after `step` of an earlier attempt are hidden by TensorBoard itself."""
        return _TensorBoardWriter(folder, purge=step + 1 if step else None)


class _TensorBoardWriter(Writer):
    def __init__(self, folder: RunFolder, *, purge: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  (0.5 s, and only this sink needs it)

        self._writer = SummaryWriter(str(folder.tensorboard), purge_step=purge, flush_secs=10)

    def write(self, step: int, row: Row) -> None:
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, step, new_style=True)

    def close(self) -> None:
        self._writer.close()


@final
@dataclass(frozen=True, kw_only=True)
class WandB(Sink):
    """Weights & Biases. Needs the extra `trackers` and an account; `mode = "offline"` needs none."""

    package: ClassVar[str | None] = "wandb"
    """The package."""

    project: str
    """The project's name there."""
    mode: str = "online"
    """online, offline or disabled, as wandb understands it."""

    def open(self, folder: RunFolder, recipe: dict[str, Any], *, step: int) -> Writer:
        """Start or go on with this run, by its own id: folders of the same name are different runs."""
        wandb = need("wandb", extra="trackers", why="sink 'wandb'")
        run = wandb.init(
            project=self.project,
            mode=self.mode,
            name=folder.name,
            id=folder.id(),
            resume="allow",
            config=recipe,
            dir=str(folder.path),
        )
        return _Called(lambda at, numbers: run.log(numbers, step=at), run.finish)


@final
@dataclass(frozen=True, kw_only=True)
class MLflow(Sink):
    """MLflow. Needs the extra `trackers`."""

    package: ClassVar[str | None] = "mlflow"
    """The package."""

    experiment: str
    """The experiment's name."""
    uri: str | None = None
    """Tracking server or folder; left out: MLflow's own default."""

    def open(self, folder: RunFolder, recipe: dict[str, Any], *, step: int) -> Writer:
        """Start this run, or go on with the one that carries its id."""
        mlflow = need("mlflow", extra="trackers", why="sink 'mlflow'")
        if self.uri is not None:
            mlflow.set_tracking_uri(self.uri)
        experiment = mlflow.set_experiment(self.experiment)
        tag = f"tags.lmworks_id = '{folder.id()}'"
        found = mlflow.search_runs([experiment.experiment_id], filter_string=tag, output_format="list")
        if found:
            mlflow.start_run(run_id=found[0].info.run_id)
        else:
            mlflow.start_run(run_name=folder.name, tags={"lmworks_id": folder.id()})
        return _Called(lambda at, numbers: mlflow.log_metrics(numbers, step=at), mlflow.end_run)


@final
@dataclass(frozen=True, kw_only=True)
class Trackio(Sink):
    """trackio. Needs the extra `trackers`."""

    package: ClassVar[str | None] = "trackio"
    """The package."""

    project: str
    """The project's name."""

    def open(self, folder: RunFolder, recipe: dict[str, Any], *, step: int) -> Writer:
        """Start or go on with this run: trackio knows it by its name, which is the folder's and the run's own id."""
        trackio = need("trackio", extra="trackers", why="sink 'trackio'")
        trackio.init(project=self.project, name=f"{folder.name}-{folder.id()[:8]}", config=recipe, resume="allow")
        return _Called(lambda at, numbers: trackio.log(numbers, step=at), trackio.finish)


class _Called(Writer):
    """A sink whose library is two functions."""

    def __init__(self, log: Any, finish: Any) -> None:
        self._log = log
        self._finish = finish

    def write(self, step: int, row: Row) -> None:
        self._log(step, _numbers(row))

    def close(self) -> None:
        self._finish()


def _numbers(row: Row) -> dict[str, float]:
    return {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
