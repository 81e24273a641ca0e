"""What a run takes in memory: told from settings, held against what is there."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmworks.core.journal import rows
from lmworks.model import ops
from lmworks.model.decoder import DecoderConfig
from lmworks.model.init import initialise
from lmworks.parallel import gang
from lmworks.parallel.footprint import (
    CLASSES,
    BlockBytes,
    Footprint,
    as_table,
    described,
    in_words,
    listed,
    peak_of,
    predict,
)
from lmworks.parallel.layout import Layout
from lmworks.train.ledger import Ledger
from lmworks.train.objective import CrossEntropy
from lmworks.train.optim import AdamW
from lmworks.train.saved import Keep, Offload, Recompute
from lmworks.train.slots import Saved, combined, divisors
from tests.train import ranked, toy
from tests.train.test_saved import loss_of

ONE = Layout(dp_shard=1)
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {"n_kv_heads": 4},
    "grouped": {"n_kv_heads": 2, "qk_norm": True},
    "parallel": {"n_kv_heads": 4, "parallel_block": True},
}
POLICIES: dict[str, Saved] = {
    "keep": Keep(),
    "input": Recompute(),
    "every": Recompute(every=2),
    "products": Recompute(keep="products"),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("length", "packed"), [(64, False), (384, False), (384, True), (1536, False), (1536, True)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_saved_bytes_are_within_a_tenth_of_the_books(
    shape: str, precision: str, length: int, packed: bool, policy: str
) -> None:
    """Tiles up to about 1,200 tokens, behind them whole documents one by one; short documents go by tiles always."""
    config = DecoderConfig(
        vocab_size=257, n_layers=4, hidden_size=64, n_heads=4, ffn_size=176, tied=True, **SHAPES[shape]
    )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    made, books = config.build(dtype=dtype), Ledger()
    initialise(made, 0)
    POLICIES[policy].apply(made, books)
    with books.counting():
        loss_of(made, toy.batch(1, length, 257, packed=packed)).backward()  # type: ignore[no-untyped-call]
    recipe, document = settings(config, precision, length, policy), 1 / 0.15 if packed else None
    told = predict(recipe, ONE, 0, vocabulary=257, document=document)
    assert told.saved == pytest.approx(books.peak, rel=0.1)
    assert books.total == 0


def settings(config: DecoderConfig, precision: str, length: int, policy: str, device: str = "cpu") -> SimpleNamespace:
    """What of a recipe the prediction reads: one row a step."""
    return SimpleNamespace(
        model=config,
        batch_size=1,
        micro_batch_size=None,
        compile=False,
        device=device,
        precision=precision,
        saved=POLICIES[policy],
        optimizer=AdamW(lr=1e-3),
        data=SimpleNamespace(sequence_length=length),
    )


@pytest.mark.parametrize("policy", ["keep", "input", "every"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_saved_bytes_of_the_plain_forms_too(shape: str, precision: str, policy: str) -> None:
    """Those that a GPU runs, here on a CPU."""
    config = DecoderConfig(vocab_size=257, n_layers=4, hidden_size=64, n_heads=4, ffn_size=176, **SHAPES[shape])
    made, books = config.build(dtype=torch.bfloat16 if precision == "bf16" else torch.float32), Ledger()
    initialise(made, 0)
    POLICIES[policy].apply(made, books)
    batch, objective = toy.batch(1, 256, 257, packed=False), CrossEntropy()
    with books.counting():
        with ops.plain_forms():
            hidden_BTD = made(batch.tokens_BT)
        loss = combined(objective.loss(made, batch, hidden_BTD), divisors(objective, batch))  # a GPU has no other form
        with ops.plain_forms():
            loss.backward()  # type: ignore[no-untyped-call]
    told = predict(settings(config, precision, 256, policy, "cuda"), ONE, 0, vocabulary=257)
    assert told.saved == pytest.approx(books.peak, rel=0.1)


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=6),
    st.integers(0, 99),
)
def test_the_peak_is_that_of_a_simulation(sizes: list[tuple[int, int, int]], rest: int) -> None:
    """Forward through all blocks, the rest, and back, counting every moment."""
    blocks = [
        BlockBytes(number=i, whole=a + b + c, entrance=a, products=min(b, c)) for i, (a, b, c) in enumerate(sizes)
    ]
    for policy in POLICIES.values():
        held = policy.held(blocks)
        assert held is not None
        now, most = 0, 0
        for block in held:
            now += block.waiting
            most = max(most, now)
        most = max(most, now + rest)
        for block in reversed(held):
            most = max(most, now + block.working)
            now -= block.waiting
        assert peak_of(policy, blocks, rest) == most
    assert peak_of(Keep(), blocks, rest) == sum(block.whole for block in blocks) + rest
    assert peak_of(Offload(), blocks, rest) is None, "it hangs on the disk"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "muon", "sophia", "lamb"])
def test_a_run_takes_what_was_told_to_the_byte(optimizer: str, text: Path, cache: Path, tmp_path: Path) -> None:
    made = toy.recipe(text, cache, steps=2, optimizer={"use": optimizer, "lr": 1e-3})
    folder, report = toy.train(made, tmp_path / "run")
    memory = json.loads(folder.summary.read_text())["memory"]
    told, seen = memory["predicted"], memory["measured"]
    assert list(told) == list(seen) == list(CLASSES)
    for name in ("weights", "gradients", "optimizer", "saved", "logits"):
        assert told[name] == seen[name] > 0, name
    assert told["workspace"] > 0
    assert seen["workspace"] >= 0
    line, table = (note for note in report.notes if note.startswith("memory"))
    assert "saved for backward" in line
    assert [row.split()[0] for row in table.splitlines()[2:]] == [*CLASSES, "in"]
    (event,) = [row for row in rows(folder.events) if row["name"] == "memory"]
    assert event["attrs"]["measured"] == seen


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "fsdp-2": (2, {}),
    "tp-2": (2, {"layout": {"tp": 2}}),
    "pp-2": (2, {"layout": {"pp": 2}, "micro_batch_size": 2}),
    "pp-2-fsdp-2": (4, {"layout": {"pp": 2}, "micro_batch_size": 2}),
    "pp-2-tp-2": (4, {"layout": {"pp": 2, "tp": 2}, "micro_batch_size": 2}),
    "ep-2": (2, {"layout": {"ep": 2}, "model": {**ranked.MODEL, "experts": {"count": 4, "bias_rate": 0.001}}}),
}


@pytest.mark.ranks
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_rank_takes_what_was_told_of_its_part(layout: str, text: Path, cache: Path, tmp_path: Path) -> None:
    ranks, over = LAYOUTS[layout]
    spec = ranked.table(text, cache, steps=2, checkpoints={}, **over)
    gang.run(ranked.train, ranks, spec, str(tmp_path / "run"))
    folders = [tmp_path / "run", *(tmp_path / "run" / "ranks" / f"{rank:05d}" for rank in range(1, ranks))]
    for folder in folders:
        (event,) = [row for row in rows(folder / "events.jsonl") if row["name"] == "memory"]
        told, seen = event["attrs"]["predicted"], event["attrs"]["measured"]
        for name in ("weights", "gradients", "optimizer"):
            assert told[name] == seen[name] > 0, (folder.name, name)
        assert told["saved"] == pytest.approx(seen["saved"], rel=0.05), folder.name


def test_a_recipe_tells_the_memory_of_its_largest_rank(text: Path, cache: Path) -> None:
    alone = described(toy.recipe(text, cache), 1)
    assert alone[0] == "memory, beside the program itself:"
    assert alone[1].split() == ["weights", "128", "kB"]
    stages = toy.recipe(text, cache, layout={"pp": 2, "dp_shard": 1}, micro_batch_size=2)
    assert "of rank 1, the largest of 2" in described(stages, 1)[0], "it has the head"
    tokenizer = {"use": "file", "path": "nowhere"}
    data = {**toy.table(text, cache)["data"], "tokenizer": tokenizer}
    assert "not told" in described(toy.recipe(text, cache, data=data), 1)[0]
    assert (
        "not told" in described(toy.recipe(text, cache, layout="megatron", model={**ranked.MODEL, "tied": False}), 7)[0]
    )


def test_words_for_people() -> None:
    assert [in_words(x) for x in (None, 0, 999, 1000, 999_949, 1_500_000, 2_345_000_000, 12 * 10**12)] == [
        "not known",
        "0 B",
        "999 B",
        "1 kB",
        "1,000 kB",
        "1.5 MB",
        "2.35 GB",
        "12,000 GB",
    ]
    told, seen = Footprint(weights=4000, saved=9000), Footprint(weights=4000, saved=8000, workspace=10)
    assert (told.total, told.largest) == (13_000, "saved")
    assert listed(seen) == "saved for backward 8 kB, weights 4 kB, workspace 10 B"
    table = as_table(told, seen)
    assert [line.split()[0] for line in table[1:]] == [
        "weights",
        "gradients",
        "optimizer",
        "saved",
        "logits",
        "workspace",
        "in",
    ]
    assert table[-1].split() == ["in", "all", "13", "kB", "12", "kB"]
