"""Runs side by side: lines, what changes saved, what may not be compared, files of power, the card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from typer.testing import CliRunner

from lmworks.audit.energy import correlation, draw, report
from lmworks.audit.power import replay
from lmworks.cli.app import app
from lmworks.core.energy import embodied
from lmworks.core.energy.footprint import Range
from lmworks.core.errors import UsageError
from lmworks.train.energy import FIELDS, PHASES, Meter
from lmworks.train.hardware import Hardware
from lmworks.train.metering import Metering
from lmworks.train.sensors import NvmlPower
from lmworks.train.spent import told
from tests.train import toy
from tests.train.test_sensors import Clock


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


class Recorded:
    """As much of nvidia-ml-py as is asked for: a board whose power is what a file says, at a test's clock."""

    def __init__(self, path: Path, clock: Clock) -> None:
        lines = [line.split(",") for line in path.read_text().splitlines()[1:]]
        self.watts, self.clock = {float(at): float(watts) for at, watts in lines}, clock

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802  (NVIDIA's name)
        return round(1e3 * self.watts[self.clock.now])


def recorded(folder: Path, gpu: str, watts: list[float], *, quality: float) -> tuple[Path, Path]:
    """A run that was metered by a recorded file of power, a sample a second, and that file."""
    path = folder.with_suffix(".csv")
    path.write_text("time (s),power (W)\n" + "".join(f"{i},{power}\n" for i, power in enumerate(watts)))
    clock = Clock()
    board = NvmlPower(Recorded(path, clock), "a", gpu, period=1.0, clock=clock)
    meter = Meter([board], hardware=Hardware(own=[embodied.gpu(gpu)]), clock=clock)
    with meter.phase("train"):
        for _ in watts[1:]:
            clock.now += 1.0
            meter.read(soon=True)
    run = finished(folder, joules=1.0, quality=quality, hardware=gpu, tokens=200_000)
    settings = Metering(country="FRA", price="0.2 EUR/kWh", pue=1.2)
    facts = told(meter.account(), settings, meter, tokens=200_000, flops=1e15)
    record = json.loads((run / "record.json").read_text()) | {"energy": facts}
    (run / "record.json").write_text(json.dumps(record))
    return run, path


def test_two_gpus_compared(tmp_path: Path) -> None:
    t4, of_t4 = recorded(tmp_path / "t4", "Tesla T4", [70.0, *[66.0, 72.0] * 200], quality=2.0)
    a100, of_a100 = recorded(tmp_path / "a100", "NVIDIA A100-SXM4-40GB", [90.0, *[310.0] * 40], quality=2.02)
    content = report([t4, a100])
    slow, fast = content["lines"]
    assert slow["kwh"]["central"] == pytest.approx(replay(of_t4)["kwh"])
    assert fast["kwh"]["central"] == pytest.approx(replay(of_a100)["kwh"])
    assert fast["changes"] == ["Tesla T4 -> NVIDIA A100-SXM4-40GB"]
    rows = {row["key"]: row for row in content["beside"]}
    assert rows["seconds"]["values"] == [400.0, 40.0]
    assert rows["seconds"]["ratios"] == [1.0, pytest.approx(0.1)]
    assert rows["mean_watts"]["values"] == pytest.approx(
        [replay(of_t4)["joules"] / 400, replay(of_a100)["joules"] / 40]
    )
    energy = replay(of_a100)["joules"] / replay(of_t4)["joules"]
    for key, ratio in {"kwh": energy, "kg_co2e": energy, "money": energy, "tokens_per_joule": 1 / energy}.items():
        assert rows[key]["ratios"][1] == pytest.approx(ratio)
    dies = [5.45 * 1.2 * 400, 8.26 * 1.6 * 40]
    assert rows["kg_co2e_embodied"]["values"] == pytest.approx([kg / (5 * 365 * 86400) for kg in dies])
    assert rows["quality"]["values"] == [2.0, 2.02]
    assert fast["against"]["kwh_saved"] == pytest.approx(1 - energy)
    assert "kwh_above_idle" not in rows, "neither run has it"
    told_words = CliRunner().invoke(app, ["audit", "energy", str(t4), str(a100)])
    assert told_words.exit_code == 0, told_words.output
    for words in ("t4 (Tesla T4)", "a100 (NVIDIA A100-SXM4-40GB)", "ratio", "mean power (W)", "money (EUR)", "x 0.1"):
        assert words in told_words.output
    assert "kg CO2e of making the machines, not in the above: t4 " in told_words.output


def test_runs_from_before_making_machines_was_counted_compare(tmp_path: Path) -> None:
    one = finished(tmp_path / "a", joules=KWH, quality=2.0, country="FRA")
    two, _ = recorded(tmp_path / "b", "Tesla T4", [70.0] * 5, quality=2.0)
    facts = json.loads((one / "record.json").read_text())
    for name in ("embodied", "above_idle", "hourly", "scope"):
        facts["energy"].pop(name)
    (one / "record.json").write_text(json.dumps(facts))
    rows = {row["key"]: row for row in report([one, two])["beside"]}
    assert rows["kg_co2e_embodied"]["values"][0] is None
    assert rows["kg_co2e_embodied"]["ratios"] == [None, None]


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
        ({"country": "US-CA"}, "direct and life-cycle emissions"),
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


def test_a_grid_by_the_hour_does_not_compare_with_a_mean_of_a_year(tmp_path: Path) -> None:
    hourly = toy.day_file(tmp_path, [100.0] * 24)
    grid = (tmp_path / "grid.csv").read_text().replace("2024", "2023")
    (tmp_path / "grid.csv").write_text(grid)
    one = finished(tmp_path / "a", joules=KWH, quality=2.0, country="FRA")
    two = finished(tmp_path / "b", joules=KWH, quality=2.0, country="FRA", hourly=hourly)
    with pytest.raises(UsageError, match="do not compare: grids by the hour and means of a year"):
        report([one, two])
    found = report([one, two], allow_mixed=True)
    assert found["lines"][1]["grid"] == "100 g/kWh (FRA, 2023, location-based) by the hour"


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


def test_ranges_come_back_from_json(tmp_path: Path) -> None:
    run = finished(tmp_path / "a", joules=KWH, quality=2.0)
    facts = json.loads((run / "record.json").read_text())["energy"]
    assert Range(**facts["g_per_kwh"]).central == 481.0
