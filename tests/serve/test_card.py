"""What a model card says of energy and CO2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lmworks.core.energy.embodied import host
from lmworks.serve.card import card_of
from lmworks.train.energy import FIELDS, MADE, PHASES, Meter
from lmworks.train.hardware import Hardware
from lmworks.train.metering import Metering
from lmworks.train.spent import told
from tests.serve.runs import make_run


@pytest.mark.parametrize(("country", "pretrained"), [("SWE", None), (None, {"path": "x"})])
def test_the_card_says_what_the_run_took(country: str | None, pretrained: object, tmp_path: Path) -> None:
    model = make_run(tmp_path / "run")
    account = {phase: [0.0] * len(FIELDS) for phase in PHASES} | {"train": [1.8e6, 3.6e6, 7.2e6, 0.0, 10.0]}
    facts = told(account, Metering(country=country), Meter([]), tokens=10, flops=1.0)
    (tmp_path / "run" / "record.json").write_text(json.dumps({"energy": facts, "pretrained": pretrained}))
    card = card_of(model, name="x", source=tmp_path, run=tmp_path / "run")
    head = yaml.safe_load(card.split("---")[1])
    assert head["co2_eq_emissions"] == {
        "emissions": pytest.approx(40.7 if country else 481.0),
        "source": "lmworks, modelled",
        "training_type": "fine-tuning" if pretrained else "pre-training",
        "geographical_location": "Sweden" if country else "not known; the world's mean grid",
    }
    assert "| energy and CO2 of the run | 1 (0.5 to 2) kWh modelled" in card
    assert ("PLACE NOT KNOWN" in card) == (country is None)


def test_making_the_machine_is_a_row_of_its_own(tmp_path: Path) -> None:
    model = make_run(tmp_path / "run")
    meter = Meter([], hardware=Hardware(own=host(gibibytes=64.0)))
    account = {phase: [0.0] * len(FIELDS) for phase in PHASES} | {
        "train": [1.8e6, 3.6e6, 7.2e6, 0.0, 3600.0],
        MADE: [0.001, 0.002, 0.004, 0.0, 3600.0],
    }
    facts = told(account, Metering(country="SWE"), meter, tokens=10, flops=1.0)
    (tmp_path / "run" / "record.json").write_text(json.dumps({"energy": facts, "pretrained": None}))
    card = card_of(model, name="x", source=tmp_path, run=tmp_path / "run")
    row = "| CO2 of making the machines, apart | 0.002 (0.001 to 0.004) kg CO2e (1 h of 5 years; processors, memory, "
    assert row in card
    assert yaml.safe_load(card.split("---")[1])["co2_eq_emissions"]["emissions"] == pytest.approx(40.7)


def test_a_run_that_counted_nothing_claims_nothing(tmp_path: Path) -> None:
    model = make_run(tmp_path / "run")
    (tmp_path / "run" / "record.json").write_text(json.dumps({"id": "x"}))
    assert "CO2" not in card_of(model, name="x", source=tmp_path, run=tmp_path / "run")
