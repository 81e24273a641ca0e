"""README.md of an exported model: what it is, where it comes from, how to load it. Nothing that is not known."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from lmworks.core.energy.grid import in_words, spread
from lmworks.model.backbone import Backbone


def card_of(
    model: Backbone, *, name: str, source: Path, run: Path | None, licence: str | None = None, note: str = ""
) -> str:
    """The card of a model. `run`: the run folder that made it, whose recipe and results are shown."""
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [lmworks]"]
    head += [f"license: {licence}"] if licence else []
    energy = _energy(run) if run is not None else None
    head += _emissions(energy) if energy is not None else []
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts: dict[str, Any] = {
        "parameters": f"{parameters:,}",
        "vocabulary": f"{config.vocab_size:,}",
        "blocks": config.n_layers,
        "hidden size": config.hidden_size,
        "head": "tied to the token table" if config.tied else "its own",
        "source": f"`{source}`",
    }
    facts |= _results(run) if run is not None else {}
    facts |= _energy_facts(energy) if energy is not None else {}
    parts = [
        "\n".join([*head, "---"]),
        f"# {name}",
        note,
        "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in facts.items())]),
        "Written by lmworks and proved: a fresh process read this folder and gave the logits of the model in memory.",
        "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH")\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH")\n```\n\n'
        "or `lmworks generate PATH --prompt TEXT`.",
        f"## How it was trained\n\n```toml\n{_recipe(run)}\n```" if run is not None else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _results(run: Path) -> dict[str, Any]:
    """Facts of a finished run's summary."""
    path = run / "summary.json"
    if not path.is_file():
        return {}
    summary = json.loads(path.read_text(encoding="utf-8"))
    wanted = {"tokens": "tokens seen", "val_loss": "validation loss", "val_bits_per_byte": "validation bits per byte"}
    return {label: summary[key] for key, label in wanted.items() if key in summary}


def _energy(run: Path) -> dict[str, Any] | None:
    """What the run's meters told, from record.json, and the kind of training; None where nothing was counted."""
    path = run / "record.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if record.get("energy") is None:
        return None
    return {**record["energy"], "training_type": "fine-tuning" if record.get("pretrained") else "pre-training"}


def _energy_facts(energy: dict[str, Any]) -> dict[str, str]:
    """Rows of the card's table: what the run took, and where its machines' making was counted, what fell on it."""
    found = {"energy and CO2 of the run": in_words({**energy, "embodied": None})}
    made = energy.get("embodied")
    if made is not None:
        parts = ", ".join(piece["part"] for piece in made["parts"])
        share = f"{made['seconds'] / 3600:.3g} h of {made['life_years']:g} years"
        found["CO2 of making the machines, apart"] = f"{spread(made['kg_co2e'])} kg CO2e ({share}; {parts})"
    return found


def _emissions(energy: dict[str, Any]) -> list[str]:
    """The card's field for the hub: grams of CO2e that the run's energy emitted, with how and where."""
    place = energy["place"] if energy["place_known"] else f"not known; {energy['place']}'s mean grid"
    facts = {
        "emissions": 1e3 * energy["kg_co2e"]["central"],
        "source": f"lmworks, {energy['method']}",
        "training_type": energy["training_type"],
        "geographical_location": place,
    }
    return ["co2_eq_emissions:", *(f"  {name}: {json.dumps(value)}" for name, value in facts.items())]


def _recipe(run: Path) -> str:
    """The recipe as it ran, checked to be TOML so that the block of the card is what it says."""
    text = (run / "recipe.toml").read_text(encoding="utf-8")
    tomllib.loads(text)
    return text.strip()
