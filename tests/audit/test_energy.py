"""Runs side by side: lines, what changes saved, what may not be compared, files of power, the card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from lmworks.audit.energy import correlation, draw, replay, report
from lmworks.core.energy.footprint import Range
from lmworks.core.errors import DataError, UsageError
from lmworks.train.energy import FIELDS, PHASES, Meter, Metering, told


def finished(
    folder: Path,
    *,
    joules: float,
    quality: float,
    parameters: int = 1000,
    tokens: int = 1000,
    hardware: str = "T4",
    done: bool = True,
    model: int = 4,
    seed: int = 1,
    **energy: Any,
) -> Path:
    """A run folder as the trainer leaves it, as far as the report reads it."""
    folder.mkdir(parents=True)
    settings = Metering(**energy)
    account = {phase: [0.0] * len(FIELDS) for phase in PHASES}
    account["train"] = [joules / 2, joules, 2 * joules, 0.0, 10.0]
    facts = told(account, settings, Meter([]), tokens=tokens, flops=6.0 * parameters * tokens)
    recipe = {"do": "train", "seed": seed, "model": {"n_layers": model}, "energy": energy}
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe))
    record = {"hardware": {"gpu": hardware, "processor": "x"}, "parameters": parameters, "energy": facts}
    (folder / "record.json").write_text(json.dumps(record))
    row = {"step": 1, "tokens": tokens, "val_bits_per_byte": quality, "val_loss": 2 * quality}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    if done:
        (folder / "summary.json").write_text("{}")
    return folder


KWH = 3.6e6


def test_seeds_are_one_line_and_changes_are_named(tmp_path: Path) -> None:
    paths = [
        finished(tmp_path / "a1", joules=4 * KWH, quality=2.0, seed=1, country="FRA", price="0.1 EUR/kWh"),
        finished(tmp_path / "a2", joules=6 * KWH, quality=2.2, seed=2, country="FRA", price="0.1 EUR/kWh"),
        finished(
            tmp_path / "b", joules=2 * KWH, quality=2.25, model=2, parameters=500, country="FRA", price="0.1 EUR/kWh"
        ),
    ]
    found = report(paths, countries=["Poland"])
    a, b = found["lines"]
    assert (len(a["runs"]), len(b["runs"])) == (2, 1)
    assert a["kwh"] == {"low": 2.5, "central": 5.0, "high": 10.0}
    assert a["quality"] == pytest.approx(2.1)
    assert a["spread"] == pytest.approx(0.2)
    assert b["changes"] == ["model.n_layers 4 -> 2"]
    assert b["against"]["kwh_saved"] == pytest.approx(0.6)
    assert b["against"]["money_saved"] == pytest.approx(0.3)
    assert b["against"]["kg_co2e_share_saved"] == pytest.approx(0.6)
    assert b["against"]["quality_lost"] == pytest.approx(0.15)
    assert b["against"]["within_spread"]
    assert (a["on_front"], b["on_front"]) == (True, True)
    (poland,) = b["elsewhere"].values()
    assert poland["central"] == pytest.approx(2 * 0.6619, rel=1e-3)
    assert found["label"] == "energy modelled"
    assert found["tokens_and_kwh"] is None, "tokens do not move"


def test_two_gpus_compared(tmp_path: Path) -> None:
    slow = finished(tmp_path / "t4", joules=4 * KWH, quality=2.0, country="FRA")
    fast = finished(tmp_path / "a100", joules=KWH, quality=2.0, hardware="A100", country="FRA")
    _, line = report([slow, fast])["lines"]
    assert line["changes"] == ["T4 -> A100"]
    assert line["against"]["kwh_saved"] == pytest.approx(0.75)
    assert line["against"]["quality_lost"] == 0


def test_a_cleaner_grid_is_a_change(tmp_path: Path) -> None:
    here = finished(tmp_path / "a", joules=KWH, quality=2.0, country="POL")
    there = finished(tmp_path / "b", joules=KWH, quality=2.0, country="SWE")
    _, line = report([here, there])["lines"]
    assert line["changes"] == ["energy.country 'POL' -> 'SWE'"]
    assert line["against"]["kwh_saved"] == 0
    assert line["against"]["kg_co2e_share_saved"] > 0.9


def test_training_longer_for_a_smaller_model_pays_back(tmp_path: Path) -> None:
    big = finished(tmp_path / "a", joules=KWH, quality=2.0, parameters=2_000_000, country="FRA")
    small = finished(tmp_path / "b", joules=2 * KWH, quality=2.0, parameters=1_000_000, model=2, country="FRA")
    _, line = report([big, small])["lines"]
    per_flop = 2 * KWH / (6 * 1e6 * 1000)
    assert line["against"]["break_even_requests"] == pytest.approx(KWH / (2 * 1e6 * 500 * per_flop))
    other = report([small, big])["lines"][1]
    assert other["against"]["break_even_requests"] == 0


@pytest.mark.parametrize(
    ("energy", "words"),
    [
        ({"intensity": "0 g/kWh", "intensity_year": 2023, "basis": "market"}, "location-based and market-based"),
        ({"intensity": "50 g/kWh", "intensity_year": 2019}, "grids of the years 2019, 2023"),
        ({"intensity": "50 g/kWh"}, "grids of the years 2023, not given"),
        ({"country": "FRA", "price": "0.1 USD/kWh"}, "prices in EUR and USD"),
        ({"country": "FRA", "counts": "process"}, "meters of machines and of processes"),
    ],
)
def test_what_does_not_compare_is_refused_without_a_flag(energy: dict[str, Any], words: str, tmp_path: Path) -> None:
    one = finished(tmp_path / "a", joules=KWH, quality=2.0, country="FRA", price="0.1 EUR/kWh")
    two = finished(tmp_path / "b", joules=KWH, quality=2.0, **energy)
    with pytest.raises(UsageError, match=words):
        report([one, two])
    assert words.split(" and ")[0] in " ".join(report([one, two], allow_mixed=True)["mixed"])


def test_a_place_that_is_not_known_is_in_the_label(tmp_path: Path) -> None:
    found = report([finished(tmp_path / "a", joules=KWH, quality=2.0)])
    assert "PLACE NOT KNOWN" in found["label"]


def test_runs_that_tell_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        report([tmp_path])
    run = finished(tmp_path / "a", joules=KWH, quality=2.0)
    with pytest.raises(UsageError, match="has no mood") as caught:
        report([run], metric="mood")
    assert "val_loss" in str(caught.value)
    with pytest.raises(UsageError, match="'Poland1' is not in the table of grids; did you mean 'Poland'"):
        report([run], countries=["Poland1"])
    (run / "record.json").write_text(json.dumps({"hardware": {}, "parameters": 1}))
    with pytest.raises(UsageError, match="nothing was counted"):
        report([run])


def test_the_picture(tmp_path: Path) -> None:
    paths = [finished(tmp_path / name, joules=(1 + i) * KWH, quality=2.0, model=i) for i, name in enumerate("ab")]
    draw(report(paths), tmp_path / "deep" / "x.png")
    assert (tmp_path / "deep" / "x.png").read_bytes().startswith(b"\x89PNG")


def test_correlation() -> None:
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
    assert correlation([1, 2], [2, 4]) is None
    assert correlation([1, 2, 3], [5, 5, 5]) is None


# --- files of power ---------------------------------------------------------------------------------------------------


def test_a_recorded_file_gives_its_sum(tmp_path: Path) -> None:
    path = tmp_path / "power.csv"
    path.write_text("note,time (ms),power_kW\n" + "".join(f"x,{1000 * i},0.1\n" for i in range(3601)))
    found = replay(path)
    assert found["kwh"] == pytest.approx(0.1, abs=1e-9)
    assert (found["seconds"], found["gap_seconds"], found["missing"], found["clamped"]) == (3600.0, 0, 0, 0)


def test_gaps_missing_and_negative_samples_are_told(tmp_path: Path) -> None:
    path = tmp_path / "power.csv"
    path.write_text("time (s),power (W)\n0,100\n1,-5\n2,\n3,100\n60,100\n61,100\n")
    found = replay(path, period=1.0)
    assert (found["gap_seconds"], found["missing"], found["clamped"]) == (57.0, 1, 1)
    assert found["joules"] == pytest.approx(50 + 100 + 100)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("time,power\n0,1\n1,1\n", r"power\.csv:1: no column has a unit of time: time, power"),
        ("time (s),power\n0,1\n1,1\n", "no column has a unit of power"),
        ("time (s),power (W)\n0,1\n1,much\n", r"power\.csv:3: is no sample: 1,much"),
        ("time (s),power (W)\n0,1\n1\n", r"is no sample: 1"),
        ("time (s),power (W)\n0,1\n5,1\n4,1\n", r"power\.csv:4: time runs backwards"),
        ("time (s),power (W)\n0,1\n", "fewer than two samples"),
    ],
)
def test_a_file_without_sense_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "power.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        replay(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        replay(tmp_path / "none.csv")


def test_ranges_come_back_from_json(tmp_path: Path) -> None:
    run = finished(tmp_path / "a", joules=KWH, quality=2.0)
    facts = json.loads((run / "record.json").read_text())["energy"]
    assert Range(**facts["g_per_kwh"]).central == 481.0
