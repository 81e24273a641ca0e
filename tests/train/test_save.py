"""Checkpoints: complete or not there, verified by name, kept by policy."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lmworks.core.errors import CheckpointError
from lmworks.model.checkpoint import complete, locate, step_of, unfinished
from lmworks.train import checkpoints as keeping
from lmworks.train import save
from lmworks.train.checkpoints import Checkpoints, News, Saving
from lmworks.train.save import Snapshot
from lmworks.train.staging import Staging


def snapshot(step: int) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "model": {"w": torch.randn(4, 3, generator=generator)},
        "optimizer": {"w/m": torch.randn(4, 3, generator=generator), "w/step": torch.tensor(float(step))},
        "random": {"cpu": torch.get_rng_state()},
    }
    return Snapshot(tensors=tensors, state={"step": step})


def saved(
    folder: Path, steps: list[int], tell: Callable[[News], None] = lambda news: None, **policy: object
) -> Checkpoints:
    folder.mkdir(exist_ok=True)
    checkpoints = Checkpoints(folder, Saving(**policy), tell=tell)  # type: ignore[arg-type]
    for step in steps:
        checkpoints.save(step, snapshot(step))
    checkpoints.wait()
    return checkpoints


@pytest.mark.parametrize("background", [True, False])
def test_what_is_read_is_what_was_written(tmp_path: Path, background: bool) -> None:
    saved(tmp_path, [7], background=background)
    found = save.read(tmp_path / "step-00000007")
    want = snapshot(7)
    assert found.state == {"step": 7}
    for name, tensors in want.tensors.items():
        assert all(torch.equal(found.tensors[name][key], value) for key, value in tensors.items())


def test_a_background_write_holds_the_values_of_its_moment(tmp_path: Path) -> None:
    taken = snapshot(1)
    checkpoints = Checkpoints(tmp_path, Saving())
    want = taken.tensors["model"]["w"].clone()
    checkpoints.save(1, taken)
    taken.tensors["model"]["w"].zero_()
    checkpoints.wait()
    assert torch.equal(save.read(tmp_path / "step-00000001").tensors["model"]["w"], want)


def test_the_memory_of_the_first_stage_is_taken_once() -> None:
    """Tensors that are the same shape again are copied to where they were; what is no more is given back."""
    staging = Staging()
    first = staging.copy(snapshot(1).tensors)
    where = {name: x.data_ptr() for name, x in first["optimizer"].items()}
    held = staging.nbytes
    again = staging.copy(snapshot(2).tensors)
    assert {name: x.data_ptr() for name, x in again["optimizer"].items()} == where
    assert torch.equal(again["model"]["w"], snapshot(2).tensors["model"]["w"])
    assert staging.nbytes == held
    wider = staging.copy({"model": {"w": torch.ones(5, 3).t()}})
    assert torch.equal(wider["model"]["w"], torch.ones(3, 5))
    assert wider["model"]["w"].is_contiguous()
    assert staging.nbytes == 60


def test_the_newest_and_the_multiples_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, [10, 20, 30, 40, 50], keep=2, keep_every=20)
    assert [step_of(p) for p in complete(tmp_path)] == [20, 30, 40, 50]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{s:08d}" for s in (20, 30, 40, 50)]


FILES = ["model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["truncate", "flip", "delete"])
def test_a_damaged_file_is_refused_by_name_and_the_one_before_is_offered(tmp_path: Path, name: str, harm: str) -> None:
    saved(tmp_path, [1, 2])
    path = tmp_path / "step-00000002" / name
    data = path.read_bytes()
    if harm == "truncate":
        path.write_bytes(data[:-1])
    elif harm == "flip":
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as caught:
        save.read(tmp_path / "step-00000002")
    assert "step-00000001" in str(caught.value)


def test_a_damaged_manifest_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, [1])
    (tmp_path / "step-00000001" / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        save.read(tmp_path / "step-00000001")


def test_another_format_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, [1])
    path = tmp_path / "step-00000001" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        save.read(tmp_path / "step-00000001")


def test_a_folder_without_manifest_is_not_complete(tmp_path: Path) -> None:
    saved(tmp_path, [1, 2])
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    assert [step_of(p) for p in complete(tmp_path)] == [1]
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        save.read(tmp_path / "step-00000002")


def test_leftovers_of_a_killed_write_are_cleared(tmp_path: Path) -> None:
    (tmp_path / ".writing-step-00000009").mkdir()
    (tmp_path / ".writing-step-00000009" / "model.safetensors").write_bytes(b"half")
    Checkpoints(tmp_path, Saving())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("background", [True, False])
def test_a_folder_that_cannot_be_written_is_told_and_at_the_end_an_error(tmp_path: Path, background: bool) -> None:
    folder = tmp_path / "c"
    news: list[News] = []
    checkpoints = saved(folder, [1], tell=news.append, background=background)
    folder.rename(tmp_path / "gone")
    (tmp_path / "c").write_text("a file where the folder was")
    for step in (2, 3):
        checkpoints.save(step, snapshot(step))
    checkpoints.save(4, snapshot(4), last=True)
    with pytest.raises(CheckpointError, match="could not be written"):
        checkpoints.wait()
    checkpoints.wait()
    assert [found.facts["in_a_row"] for found in news if found.name == "checkpoint failed"] == [1, 2]
    assert any("NO CHECKPOINT of step 3, 2 in a row: could not be written" in str(found.text) for found in news)
    assert [step_of(p) for p in complete(tmp_path / "gone")] == [1]


LARGE = Snapshot(tensors={"model": {"w": torch.zeros(1 << 16)}}, state={})


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_is_told_the_checkpoint_before_stays_and_the_next_is_tried(
    little_room: Path, background: bool
) -> None:
    news: list[News] = []
    checkpoints = saved(little_room, [1], tell=news.append, background=background)
    checkpoints.save(2, LARGE)
    checkpoints.save(3, snapshot(3))
    checkpoints.wait()
    (told,) = [str(found.text) for found in news if found.text]
    assert "NO CHECKPOINT of step 2: could not be written: disk full" in told
    assert "Training goes on" in told
    assert "the newest is of step 1" in told
    assert sorted(p.name for p in little_room.iterdir()) == ["step-00000001", "step-00000003"]
    assert save.read(little_room / "step-00000001").state == {"step": 1}
    checkpoints.save(4, LARGE, last=True)
    with pytest.raises(CheckpointError, match="disk full") as caught:
        checkpoints.wait()
    assert "resumes from the newest complete checkpoint" in str(caught.value)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A store that takes a file only once the event is set."""
    ready = threading.Event()

    def waiting(*words: Any, **named: Any) -> None:
        assert ready.wait(20)
        save_file(*words, **named)

    monkeypatch.setattr(save, "save_file", waiting)
    yield ready
    ready.set()


def test_a_slow_store_costs_a_checkpoint_and_no_more_than_patience(tmp_path: Path, slow: threading.Event) -> None:
    news: list[News] = []
    checkpoints = Checkpoints(tmp_path, Saving(patience=0.05), tell=news.append)
    assert checkpoints.save(1, snapshot(1)) < 1  # what is measured is the copy
    began = time.monotonic()
    blocked = checkpoints.save(2, snapshot(2))
    assert 0.05 <= blocked <= time.monotonic() - began
    assert [found.name for found in news] == ["checkpoint", "checkpoint skipped"]
    assert "that of step 1 is still being written" in str(news[-1].text)
    assert "there is none yet" in str(news[-1].text)
    slow.set()
    checkpoints.wait()
    checkpoints.save(3, snapshot(3))
    checkpoints.wait()
    assert [step_of(p) for p in complete(tmp_path)] == [1, 3]
    want = ["checkpoint", "checkpoint skipped", "checkpoint written", "checkpoint", "checkpoint written"]
    assert [found.name for found in news] == want


def test_the_last_checkpoint_waits_for_a_slow_store(
    tmp_path: Path, slow: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "AGAIN_SECONDS", 0.02)
    checkpoints = Checkpoints(tmp_path, Saving(patience=0.0))
    checkpoints.save(1, snapshot(1))
    threading.Timer(0.2, slow.set).start()
    checkpoints.save(2, snapshot(2), last=True)
    checkpoints.wait()
    assert [step_of(p) for p in complete(tmp_path)] == [1, 2]


def test_a_kill_during_the_second_stage_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """The process dies between two files of the second checkpoint."""
    words = [sys.executable, "-m", "tests.train.dying", str(tmp_path)]
    assert subprocess.run(words, check=False, timeout=120).returncode == -signal.SIGKILL
    assert [p.name for p in sorted(tmp_path.iterdir())] == [".writing-step-00000002", "step-00000001"]
    assert unfinished(tmp_path) == ["step-00000002"]
    assert save.read(tmp_path / "step-00000001").state == {"step": 1}
    saved(tmp_path, [2])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_what_is_no_checkpoint_is_passed_over(tmp_path: Path) -> None:
    """A folder without manifest, and a link that leads nowhere."""
    saved(tmp_path, [1, 2])
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    (tmp_path / "step-00000003").symlink_to(tmp_path / "gone")
    (tmp_path / "step-latest").symlink_to(tmp_path / "step-00000001")
    assert [step_of(p) for p in complete(tmp_path)] == [1]
    assert unfinished(tmp_path) == ["step-00000002", "step-00000003"]


def test_a_rank_that_could_not_write_is_heard_of_though_it_left_no_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks agree before a save: the first one gives up on what will not come, and the next save is made."""
    written, here, facts = save.write, threading.Barrier(2), [(False, False)] * 2

    def write(folder: Path, of: Snapshot, seat: tuple[int, int], **named: Any) -> None:
        if seat[0] == 1 and folder.name.endswith("1"):
            raise OSError(errno.ENOSPC, "No space left on device")
        written(folder, of, seat, **named)

    def life(rank: int) -> list[News]:
        def agree(mine: Any) -> list[bool]:
            facts[rank] = mine
            here.wait(20)
            found = [any(pair) for pair in zip(*facts, strict=True)]
            here.wait(20)
            return found

        news: list[News] = []
        checkpoints = Checkpoints(tmp_path, Saving(patience=0.0), seat=(rank, 2), tell=news.append, agree=agree)
        here.wait(20)
        checkpoints.save(1, snapshot(1))
        checkpoints.save(2, snapshot(2), last=True)
        checkpoints.wait()
        return news

    monkeypatch.setattr(save, "write", write)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(life, range(2))
    assert [step_of(p) for p in complete(tmp_path)] == [2]
    assert any("rank 1 has not written its part" in str(found.text) for found in first)
    assert any("disk full" in str(found.text) for found in second)


def test_the_first_rank_does_not_wait_for_a_rank_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "HURRY_SECONDS", 0.1)
    checkpoints = Checkpoints(tmp_path, Saving(), seat=(0, 2))
    checkpoints.save(3, snapshot(3))
    checkpoints.hurry()
    with pytest.raises(CheckpointError, match="rank 1 has not written its part"):
        checkpoints.wait()
    assert not list(tmp_path.iterdir())


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [1, 2])
    path = tmp_path / "step-00000002" / "model.safetensors"
    path.write_bytes(b"damaged")
    checkpoints.save(2, snapshot(2))
    checkpoints.wait()
    assert save.read(tmp_path / "step-00000002").state == {"step": 2}


def test_a_checkpoint_of_another_model_lists_what_differs() -> None:
    found = {"a": (2, 3), "old": (1,)}
    wanted = {"a": (2, 4), "new": (1,)}
    with pytest.raises(CheckpointError) as caught:
        save.must_fit(found, wanted, where="here")
    text = str(caught.value)
    assert "missing: new" in text
    assert "not in this model: old" in text
    assert "a: [2, 3] there, [2, 4] in this model" in text


def test_a_persons_own_copy_is_no_checkpoint_and_stays(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "recipe.toml").write_text("")
    saved(run / "checkpoints", [1])
    copy = run / "checkpoints" / "step-00000001-good"
    shutil.copytree(run / "checkpoints" / "step-00000001", copy)
    saved(run / "checkpoints", [2, 3], keep=1, background=False)
    assert [step_of(p) for p in complete(run / "checkpoints")] == [3]
    assert locate(run).weights.name == "step-00000003"
    assert save.read(copy).state == {"step": 1}


def test_going_back_forgets_what_came_later(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [10, 20, 30, 40], keep=4)
    assert checkpoints.forget_after(20) == [30, 40]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000020"]
    assert checkpoints.forget_after(20) == []


def test_other_parts_are_refused_and_other_settings_are_told() -> None:
    clip, lion = {"use": "clip", "norm": 1.0}, {"use": "lion", "lr": 0.1}
    made = {"optimizer": lion, "gradient": [clip]}
    assert save.must_be_the_same_parts(made, made, where="here") == []
    slower = {**made, "optimizer": {"use": "lion", "lr": 0.05}}
    assert save.must_be_the_same_parts(made, slower, where="here") == ["optimizer.lr 0.1 -> 0.05"]
    with pytest.raises(CheckpointError, match=r"gradient: clip there, none in this recipe") as caught:
        save.must_be_the_same_parts(made, {"optimizer": {"use": "adamw"}, "gradient": []}, where="here")
    assert "optimizer: lion there, adamw in this recipe" in str(caught.value)
