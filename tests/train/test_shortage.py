"""Runs that do not fit: what is said, and whether it is true."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lmworks.core import catalogue
from lmworks.core import recipe as recipes
from lmworks.core.errors import OutOfMemory
from lmworks.parallel.footprint import Footprint, predict
from lmworks.parallel.layout import Layout
from lmworks.train.shortage import Account, asked_by, changes, explained, free, is_shortage
from tests.train import toy

MIB = 1 << 20
MODEL = {"use": "decoder", "n_layers": 8, "hidden_size": 128, "n_heads": 4, "ffn_size": 352}


def limited(spec: dict[str, Any], folder: Path, room: int) -> subprocess.CompletedProcess[str]:
    """A run in a process that may have so many bytes more than it has at its start."""
    path = folder.with_suffix(".json")
    path.write_text(json.dumps(spec), encoding="utf-8")
    command = [sys.executable, "-m", "tests.train.limited", str(path), str(folder), str(room)]
    env = os.environ | {"MALLOC_ARENA_MAX": "1"}  # glibc sets 64 MiB of addresses aside for every thread
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)


def spec(text: Path, cache: Path, **over: Any) -> dict[str, Any]:
    table = toy.table(text, cache, **{"steps": 2, "model": MODEL, "checkpoints": {}, "validation": {"rows": 1}, **over})
    table["data"]["sequence_length"] = 128
    return table


@pytest.mark.slow
def test_what_is_offered_fits(text: Path, cache: Path, tmp_path: Path) -> None:
    room = 400 * MIB
    done = limited(spec(text, cache, batch_size=64), tmp_path / "whole", room)
    assert done.returncode == 1, done.stderr
    told = done.stderr[done.stderr.index("OutOfMemory: ") :]
    assert "out of memory in step 1" in told
    assert "the largest is saved for backward" in told
    assert re.search(r"saved for backward +7\d\d MB", told)
    offered = re.search(r"this would fit:|any of these would fit:", told)
    assert offered, told
    (rows,) = re.findall(r"--set micro_batch_size=(\d+)  \(", told)[:1]
    fits = limited(spec(text, cache, batch_size=64, micro_batch_size=int(rows)), tmp_path / "smaller", room)
    assert fits.returncode == 0, fits.stderr


@pytest.mark.slow
def test_a_model_that_does_not_fit_is_told_before_the_first_step(text: Path, cache: Path, tmp_path: Path) -> None:
    wide = {**MODEL, "hidden_size": 1024, "ffn_size": 4096}
    done = limited(spec(text, cache, batch_size=4, model=wide), tmp_path / "run", 200 * MIB)
    assert done.returncode == 1, done.stderr
    assert "out of memory while the model was built" in done.stderr
    told = ("no single change frees as much", "there was no memory left to work out which fits")  # as much as was left
    assert any(words in done.stderr for words in told)
    assert "Traceback" not in done.stderr


def account(text: Path, cache: Path, **over: Any) -> Account:
    made = toy.recipe(text, cache, layout={"dp_shard": 1}, **over)
    layout = made.layout
    assert isinstance(layout, Layout)
    return Account(
        recipe=made,
        layout=layout,
        rank=0,
        vocabulary=257,
        document=None,
        device=torch.device("cpu"),
        before=0,
        predicted=predict(made, layout, 0, vocabulary=257),
    )


def test_changes_free_what_they_say(text: Path, cache: Path) -> None:
    before = account(text, cache, batch_size=8)
    found = {tuple((k, str(v) if isinstance(v, dict) else v) for k, v in c.values.items()): c for c in changes(before)}
    assert all(change.saving > 0 for change in found.values())
    saving = found[(("micro_batch_size", 2),)].saving
    smaller = account(text, cache, batch_size=8, micro_batch_size=2)
    assert saving == before.predicted.total - smaller.predicted.total
    again = found[(("saved.use", "recompute"),)]
    assert (
        again.saving == before.predicted.saved - account(text, cache, batch_size=8, saved="recompute").predicted.saved
    )  # type: ignore[operator]
    assert (("optimizer.use", "lion"), ("optimizer.lr", 0.01)) in found
    assert (("optimizer.use", "lamb"), ("optimizer.lr", 0.01)) not in found, "it frees nothing"
    assert (("layout.dp_shard", 2),) in found
    (coded,) = [change for change in found.values() if change.values.get("optimizer.use") == "coat"]
    written = re.findall(r"--set ('[^']+'|\S+)", str(coded))
    table = recipes.table_of(before.recipe)
    changed = recipes.decode(recipes.apply_sets(table, [word.strip("'") for word in written]))
    assert catalogue.name_of(changed.optimizer) == "coat"
    assert changed.optimizer.core() == before.recipe.optimizer


def test_weights_that_few_ranks_share_may_be_shared_by_more(text: Path, cache: Path) -> None:
    deep = {**MODEL, "n_layers": 12}  # two blocks are whole at a time, so few blocks would free nothing
    made = toy.recipe(text, cache, layout={"dp_shard": 2, "state": {"weights": 1}}, model=deep)
    told = predict(made, made.layout, 0, vocabulary=257)
    before = dataclasses.replace(account(text, cache), recipe=made, layout=made.layout, predicted=told)
    assert {"layout.state.weights": 2} in [change.values for change in changes(before)]


def test_a_change_is_found_beside_moments_in_codes(text: Path, cache: Path) -> None:
    coded = {"use": "coat", "around": {"use": "adamw", "lr": 0.01}}
    found = [change.values for change in changes(account(text, cache, batch_size=8, optimizer=coded))]
    assert {"micro_batch_size": 4} in found
    assert {"optimizer.use": "sgd", "optimizer.lr": 0.01} not in found, "it holds more"


def test_what_cannot_be_is_not_offered(text: Path, cache: Path) -> None:
    one = account(text, cache, batch_size=1, saved="recompute", optimizer={"use": "sgd", "lr": 0.1, "momentum": 0.0})
    found = [change.values for change in changes(one)]
    assert not any("micro_batch_size" in values or "layout.dp_shard" in values for values in found)
    assert not any(values.get("optimizer.use") for values in found)


ALLOCATOR = "[enforce fail at alloc_cpu.cpp:126] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"


@pytest.mark.parametrize(
    ("error", "short", "asked"),
    [
        (RuntimeError(f"{ALLOCATOR} allocate 4096 bytes. Error code 12 (Cannot allocate memory)"), True, 4096),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total"), True, 3 << 29),
        (MemoryError(), True, 0),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True, 0),
        (OSError(errno.ENOSPC, "No space left on device"), False, 0),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False, 0),
        (ValueError("can't allocate memory"), False, 0),
    ],
)
def test_which_errors_are_of_memory(error: Exception, short: bool, asked: int, text: Path, cache: Path) -> None:
    assert is_shortage(error) is short
    assert asked_by(error) == asked
    with (
        pytest.raises(OutOfMemory if short else type(error)) as raised,
        explained(account(text, cache), lambda: "in step 7", lambda: Footprint(weights=1)),
    ):
        raise error
    caught = raised.value
    if not short:
        assert caught is error
        return
    assert isinstance(caught, OutOfMemory)
    assert caught.exit_code == 1
    assert "out of memory in step 7" in str(caught)
    assert "measured" in str(caught)
    assert free(torch.device("cpu")) > 0
