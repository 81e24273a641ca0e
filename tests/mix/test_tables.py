"""Tables of runs as files: published ones, our own, and what is no table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lmworks.core.errors import DataError, UsageError
from lmworks.mix import tables
from lmworks.mix.advise import Asked
from lmworks.mix.apply import advise_from, predict
from tests.mix.planted import losses, mixtures, problem, table


def published(folder: Path, name: str, count: int, *, seed: int, with_losses: bool = True) -> list[Path]:
    """Two CSV files as RegMix published them: mixtures, and losses in another order of rows."""
    p_NM = mixtures(problem(4), count, seed)
    found = losses(p_NM, noise=0.003, seed=seed)
    shares = [",".join(["index", *(f"train_the_s{j}" for j in range(4))])]
    shares += [f"{i + 1}," + ",".join(f"{share:.3f}" for share in row) for i, row in enumerate(p_NM)]
    paths = [folder / f"{name}_mixture.csv"]
    paths[0].write_text("\n".join(shares) + "\n")
    if with_losses:
        lines = [",".join(["index", *(f"metric/the_s{j}_val_loss" for j in range(4))])]
        rows = [f"{i + 1}," + ",".join(f"{found[f's{j}'][i]:.6f}" for j in range(4)) for i in range(count)]
        paths.append(folder / f"{name}_loss.csv")
        paths[1].write_text("\n".join([*lines, *reversed(rows)]) + "\n")
    return paths


def test_pairs_of_files_are_joined_by_their_first_column(tmp_path: Path) -> None:
    found = tables.read(published(tmp_path, "a", 30, seed=0))
    assert found.sources == ("the_s0", "the_s1", "the_s2", "the_s3")
    assert list(found.losses) == list(found.sources)
    assert np.abs(found.mixtures_NM.sum(axis=1) - 1).max() < 1e-12
    true = losses(mixtures(problem(4), 30, 0), noise=0.003, seed=0)
    assert found.losses["the_s2"] == pytest.approx(true["s2"], abs=1e-6)


def test_files_of_the_same_columns_follow_each_other(tmp_path: Path) -> None:
    a, b = published(tmp_path, "a", 10, seed=0), published(tmp_path, "b", 12, seed=1)
    found = tables.read([a[0], b[0], a[1], b[1]])
    assert len(found.ids) == 22
    assert found.losses["the_s0"][10:] == pytest.approx(tables.read(b).losses["the_s0"])


def test_a_fit_is_applied_to_a_table_that_it_has_not_seen(tmp_path: Path) -> None:
    fit = tables.read(published(tmp_path, "fit", 30, seed=0))
    paths = published(tmp_path, "other", 40, seed=1)
    other = tables.read(paths)
    content = predict(fit, other, target=["s0"], surrogate="log-linear")
    told = content["columns"]["the_s0"]
    assert told["spearman"] > 0.95
    assert told["judged"] == 40
    assert told["predicted_best"] in content["rows"]
    assert content["mean_spearman"] == told["spearman"]
    blind = predict(fit, tables.read(paths[:1]), target=["s0"], surrogate="log-linear")
    assert blind["columns"]["the_s0"]["predicted"] == told["predicted"]
    assert blind["columns"]["the_s0"]["spearman"] is None


def test_what_was_learnt_from_is_not_predicted(tmp_path: Path) -> None:
    fit = tables.read(published(tmp_path, "fit", 30, seed=0))
    with pytest.raises(DataError, match="every mixture of the table was learnt from"):
        predict(fit, fit, target=[], surrogate="ols")


def test_advice_from_published_runs(tmp_path: Path) -> None:
    fit = tables.read(published(tmp_path, "fit", 30, seed=0))
    content = advise_from(fit, target=["s0", "s1"], asked=Asked(surrogate="log-linear", simulated=2000, resamples=3))
    assert sum(one["share"] for one in content["sources"]) == pytest.approx(1.0)
    assert content["sources"][0]["share"] + content["sources"][1]["share"] > 0.7
    assert "unverified" in content["recommendation"]["warnings"][-1]


def test_ours_and_back(tmp_path: Path) -> None:
    runs = table(problem(3), 6, unseen=2, noise=0.1)
    tables.write(runs, tmp_path / "runs.parquet")
    assert list(tables.again(problem(3), tmp_path / "runs.parquet")) == list(runs)
    assert tables.read([tmp_path / "runs.parquet"]).sources == ("s0", "s1", "s2")


def test_rows_without_losses_are_failed_ones(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("run,mixture/a,mixture/b,loss/a\n1,0.5,0.5,2.0\n2,0.25,0.75,\n3,0.1,0.9,nan\n")
    found = tables.read([path])
    assert found.failed == (None, "no losses", "no losses")
    assert found.table({"a": 1.0}).excluded() == {"no losses": 2}


def write(path: Path, text: str) -> list[Path]:
    path.write_text(text)
    return [path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run,mixture/a,mixture/b,loss/a\nx,50,50,1.0\n", r"row 'x' is no mixture: .* sum to 100(.|\n)*divided by 100"),
        ("run,mixture/a,mixture/b,loss/a\nx,-0.5,1.5,1.0\n", "row 'x' is no mixture: shares from -0.5"),
        ("run,a,b\n1,2,3\n", "has neither mixtures nor losses"),
        ("run,loss/a\n1,2\n", "0 files hold mixtures only and 1 losses only"),
    ],
)
def test_what_is_no_table_of_runs(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tables.read(write(tmp_path / "t.csv", text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        tables.read([tmp_path / "none.csv"])
    with pytest.raises(DataError, match="no table that can be read"):
        tables.read(write(tmp_path / "bad.parquet", "not parquet"))
    twice = write(tmp_path / "m.csv", "i,mixture/a,mixture/b\n1,0.5,0.5\n1,0.4,0.6\n")
    with pytest.raises(DataError, match="names a row twice"):
        tables.read([*twice, *write(tmp_path / "l.csv", "i,loss/a\n1,2.0\n2,3.0\n")])


def test_columns_of_the_target(tmp_path: Path) -> None:
    found = tables.read(published(tmp_path, "a", 5, seed=0))
    assert tables.target_of(found, ["s1"]) == {"the_s1": 1.0}
    assert tables.target_of(found, []) == dict.fromkeys(found.losses, 0.25)
    with pytest.raises(UsageError, match="no column of losses is called 'x'"):
        tables.target_of(found, ["x"])
    blind = tables.read(published(tmp_path, "b", 5, seed=0, with_losses=False))
    with pytest.raises(UsageError, match="have no losses"):
        tables.target_of(blind, [])
    other = tables.read(write(tmp_path / "o.csv", "i,mixture/x,mixture/y,loss/x\n1,0.5,0.5,1.0\n"))
    with pytest.raises(DataError, match="do not have the same sources"):
        other.must_have(found.sources)
