"""lmworks mix as a person meets it: tables of runs, recipes, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.mix.test_tables import published


def test_predicting_a_table(lmworks: Command, tmp_path: Path) -> None:
    fit = [word for path in published(tmp_path, "fit", 30, seed=0) for word in ("--fit", str(path))]
    other = [word for path in published(tmp_path, "other", 20, seed=1) for word in ("--predict", str(path))]
    answer = lmworks("mix", *fit, *other, "--target", "s0", "--surrogate", "log-linear", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["columns"]["the_s0"]["spearman"] > 0.9
    answer = lmworks("mix", *fit, *other, "--target", "s0", "--surrogate", "ols")
    assert "30 runs learnt from, 20 rows predicted" in answer.out


def test_a_mixture_from_a_table(lmworks: Command, tmp_path: Path) -> None:
    fit = [word for path in published(tmp_path, "fit", 30, seed=0) for word in ("--fit", str(path))]
    picture = tmp_path / "mixture.png"
    answer = lmworks("mix", *fit, "--target", "s0", "--surrogate", "log-linear", "--picture", str(picture))
    assert answer.code == 0, answer.err
    assert "the_s0" in answer.out
    assert "warning: no run was made with it: it is unverified" in answer.out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is no recipe"),
        (["--predict", "x.csv"], "--predict has no effect without --fit"),
        (["stdlib", "--fit", "x.csv"], "RECIPE has no effect with --fit"),
        (["--fit", "x.csv", "--predict", "y.csv", "--picture", "p.png"], "--picture has no effect with --predict"),
        (["no-such"], "no such file"),
    ],
)
def test_mistakes(lmworks: Command, words: list[str], message: str) -> None:
    answer = lmworks("mix", *words)
    assert answer.code == 2
    assert message in answer.err


def test_files_that_are_missing(lmworks: Command) -> None:
    answer = lmworks("mix", "--fit", "none.csv")
    assert answer.code == 1
    assert "none.csv: no such file" in answer.err


def test_a_recipe_is_checked(lmworks: Command) -> None:
    answer = lmworks("mix", "methods/regmix", "--check", "--set", "search.proxies=9")
    assert answer.code == 0, answer.err
    assert "proxies = 9" in answer.out
