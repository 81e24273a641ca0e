"""Tables of runs as files: what a search wrote, and what others published.

A table is Parquet or CSV, in one file or in two that belong together by their first column: one with mixtures, one with
losses. Columns say what they hold by how they begin:

    mixture/NAME  train_NAME                    share of a source; rows are normalised where rounding left them off 1
    loss/NAME  val_loss/NAME  metric/NAME       loss on what is held out of a source; NAME_val_loss is NAME as well
    fidelity, seed, purpose, label, failed, cost, seconds, tokenizer         of the run, all optional
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from lmworks.core.errors import DataError, UsageError
from lmworks.mix.problem import TOP, Fidelity, Floats, MixtureProblem, Source
from lmworks.mix.runs import Run, RunTable, Trial

SHARES = ("mixture/", "train_")
LOSSES = ("val_loss/", "loss/", "metric/")
SUFFIX = "_val_loss"
OFF = 0.02
"""How far rounding may leave a row's sum from 1."""

Columns = dict[str, list[Any]]


@final
@dataclass(frozen=True, kw_only=True)
class Published:
    """Runs out of files, before anybody asks something of them."""

    ids: tuple[str, ...]
    """Of rows: their first column."""
    sources: tuple[str, ...]
    mixtures_NM: Floats
    losses: Mapping[str, Floats]
    """Column -> values_N, nan where a row has none."""
    failed: tuple[str | None, ...]
    """Why a row has no losses."""

    def take(self, rows: Sequence[int]) -> Published:
        """Some of the rows."""
        picks = list(rows)
        return Published(
            ids=tuple(self.ids[i] for i in picks),
            sources=self.sources,
            mixtures_NM=self.mixtures_NM[picks],
            losses={name: values[picks] for name, values in self.losses.items()},
            failed=tuple(self.failed[i] for i in picks),
        )

    def must_have(self, sources: Sequence[str]) -> Floats:
        """The mixtures, in another order of sources. Raises DataError when they are not the same sources."""
        if set(sources) != set(self.sources):
            apart = sorted(set(sources) ^ set(self.sources))
            raise DataError(f"two tables do not have the same sources: {', '.join(apart)}")
        return self.mixtures_NM[:, [self.sources.index(name) for name in sources]]

    def table(self, target: Mapping[str, float], *, held_out: bool = False) -> RunTable:
        """As runs of one size. Natural shares are taken to be the mean of all mixtures."""
        mean = self.mixtures_NM.mean(axis=0)
        sources = tuple(Source(name=n, tokens=round(1e9 * share)) for n, share in zip(self.sources, mean, strict=True))
        problem = MixtureProblem(sources=sources, target=target, fidelities=(Fidelity(name=TOP, cost=1.0),))
        runs = []
        for i, mixture in enumerate(self.mixtures_NM):
            losses = {name: float(values[i]) for name, values in self.losses.items() if math.isfinite(values[i])}
            trial = Trial(
                mixture=tuple(mixture.tolist()), fidelity=TOP, seed=i, purpose="unseen" if held_out else "proxy"
            )
            runs.append(Run(trial=trial, losses=losses, failed=self.failed[i], cost=1.0))
        return RunTable(problem, runs)


def read(paths: Sequence[Path]) -> Published:
    """One table out of files: those with the same columns follow each other, mixtures and losses are joined.

    Raises DataError, naming file and column, for what is no table of runs.
    """
    parts = [_file(path) for path in paths]
    both = [part for part in parts if _named(part, SHARES) and _named(part, LOSSES)]
    mixtures = [part for part in parts if _named(part, SHARES) and part not in both]
    losses = [part for part in parts if not _named(part, SHARES)]
    if losses and len(losses) != len(mixtures):
        text = f"{len(mixtures)} files hold mixtures only and {len(losses)} losses only: they do not make pairs"
        raise DataError(text, next_step="name the files in pairs, mixtures and losses, in one order")
    pairs = zip(mixtures, losses, strict=True) if losses else ((part, None) for part in mixtures)
    found = [_published(part) for part in both] + [_published(_joined(*pair)) for pair in pairs]
    if not found:
        raise DataError("no file holds mixtures", legal=f"columns that begin with {' or '.join(SHARES)}")
    return found[0] if len(found) == 1 else _after_each_other(found)


def write(table: RunTable, path: Path) -> None:
    """All runs as Parquet, a row each; `read` and `again` take it back."""
    import pyarrow as pa  # noqa: PLC0415  (0.2 s, only where tables are read or written)
    import pyarrow.parquet as pq  # noqa: PLC0415

    columns = list(dict.fromkeys(name for run in table for name in run.losses))
    rows = []
    for run in table:
        trial = run.trial
        shares = {f"mixture/{n}": p for n, p in zip(table.problem.names, trial.mixture, strict=True)}
        losses = {f"loss/{name}": run.losses.get(name) for name in columns}
        facts = {name: getattr(trial, name) for name in ("fidelity", "seed", "purpose", "label")}
        more = {name: getattr(run, name) for name in ("failed", "cost", "seconds", "tokenizer")}
        rows.append({"run": trial.key, **facts, **shares, **losses, **more})
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(pa.Table.from_pylist(rows), temporary)
    temporary.replace(path)


def again(problem: MixtureProblem, path: Path) -> RunTable:
    """The table that `write` wrote, to go on with."""
    rows = _file(path)
    table = RunTable(problem)
    for i in range(len(rows["run"])):
        losses = {
            name[5:]: values[i] for name, values in rows.items() if name.startswith("loss/") and values[i] is not None
        }
        trial = Trial(
            mixture=tuple(float(rows[f"mixture/{name}"][i]) for name in problem.names),
            **{name: rows[name][i] for name in ("fidelity", "seed", "purpose", "label")},
        )
        facts = {name: rows[name][i] for name in ("failed", "cost", "seconds", "tokenizer")}
        table.tell(Run(trial=trial, losses=losses, **facts))
    return table


def _file(path: Path) -> Columns:
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.csv as csv  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    if not path.is_file():
        raise DataError("no such file", where=str(path))
    try:
        table = pq.read_table(path) if path.suffix == ".parquet" else csv.read_csv(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"is no table that can be read: {error}", where=str(path), legal=".csv, .parquet") from error
    columns: Columns = {name: table.column(name).to_pylist() for name in table.column_names}
    if not _named(columns, SHARES) and not _named(columns, LOSSES):
        legal = f"columns that begin with {', '.join((*SHARES, *LOSSES))}"
        raise DataError("has neither mixtures nor losses", where=str(path), legal=legal)
    return columns


def _named(columns: Columns, starts: Sequence[str]) -> dict[str, str]:
    """Name -> column, of those that begin so."""
    found = {}
    for column in columns:
        start = next((s for s in starts if column.startswith(s)), None)
        if start is not None:
            found[column.removeprefix(start).removesuffix(SUFFIX)] = column
    return found


def _joined(mixtures: Columns, losses: Columns | None) -> Columns:
    """Both, by their first column."""
    if losses is None:
        return mixtures
    key, other = next(iter(mixtures)), next(iter(losses))
    place = {str(value): i for i, value in enumerate(losses[other])}
    if len(place) != len(losses[other]) or len(set(mixtures[key])) != len(mixtures[key]):
        raise DataError(f"the first column, '{key}', names a row twice: mixtures and losses cannot be joined by it")
    at = [place.get(str(value)) for value in mixtures[key]]
    more = {name: [None if i is None else values[i] for i in at] for name, values in losses.items() if name != other}
    return {**mixtures, **more}


def _published(columns: Columns) -> Published:
    shares, losses = _named(columns, SHARES), _named(columns, LOSSES)
    raw = np.array([columns[column] for column in shares.values()], dtype=np.float64).T
    sums = raw.sum(axis=1)
    bad = np.flatnonzero(~(np.abs(sums - 1) <= OFF) | (raw < 0).any(axis=1))
    ids = tuple(str(value) for value in next(iter(columns.values())))
    if len(bad):
        i = int(bad[0])
        raise DataError(
            f"row '{ids[i]}' is no mixture: shares from {raw[i].min():.4g} that sum to {sums[i]:.6g}",
            next_step="shares are fractions of 1: per cents must be divided by 100",
        )
    values = {name: np.array([_number(v) for v in columns[column]]) for name, column in losses.items()}
    failed = [_why(columns, values, i) for i in range(len(ids))]
    return Published(
        ids=ids,
        sources=tuple(shares),
        mixtures_NM=raw / sums[:, None],
        losses=values,
        failed=tuple(failed),
    )


def _why(columns: Columns, values: Mapping[str, Floats], i: int) -> str | None:
    """Why a row counts for nothing."""
    said = columns["failed"][i] if "failed" in columns else None
    if said:
        return str(said)
    found = [one[i] for one in values.values()]
    return "no losses" if found and not any(math.isfinite(value) for value in found) else None


def _number(value: Any) -> float:
    try:
        return math.nan if value is None else float(value)
    except (TypeError, ValueError):
        return math.nan


def _after_each_other(parts: Sequence[Published]) -> Published:
    sources = parts[0].sources
    names = [name for name in parts[0].losses if all(name in part.losses for part in parts)]
    return Published(
        ids=tuple(i for part in parts for i in part.ids),
        sources=sources,
        mixtures_NM=np.vstack([part.must_have(sources) for part in parts]),
        losses={name: np.concatenate([part.losses[name] for part in parts]) for name in names},
        failed=tuple(why for part in parts for why in part.failed),
    )


def target_of(published: Published, named: Sequence[str]) -> dict[str, float]:
    """Columns that were asked for, alike in weight; all where none was. Raises UsageError with what is there."""
    known = list(published.losses)
    if not known:
        raise UsageError("the runs to fit have no losses", legal=f"columns that begin with {', '.join(LOSSES)}")
    found = []
    for name in named or known:
        matches = [column for column in known if column == name] or [c for c in known if c.endswith(name)]
        if len(matches) != 1:
            what = "no column of losses is called" if not matches else f"{len(matches)} columns of losses end in"
            raise UsageError(f"{what} '{name}'", legal=", ".join(known), where="--target")
        found += matches
    return dict.fromkeys(found, 1 / len(found))
