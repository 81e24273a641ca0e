"""SlimPajama-DC: the preset's numbers, its mixtures, the switch between global and local, weight decay in phases."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core import recipe as recipes
from lmworks.core.errors import DataError, RecipeError
from lmworks.core.journal import rows
from lmworks.core.papers import METHODS
from lmworks.data.dedup import Dedup
from lmworks.data.keys import MinHash
from lmworks.data.length import Length
from lmworks.data.repair import Repair
from lmworks.data.shares import shares_in, shipped
from lmworks.data.split import Split
from lmworks.data.stage import text_of
from lmworks.data.units import read_records
from lmworks.methods.slimpajama_dc import Ptwd
from lmworks.model.checkpoint import complete
from lmworks.prove.ledger import page
from lmworks.train import save
from lmworks.train.optim import AdamW
from lmworks.train.schedule import Constant, Cosine, WarmupStableDecay
from lmworks.train.slots import Optimizer
from tests.make.cleaning import recipe, run, texts, write_jsonl
from tests.oracles import slimpajama as oracle
from tests.train import toy

# --- the pipeline


def test_the_preset_has_the_published_numbers() -> None:
    repair, length, dedup, split = recipes.load("slimpajama", verb="data").stages
    assert repair == Repair(form="NFC", mojibake=True)
    assert length == Length(least=200, most=None, unit="plain characters")
    key = MinHash(n=13, unit="character", permutations=128, bands_rows=(9, 13), verify=None)
    assert dedup == Dedup(scope="global", key=key)
    assert MinHash().shape == key.shape, "the pair nearest to a step at 0.8"
    assert split == Split(validation=0.0017, test=0.0017)


def test_the_table_of_mixtures_on_the_page_is_the_files() -> None:
    table = [line for line in page(METHODS["slimpajama-dc"]).splitlines() if line.startswith("| ")]
    start = next(i for i, line in enumerate(table) if line.startswith("| source | DC-1"))
    found: dict[str, dict[str, float]] = {name: {} for name in shipped()}
    for line in table[start + 1 : start + 9]:
        source, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if source.startswith("---"):
            continue
        for name, cell in zip(shipped(), cells, strict=True):
            if cell:
                of, _, share = cell.rpartition(" ")
                found[name][of or source] = float(share)
    assert found == {name: shares_in(name) for name in shipped()}


def kept(folder: Path, side: str = "") -> dict[str, list[str]]:
    """Texts by source, of one side or of all."""
    found: dict[str, list[str]] = {}
    for path in sorted((folder / "documents" / side).rglob("*.jsonl.zst")):
        for record in read_records(path):
            found.setdefault(record.source, []).append(text_of(record))
    return found


def cleaned(paths: list[Path], folder: Path, **changes: Any) -> dict[str, Any]:
    """Run the shipped pipeline over other documents."""
    table = recipes.read(recipes.find("slimpajama", "data"))
    stages = recipes.with_values(table, changes)["stages"]
    pytest.importorskip("rensa", reason="the extra 'data' is not installed")
    pytest.importorskip("ftfy", reason="the extra 'data' is not installed")
    content, _ = run(recipe(paths, stages), folder)
    return content


def test_a_copy_in_two_sources_survives_local_and_loses_one_under_global(tmp_path: Path) -> None:
    shared = "one letter too many, " * 12 + "and so on"
    own = [texts(20, seed=seed, words=60) for seed in (1, 2)]
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", [*some, shared]) for n, some in zip("ab", own, strict=True)]
    dropped = {}
    for scope in ("global", "per-source"):
        content = cleaned(paths, tmp_path / scope, **{"stages.2.scope": scope})
        dropped[scope] = content["steps"][3]["dropped"]["duplicate"]
        found = kept(tmp_path / scope)
        assert [found[name].count(shared) for name in "ab"] == ([1, 0] if scope == "global" else [1, 1])
    assert dropped["global"] == dropped["per-source"] + 1


def test_composed_and_decomposed_accents_are_one_document_and_short_ones_go(tmp_path: Path) -> None:
    composed, decomposed = ("caf\u00e9 " * 60, "cafe\u0301 " * 60)
    some = [composed, decomposed, "x" * 199, "y" * 200, "", "twelve chars", "odd \ud800 half"]
    content = cleaned([write_jsonl(tmp_path / "a.jsonl", some)], tmp_path / "out")
    assert sorted(len(text) for text in kept(tmp_path / "out")["a"]) == [200, 300]
    told = {step["name"]: step["dropped"] for step in content["steps"]}
    assert told["reading"] == {"empty": 1, "not utf-8": 1}
    assert told["length"] == {"too short": 2}
    assert told["dedup"] == {"duplicate": 1}


def test_no_text_is_on_two_sides(tmp_path: Path) -> None:
    some = [text * 2 for text in texts(300, words=60)]
    changes = {"stages.3.validation": 0.1, "stages.3.test": 0.1, "stages.2.scope": "per-source"}
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", some) for name in "ab"]
    cleaned(paths, tmp_path / "out", **changes)
    sides = [
        {hashlib.sha256(text.encode()).digest() for found in kept(tmp_path / "out", side).values() for text in found}
        for side in ("train", "validation", "test")
    ]
    assert all(sides)
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]


# --- mixtures and hold-outs in a run


def sources(folder: Path) -> dict[str, dict[str, Any]]:
    """A reader of each of two sources."""
    found = {}
    for seed, name in enumerate(("github", "commoncrawl")):
        path = write_jsonl(folder / f"{name}.jsonl", texts(30, seed=seed))
        found[name] = {"use": "jsonl", "name": name, "paths": [str(path)]}
    return found


def test_a_run_is_validated_source_by_source_on_documents_that_it_never_sees(
    text: Path, cache: Path, tmp_path: Path
) -> None:
    known = sources(tmp_path)
    data = {"tokenizer": "bytes", "sequence_length": 32, "validation": 0, "cache": str(cache)}
    data |= {"readers": [known["github"]], "held_out": list(known.values())}
    with pytest.raises(DataError, match="all 30 documents of 'github' equal held-out ones"):
        toy.train(toy.recipe(text, cache, data=data), tmp_path / "none")
    known["github"] = {**known["github"], "paths": [str(write_jsonl(tmp_path / "new.jsonl", texts(9, seed=8)))]}
    data["held_out"] = list(known.values())
    folder, _ = toy.train(toy.recipe(text, cache, data=data), tmp_path / "run")
    (found,) = [row for row in rows(folder.metrics) if "val_loss" in row]
    each = [found[f"val_loss/{name}"] for name in known]
    assert found["val_loss/mean"] == pytest.approx(sum(each) / 2)
    assert each[0] != each[1]


def test_a_run_that_would_read_a_source_too_often_is_refused_before_its_first_step(
    text: Path, cache: Path, tmp_path: Path
) -> None:
    data = {"tokenizer": "bytes", "sequence_length": 32, "validation": 0, "cache": str(cache), "most_epochs": 0.1}
    data |= {"readers": list(sources(tmp_path).values()), "mixture": "dc-2"}
    with pytest.raises(DataError, match=r"would read 'commoncrawl' 0\.\d+ times, and most_epochs is 0\.1"):
        toy.train(toy.recipe(text, cache, data=data), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# --- weight decay in phases


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0, 9)), min_size=1, max_size=5))
def test_phases_are_the_oracles(phases: list[tuple[int, float]]) -> None:
    lengths, factors = [length for length, _ in phases], tuple(factor for _, factor in phases)
    steps = sum(lengths)
    starts = tuple(sum(lengths[:i]) / steps for i in range(len(lengths)))
    schedule = Ptwd(factors=factors, starts=starts)
    assert [schedule.weight_decay(step, steps) for step in range(steps)] == oracle.phases(lengths, factors)


def test_the_default_is_the_papers_and_the_rate_is_the_other_schedules() -> None:
    schedule = Ptwd(rate=Cosine(warmup=3))
    decays = [schedule.weight_decay(step, 9) * 0.1 for step in range(9)]
    assert decays == pytest.approx([0, 0, 0, 0.5, 0.5, 0.5, 0.1, 0.1, 0.1])
    assert [schedule.factor(s, 9) for s in range(9)] == [Cosine(warmup=3).factor(s, 9) for s in range(9)]
    assert Constant().weight_decay(4, 9) is None
    assert WarmupStableDecay().weight_decay(4, 9) is None, "its setting `decay` is of the rate"


OPTIMIZERS: list[dict[str, Any]] = [
    {"use": "adamw", "lr": 1e-2},
    {"use": "sgd", "lr": 1e-2},
    {"use": "lion", "lr": 1e-3},
    {"use": "muon", "lr": 1e-2},
    {"use": "lamb", "lr": 1e-2},
    {"use": "sophia", "lr": 1e-3},
    {"use": "coat", "around": {"use": "adamw", "lr": 1e-2}},
]


@pytest.mark.parametrize("table", OPTIMIZERS, ids=[table["use"] for table in OPTIMIZERS])
def test_every_optimizer_takes_another_weight_decay_and_back(table: dict[str, Any]) -> None:
    settings: Optimizer = recipes.decode_part("optimizer", table)
    update = settings.build(toy.model(dtype=torch.float32))
    groups = [group for optimizer in update.optimizers() for group in optimizer.param_groups]
    own = [float(group["weight_decay"]) for group in groups]
    assert max(own) > 0
    for factor in (5.0, 0.0, 1.0):
        assert update.set_decay(factor) == max(own) * factor
        assert [group["weight_decay"] for group in groups] == [decay * factor for decay in own]


def test_adamw_with_phases_is_torchs_adamw_with_each_weight_decay() -> None:
    ours, theirs = (toy.model(dtype=torch.float32) for _ in range(2))
    update = AdamW(lr=1e-2, weight_decay=0.1).build(ours)
    decays = {name for name, p in theirs.named_parameters() if p.ndim >= 2 and not name.startswith("embed.")}
    named = list(theirs.named_parameters())
    groups = [{"params": [p for n, p in named if (n in decays) is kind]} for kind in (True, False)]
    other = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule, generator = Ptwd(), torch.Generator().manual_seed(3)
    for step in range(9):
        decay = schedule.weight_decay(step, 9)
        update.set_decay(decay)
        other.param_groups[0]["weight_decay"] = 0.1 * decay
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        update.optimizers()[0].step()
        other.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_resume_within_a_phase_is_bitwise_the_unbroken_run(text: Path, cache: Path, tmp_path: Path) -> None:
    schedule = {"use": "ptwd", "rate": {"use": "cosine", "warmup": 2}}
    made = toy.recipe(text, cache, schedule=schedule, checkpoints={"every": 2, "keep": 9})
    whole, _ = toy.train(made, tmp_path / "whole")
    want = save.read(complete(whole.checkpoints)[-1]).tensors
    decays = [row["weight_decay"] for row in rows(whole.metrics) if "loss" in row]
    assert decays == pytest.approx([0.0] * 4 + [0.5] * 4 + [0.1] * 4)
    for step in (4, 6):
        again = tmp_path / f"from-{step}"
        (again / "checkpoints").mkdir(parents=True)
        name = f"step-{step:08d}"
        shutil.copytree(whole.checkpoints / name, again / "checkpoints" / name)
        folder, _ = toy.train(made, again)
        got = save.read(complete(folder.checkpoints)[-1]).tensors
        for file in ("model", "optimizer", "random"):
            for key, value in want[file].items():
                assert torch.equal(got[file][key], value), (step, key)


def test_phases_change_what_is_learned_and_a_plain_schedule_tells_no_decay(
    text: Path, cache: Path, tmp_path: Path
) -> None:
    plain, _ = toy.train(toy.recipe(text, cache), tmp_path / "plain")
    moved, _ = toy.train(toy.recipe(text, cache, schedule="ptwd"), tmp_path / "moved")
    losses = [[row["loss"] for row in rows(folder.metrics) if "loss" in row] for folder in (plain, moved)]
    assert losses[0][0] == losses[1][0]
    assert losses[0][2:] != losses[1][2:]
    assert not any("weight_decay" in row for row in rows(plain.metrics))


@pytest.mark.parametrize(
    ("schedule", "optimizer", "text_of_it"),
    [
        ({"factors": [0.0, 1.0]}, {}, "2 factors and 3 starts"),
        ({"factors": [], "starts": []}, {}, "0 factors and 0 starts"),
        ({"starts": [0.1, 0.4, 0.6]}, {}, "the first phase begins with the run"),
        ({"starts": [0.0, 0.7, 0.4]}, {}, r"begin at the steps \[0, 8, 5\] of 12"),
        ({"starts": [0.0, 0.5, 1.0]}, {}, r"begin at the steps \[0, 6, 12\] of 12"),
        ({"starts": [0.0, 0.5, 0.51]}, {}, "each needs one of its own"),
        ({"factors": [2.0, 2.0, 2.0]}, {}, "are all alike"),
        ({}, {"weight_decay": 0.0}, "have no effect: optimizer.weight_decay is 0"),
        ({"rate": "ptwd"}, {}, "in phases of weight decay itself"),
        ({"rate": {"use": "cosine", "warmup": 99}}, {}, "do not end before"),
    ],
)
def test_phases_that_cannot_be_are_told(
    schedule: dict[str, Any], optimizer: dict[str, Any], text_of_it: str, text: Path, cache: Path
) -> None:
    chosen = {"use": "adamw", "lr": 1e-2, **optimizer}
    with pytest.raises(RecipeError, match=text_of_it):
        toy.recipe(text, cache, schedule={"use": "ptwd", **schedule}, optimizer=chosen)
