"""Finished runs by what they took and what they reached: a table, the front of quality against CO2, what changes saved.

Runs that differ by their seed only are one line. The first run's recipe is the one that the others are held against.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from lmworks.core import recipe as recipes
from lmworks.core.energy.footprint import JOULES_PER_KWH, Range, break_even_requests, front, inference_flops, kwh_of
from lmworks.core.energy.grid import Intensity, intensity_of, mixed, near_place, place_code
from lmworks.core.errors import UsageError
from lmworks.core.journal import rows
from lmworks.core.run import RunFolder

NO_CHANGE = (
    "seed", "sinks", "samples", "checkpoints", "threads", "max_minutes", "validation.every", "energy.on",
    "energy.counts", "energy.period", "energy.processor_watts", "energy.idle_seconds",
)  # fmt: skip
"""Settings that make no other recipe."""
REQUEST_TOKENS = 500
"""Tokens of a request, read and written, in the break-even of training against use."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """One run."""

    path: Path
    recipe: dict[str, Any]
    energy: dict[str, Any]
    """As in record.json."""
    quality: float
    """Last value of the metric."""
    parameters: int
    tokens: int
    hardware: str
    done: bool


@dataclass(frozen=True, kw_only=True)
class Line:
    """Runs of one recipe."""

    name: str
    runs: Sequence[Spent]
    changes: Sequence[str]
    """What their recipe, or their hardware, has otherwise than the first line's."""

    def figure(self, key: str, within: str | None = None) -> Range | None:
        """Mean over runs of a range in their energy facts, or in one of the tables in them; None where one has none."""
        found = [_in(run.energy, within).get(key) for run in self.runs]
        there = [each for each in found if each is not None]
        if len(there) < len(found):
            return None
        return Range(*(mean(each[end] for each in there) for end in ("low", "central", "high")))

    @property
    def quality(self) -> float:
        """Mean over runs."""
        return mean(run.quality for run in self.runs)

    @property
    def spread(self) -> float:
        """Of the quality over runs: greatest less least."""
        found = [run.quality for run in self.runs]
        return max(found) - min(found)

    def kg(self, grid: Intensity) -> Range:
        """What the same energy would have come to on another grid, with the run's own PUE."""
        kwh, pue = self.figure("kwh"), self.figure("pue")
        assert kwh is not None, "every run has its energy"
        assert pue is not None, "every run has a PUE"
        return kwh.times(pue).times(grid.grams).times(1e-3)


def _in(energy: dict[str, Any], table: str | None) -> dict[str, Any]:
    return energy if table is None else energy.get(table) or {}


# --- reading ----------------------------------------------------------------------------------------------------------


def spent_of(path: Path, metric: str) -> Spent:
    """What a run folder tells. Raises UsageError for a folder that holds no run, or one without energy or metric."""
    folder = RunFolder(path)
    if not folder.exists() or not folder.record.is_file():
        raise UsageError("holds no run", where=str(path), next_step="name folders that lmworks train has made")
    record = json.loads(folder.record.read_text(encoding="utf-8"))
    if record.get("energy") is None:
        raise UsageError(
            "nothing was counted in this run",
            where=str(path),
            next_step="train it with energy.on = true; runs of lmworks before energy was counted have none",
        )
    last = {name: value for row in rows(folder.metrics) for name, value in row.items()}
    if not isinstance(last.get(metric), int | float):
        numbers = sorted(name for name, value in last.items() if isinstance(value, float) and name.startswith("val"))
        raise UsageError(f"has no {metric}", where=str(path), legal=", ".join(numbers) or None)
    hardware = record["hardware"]
    return Spent(
        path=path,
        recipe=tomllib.loads(folder.recipe.read_text(encoding="utf-8")),
        energy=record["energy"],
        quality=float(last[metric]),
        parameters=int(record["parameters"]),
        tokens=int(last["tokens"]),
        hardware=str(hardware.get("gpu") or hardware["processor"]),
        done=folder.is_done(),
    )


def grid_of(energy: dict[str, Any]) -> Intensity:
    """The grid that a run's CO2 was told with."""
    return Intensity(
        grams=Range(**energy["g_per_kwh"]),
        place=energy["place"],
        year=energy["year"],
        basis=energy["basis"],
        source=energy["source"],
        known=energy["place_known"],
        scope=energy.get("scope"),
    )


def lines_of(found: Sequence[Spent]) -> list[Line]:
    """Runs by recipe and hardware, in the order in which they first come."""
    grouped: dict[tuple[str, ...], list[Spent]] = {}
    for run in found:
        grouped.setdefault(tuple(_changes(found[0], run)), []).append(run)
    return [Line(name=group[0].path.name, runs=group, changes=changes) for changes, group in grouped.items()]


def _changes(first: Spent, run: Spent) -> list[str]:
    pairs = recipes.differences(run.recipe, first.recipe)
    found = [
        f"{path} {there!r} -> {here!r}"
        for path, (here, there) in pairs.items()
        if not any(path == name or path.startswith(f"{name}.") for name in NO_CHANGE)
    ]
    return found + ([f"{first.hardware} -> {run.hardware}"] if run.hardware != first.hardware else [])


def grids_of(countries: Sequence[str]) -> list[Intensity]:
    """Further grids to tell CO2 with. Raises UsageError for a country that is not in the table."""
    for country in countries:
        if place_code(country) is None:
            raise UsageError(f"'{country}' is not in the table of grids{near_place(country)}")
    return [intensity_of(country) for country in countries]


# --- comparing --------------------------------------------------------------------------------------------------------


def report(
    paths: Sequence[Path],
    *,
    metric: str = "val_bits_per_byte",
    countries: Sequence[str] = (),
    allow_mixed: bool = False,
) -> dict[str, Any]:
    """Lines of runs, each with energy, CO2, money and quality, what it saves against the first one, and the front.

    Raises UsageError when the runs' CO2 was told with grids of other years, or counted in other ways, unless
    `allow_mixed`.
    """
    found = [spent_of(path, metric) for path in paths]
    reasons = mixed(grid_of(run.energy) for run in found)
    currencies = sorted({run.energy["money"]["currency"] for run in found if run.energy["money"] is not None})
    reasons += [f"prices in {' and '.join(currencies)}"] if len(currencies) > 1 else []
    reasons += (
        ["grids by the hour and means of a year"] if len({bool(r.energy.get("hourly")) for r in found}) > 1 else []
    )
    reasons += ["meters of machines and of processes"] if len({run.energy["counts"] for run in found}) > 1 else []
    if reasons and not allow_mixed:
        raise UsageError(
            f"these runs do not compare: {' and '.join(reasons)}",
            next_step="--mixed to compare all the same; --country X beside it tells CO2 of all on one grid",
        )
    lines, grids = lines_of(found), grids_of(countries)
    base = lines[0]
    points = {str(i): (_central(line, "kg_co2e"), line.quality) for i, line in enumerate(lines)}
    best = front(points)
    told = [_told(line, base, grids) | {"on_front": str(i) in best} for i, line in enumerate(lines)]
    return {
        "metric": metric,
        "mixed": reasons,
        "label": _label(found),
        "lines": told,
        "beside": beside(told) if len(told) > 1 else [],
        "tokens_and_kwh": correlation([run.tokens for run in found], [run.energy["kwh"]["central"] for run in found]),
    }


def _central(line: Line, key: str) -> float:
    found = line.figure(key)
    assert found is not None, key
    return found.central


def _label(found: Sequence[Spent]) -> str:
    methods = sorted({run.energy["method"] for run in found})
    flag = "" if all(run.energy["place_known"] for run in found) else "; PLACE NOT KNOWN, the world's mean grid"
    return f"energy {' and '.join(methods)}{flag}"


def _told(line: Line, base: Line, grids: Sequence[Intensity]) -> dict[str, Any]:
    """A line as plain values; `against`: what it saves of the first line's central figures, and its lost quality."""
    kwh, kg, money = line.figure("kwh"), line.figure("kg_co2e"), line.figure("money")
    assert kwh is not None, "every run has its energy"
    assert kg is not None, "every run has its CO2"
    made, above = line.figure("kg_co2e", "embodied"), line.figure("kwh", "above_idle")
    energy = line.runs[0].energy
    return {
        "name": line.name,
        "runs": [str(run.path) for run in line.runs],
        "done": all(run.done for run in line.runs),
        "changes": list(line.changes),
        "hardware": line.runs[0].hardware,
        "parameters": line.runs[0].parameters,
        "tokens": mean(run.tokens for run in line.runs),
        "seconds": mean(run.energy["seconds"] for run in line.runs),
        "quality": line.quality,
        "spread": line.spread,
        "method": energy["method"],
        "kwh": kwh.to_json(),
        "kg_co2e": kg.to_json(),
        "kg_co2e_embodied": None if made is None else made.to_json(),
        "kwh_above_idle": None if above is None else above.to_json(),
        "mean_watts": mean(run.energy["mean_watts"] or 0.0 for run in line.runs),
        "grid": grid_of(energy).in_words() + (" by the hour" if energy.get("hourly") else ""),
        "pue": energy["pue"]["central"],
        "money": None if money is None else {**money.to_json(), "currency": energy["money"]["currency"]},
        "joules_per_token": energy["joules_per_token"],
        "tokens_per_joule": mean(run.tokens for run in line.runs) / (kwh.central * JOULES_PER_KWH),
        "elsewhere": {grid.in_words(): line.kg(grid).to_json() for grid in grids},
        "against": None if line is base else _against(line, base),
    }


def _against(line: Line, base: Line) -> dict[str, Any]:
    saved = 1 - _central(line, "kwh") / _central(base, "kwh")
    kg = _central(base, "kg_co2e") - _central(line, "kg_co2e")
    money, paid = base.figure("money"), line.figure("money")
    per_flop = mean(run.energy["joules_per_flop"] or 0.0 for run in line.runs)
    fewer = base.runs[0].parameters - line.runs[0].parameters
    per_request = kwh_of(inference_flops(max(fewer, 0), REQUEST_TOKENS) * per_flop)
    extra = _central(line, "kwh") - _central(base, "kwh")
    requests = break_even_requests(extra, per_request)
    return {
        "kwh_saved": saved,
        "kg_co2e_saved": kg,
        "kg_co2e_share_saved": kg / _central(base, "kg_co2e"),
        "money_saved": None if money is None or paid is None else money.central - paid.central,
        "quality_lost": line.quality - base.quality,
        "within_spread": line.quality - base.quality <= base.spread,
        "break_even_requests": requests if math.isfinite(requests) else None,
    }


BESIDE = (
    ("time", "s", "seconds"),
    ("mean power", "W", "mean_watts"),
    ("energy", "kWh", "kwh"),
    ("energy above idle", "kWh", "kwh_above_idle"),
    ("CO2 of the energy", "kg", "kg_co2e"),
    ("CO2 of making the machines", "kg", "kg_co2e_embodied"),
    ("money", "", "money"),
    ("tokens per joule", "", "tokens_per_joule"),
    ("quality", "", "quality"),
)
"""What two machines, or two recipes, are compared by: words, unit, key of a line."""


def beside(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each quantity of BESIDE that a line has: its central figures line by line, and what each is of the first
    line's. None where a line does not have it, or where the first line has 0."""
    found = []
    for words, unit, key in BESIDE:
        values = [_middle(line[key]) for line in lines]
        if any(value is not None for value in values):
            first = values[0]
            ratios = [value / first if value is not None and first else None for value in values]
            found.append({"what": words, "unit": unit, "key": key, "values": values, "ratios": ratios})
    return found


def _middle(figure: Any) -> float | None:
    if figure is None:
        return None
    return float(figure["central"] if isinstance(figure, dict) else figure)


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's r; None for fewer than three points, or where one of the two does not move."""
    if len(x) < 3 or min(x) == max(x) or min(y) == max(y):
        return None
    return float(np.corrcoef(np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64))[0, 1])


# --- a picture --------------------------------------------------------------------------------------------------------


def draw(content: dict[str, Any], path: Path) -> None:
    """Quality against CO2 with their ranges; the front is joined."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  (0.4 s, and only when asked for)
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, line in enumerate(content["lines"]):
        kg = line["kg_co2e"]
        ends = [[kg["central"] - kg["low"]], [kg["high"] - kg["central"]]]
        axes.errorbar(kg["central"], line["quality"], xerr=ends, yerr=line["spread"] / 2, fmt="o", color=f"C{i}")
        axes.annotate(line["name"], (kg["central"], line["quality"]), xytext=(5, 5), textcoords="offset points")
    best = sorted((line["kg_co2e"]["central"], line["quality"]) for line in content["lines"] if line["on_front"])
    axes.plot([kg for kg, _ in best], [quality for _, quality in best], "--", color="0.5", label="front")
    axes.set_xscale("log")
    axes.set_xlabel(f"kg CO2e ({content['label']})")
    axes.set_ylabel(f"{content['metric']} (less is better)")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
