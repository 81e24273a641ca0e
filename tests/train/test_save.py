"""Checkpoints: complete or not there, verified by name, kept by policy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lmworks.core.errors import CheckpointError
from lmworks.model.checkpoint import complete, locate, step_of
from lmworks.train import save
from lmworks.train.save import Checkpoints, Saving, Snapshot


def snapshot(step: int) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "model": {"w": torch.randn(4, 3, generator=generator)},
        "optimizer": {"w/m": torch.randn(4, 3, generator=generator), "w/step": torch.tensor(float(step))},
        "random": {"cpu": torch.get_rng_state()},
    }
    return Snapshot(tensors=tensors, state={"step": step})


def saved(folder: Path, steps: list[int], **policy: object) -> Checkpoints:
    folder.mkdir(exist_ok=True)
    checkpoints = Checkpoints(folder, Saving(**policy))  # type: ignore[arg-type]
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
def test_a_folder_that_cannot_be_written_is_an_error_that_says_so(tmp_path: Path, background: bool) -> None:
    folder = tmp_path / "c"
    checkpoints = saved(folder, [1], background=background)
    folder.rename(tmp_path / "gone")
    (tmp_path / "c").write_text("a file where the folder was")
    with pytest.raises(CheckpointError, match="could not be written"):  # noqa: PT012  (a background write fails at wait)
        checkpoints.save(2, snapshot(2))
        checkpoints.wait()
    assert [step_of(p) for p in complete(tmp_path / "gone")] == [1]


@pytest.fixture
def little_room(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_is_named_and_the_checkpoint_before_stays(little_room: Path, background: bool) -> None:
    checkpoints = saved(little_room, [1], background=background)
    large = Snapshot(tensors={"model": {"w": torch.zeros(1 << 16)}}, state={})
    with pytest.raises(CheckpointError, match="disk full") as caught:  # noqa: PT012  (a background write fails at wait)
        checkpoints.save(2, large)
        checkpoints.wait()
    assert "resumes from the newest complete checkpoint" in str(caught.value)
    assert sorted(p.name for p in little_room.iterdir()) == ["step-00000001"]
    assert save.read(little_room / "step-00000001").state == {"step": 1}


def test_the_first_rank_does_not_wait_for_a_rank_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save, "HURRY_SECONDS", 0.1)
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
