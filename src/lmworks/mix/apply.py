"""Runs that were made elsewhere: fit a surrogate to one table, and say what it makes of another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmworks.core.errors import DataError
from lmworks.maths.ranks import spearman
from lmworks.mix import tables
from lmworks.mix.advise import Asked, advise
from lmworks.mix.learn import Learnt, learn
from lmworks.mix.problem import TOP, Floats
from lmworks.mix.runs import Rows
from lmworks.mix.tables import Published

Content = dict[str, Any]


def predict(seen: Published, asked: Published, *, target: Sequence[str], surrogate: str, seed: int = 0) -> Content:
    """Learn from runs, predict each row of a table that was not learnt from, and compare where the table has losses.

    One surrogate for each column of `target`, all columns where none is named. Raises DataError and UsageError for
    tables that are the same runs, or that do not have the same sources.
    """
    columns = tables.target_of(seen, target)
    mixtures = asked.must_have(seen.sources)
    _must_be_others(seen, mixtures)
    learnt = learn(seen.table(columns), TOP, surrogate=surrogate, seed=seed)
    told = {column: _column(learnt, column, mixtures, asked) for column in columns}
    rank = [one["spearman"] for one in told.values() if one["spearman"] is not None]
    return {
        "do": "mix",
        "fit": {"runs": len(learnt.mixtures), "sources": list(seen.sources)},
        "rows": list(asked.ids),
        "columns": told,
        "mean_spearman": float(np.mean(rank)) if rank else None,
    }


def advise_from(seen: Published, *, target: Sequence[str], asked: Asked) -> Content:
    """Learn from runs, and recommend a mixture for the mean of the target's columns. Nothing is capped."""
    table = seen.table(tables.target_of(seen, target))
    advice = advise(table, TOP, asked)
    spread = advice.spread or tuple((share, share) for share in advice.mixture)
    sources = [
        {"name": n, "natural": q, "share": p, "low": low, "high": high, "cap": 1.0, "tokens": None, "epochs": None}
        for n, q, p, (low, high) in zip(
            seen.sources, table.problem.natural.tolist(), advice.mixture, spread, strict=True
        )
    ]
    return {
        "do": "mix",
        "fit": {"runs": len(table), "sources": list(seen.sources)},
        "sources": sources,
        "target": dict(table.problem.target),
        "recommendation": {
            "mixture": list(advice.mixture),
            "rule": advice.rule,
            "predicted": advice.predicted,
            "sd": advice.sd,
            "gain": advice.gain,
            "verified": False,
            "warnings": [*advice.warnings, "no run was made with it: it is unverified"],
        },
        **advice.facts,
    }


def _must_be_others(seen: Published, mixtures_NM: Floats) -> None:
    """A run that was learnt from says nothing about runs that were not."""
    known = {tuple(row) for row in seen.mixtures_NM.round(9).tolist()}
    same = sum(tuple(row) in known for row in mixtures_NM.round(9).tolist())
    if same == len(mixtures_NM):
        raise DataError(
            "every mixture of the table was learnt from: what is predicted of it shows nothing",
            next_step="predict a table of other runs, or leave --predict out for cross-validation",
        )


def _column(learnt: Learnt, column: str, mixtures: Floats, asked: Published) -> Content:
    told = learnt.joint.parts[column].predict(mixtures)
    true_N = asked.losses.get(column)
    found: Content = {
        "surrogate": learnt.surrogates[column].name,
        "cross_validation": learnt.as_json()[column]["cross_validation"],
        "predicted": told.mean_N.tolist(),
        "sd": told.sd_N.tolist(),
        "predicted_best": asked.ids[int(told.mean_N.argmin())],
        "spearman": None,
    }
    there = None if true_N is None else np.isfinite(true_N)
    if true_N is None or there is None or there.sum() < 2:
        return found
    judge = Rows(mixtures[there], true_N[there], held_out=True)
    guess = told.mean_N[there]
    ids = [name for name, known in zip(asked.ids, there, strict=True) if known]
    order = np.argsort(judge.values_N, kind="stable")
    rank = spearman(guess, judge.values_N)
    return found | {
        "spearman": rank if math.isfinite(rank) else None,
        "judged": len(judge),
        "true": judge.values_N.tolist(),
        "true_best": ids[int(order[0])],
        "rank_of_predicted_best": int(np.flatnonzero(order == int(guess.argmin()))[0]),
    }
