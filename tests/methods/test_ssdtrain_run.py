"""Runs with SSDTrain learn what runs without it learn, to the bit, on one rank and on several."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from lmworks.core.journal import rows
from lmworks.core.run import RunFolder
from lmworks.model.checkpoint import complete
from lmworks.parallel import gang
from lmworks.train import save
from tests.train import ranked, toy

MODEL = {"use": "decoder", "n_layers": 4, "hidden_size": 64, "n_heads": 4, "n_kv_heads": 2, "ffn_size": 96}
SHORT: dict[str, Any] = {"model": MODEL, "steps": 5, "batch_size": 3, "checkpoints": {}}
SAVED = {"use": "ssdtrain", "least_bytes": 0}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.corpus(tmp_path_factory.mktemp("ssdtrain") / "text")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def kept(text: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, RunFolder]:
    """The same without it, by rows of a micro-batch."""
    folder = tmp_path_factory.mktemp("kept")
    return {
        micro: toy.train(toy.recipe(text, cache, **SHORT, micro_batch_size=micro), folder / str(micro))[0]
        for micro in (1, 3)
    }


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    return dict(save.read(complete(folder.checkpoints)[-1]).tensors["model"])


@pytest.mark.parametrize("around", ["keep", "recompute"])
@pytest.mark.parametrize("micro", [3, 1])
@pytest.mark.parametrize("prefetch", ["block", "chunk", "off"])
@pytest.mark.parametrize("to", ["disk", "host"])
def test_what_is_learned_is_what_is_learned_without_it(
    to: str,
    prefetch: str,
    micro: int,
    around: str,
    kept: dict[int, RunFolder],
    text: Path,
    cache: Path,
    tmp_path: Path,
) -> None:
    saved = {**SAVED, "to": to, "prefetch": prefetch, "around": around, "plan": "all"}
    if to == "disk":
        saved["folders"] = [str(tmp_path / "one"), str(tmp_path / "two")]
    folder, report = toy.train(toy.recipe(text, cache, **SHORT, micro_batch_size=micro, saved=saved), tmp_path / "run")
    assert toy.learned(folder) == toy.learned(kept[micro])
    a, b = weights(folder), weights(kept[micro])
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert all(row["offload/stored"] + row["offload/forwarded"] > 0 for row in rows(folder.metrics) if "loss" in row)
    assert any("blocks 0-2 of 0-3 go out (all plan" in note for note in report.notes)
    assert not list(tmp_path.rglob("saved-*"))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("offload")]


def test_a_plan_is_followed_from_the_third_step_on(
    kept: dict[int, RunFolder], text: Path, cache: Path, tmp_path: Path
) -> None:
    """A bandwidth that lets nothing out, one that lets all but the last block out, and whatever is measured."""
    for name, bandwidth in (("slow", 1.0), ("fast", 1e15), ("measured", "profile")):
        saved = {**SAVED, "folders": [str(tmp_path / "disk")], "bandwidth": bandwidth}
        folder, report = toy.train(toy.recipe(text, cache, **SHORT, saved=saved), tmp_path / name)
        assert toy.learned(folder) == toy.learned(kept[3])
        moved = [row["offload/loaded"] + row["offload/forwarded"] for row in rows(folder.metrics) if "loss" in row]
        assert all(moved[:2])
        if name == "slow":
            assert not any(moved[2:])
            assert any("no block goes out (strict plan" in note for note in report.notes)
        if name == "fast":
            assert all(moved[2:])
            assert any("blocks 0-2 of 0-3 go out (strict plan" in note for note in report.notes)
        events = [event["attrs"]["text"] for event in rows(folder.events) if event["name"] == "note"]
        assert events == [note for note in report.notes if note.startswith("saved tensors")]


def test_a_run_that_stops_and_goes_on_is_the_unbroken_one(text: Path, cache: Path, tmp_path: Path) -> None:
    made = toy.recipe(text, cache, saved={**SAVED, "folders": [str(tmp_path / "disk")]})
    whole, _ = toy.train(made, tmp_path / "whole")
    toy.stopped(made, tmp_path / "run", 5)
    folder, _ = toy.train(made, tmp_path / "run")
    assert toy.learned(folder) == toy.learned(whole)


# --- ranks ------------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp-2": {},
    "fsdp-2-accumulation": {"micro_batch_size": 2},
    "1f1b": {"layout": {"pp": 2}, "micro_batch_size": 1},
    "interleaved": {"layout": {"pp": 2, "schedule": "interleaved-1f1b"}, "micro_batch_size": 2},
    "zero-bubble": {"layout": {"pp": 2, "schedule": "zero-bubble-v"}, "micro_batch_size": 2},
}


@pytest.mark.ranks
@pytest.mark.parametrize("plan", ["all", "strict"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_learn_what_they_learn_without_it(name: str, plan: str, text: Path, cache: Path, tmp_path: Path) -> None:
    found = {}
    for label, saved in {
        "kept": {"use": "keep"},
        "out": {**SAVED, "plan": plan, "folders": [str(tmp_path / "disk")]},
    }.items():
        spec = ranked.table(text, cache, **LAYOUTS[name], saved=saved, steps=6, checkpoints={})
        gang.run(ranked.train, 2, spec, str(tmp_path / label))
        found[label] = ranked.losses(tmp_path / label)
    assert found["out"] == found["kept"]
    assert not list((tmp_path / "disk").iterdir())
    moved = [row["offload/stored"] + row["offload/forwarded"] for row in ranked.rows(tmp_path / "out") if "loss" in row]
    assert moved[0] > 0
