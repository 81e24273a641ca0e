"""Files that nobody keeps: gone with the process, past the page cache, never another's."""

from __future__ import annotations

import itertools
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from lmworks.core.errors import UsageError
from lmworks.train.backends import Disk
from lmworks.train.lanes import CHUNK, PAGE, Lane
from lmworks.train.ledger import Ledger
from lmworks.train.offload import TensorCache
from lmworks.train.scratch import Scratch, clean, doubt, file_system


def values(nbytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("nbytes", [1, PAGE - 1, PAGE, PAGE + 1, CHUNK, CHUNK + 5, 2 * CHUNK + PAGE])
def test_what_is_written_is_read(nbytes: int, direct: bool, tmp_path: Path) -> None:
    disk = Disk([tmp_path], direct=direct)
    slots = [disk.store(values(nbytes, seed)) for seed in range(2)]
    for seed, slot in enumerate(slots):
        out = torch.zeros(nbytes, dtype=torch.uint8)
        disk.load(slot, out)
        assert torch.equal(out, values(nbytes, seed))
    assert not list(tmp_path.iterdir()), "an open file has no name"
    disk.close()


@given(some.lists(some.tuples(some.booleans(), some.integers(1, 3 * PAGE)), max_size=30))
def test_slots_never_overlap_and_are_used_again(moves: list[tuple[bool, int]]) -> None:
    from lmworks.train.backends import Room, Slot

    room, taken = Room(2), list[Slot]()
    most = 0
    for give, nbytes in moves:
        if give and taken:
            room.give(taken.pop(0))
        else:
            taken.append(room.take(nbytes))
        spans = sorted((slot.file, slot.start, slot.start + slot.room) for slot in taken)
        assert all(a[0] != b[0] or a[2] <= b[1] for a, b in itertools.pairwise(spans))
        assert all(slot.start % PAGE == 0 for slot in taken)
        most = max(most, sum(slot.room for slot in taken))
    assert room.nbytes >= most


def test_pages_past_the_cache_or_through_it(tmp_path: Path) -> None:
    assert not Disk([tmp_path], direct=False).direct
    if file_system(tmp_path) in {"ext4", "xfs", "btrfs"}:
        assert Disk([tmp_path]).direct


@contextmanager
def files_no_longer_than(nbytes: int) -> Iterator[None]:
    """As on a disk with so much room: the system refuses what is beyond."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def saving(offload: TensorCache, x: torch.Tensor) -> torch.Tensor:
    """Saves two tensors of x's size; both writes are over, or given up."""
    with offload.block("0"):
        y = (x * 2.0).square() + (x * 3.0).square()
    offload.settle()
    return y


def test_a_disk_that_is_full_keeps_what_does_not_fit(tmp_path: Path) -> None:
    offload = TensorCache(Disk([tmp_path]), Ledger(), least=0, threads=1, ahead="block")
    x = torch.arange(8.0 * PAGE).view(8, PAGE).requires_grad_()
    nbytes = 8 * PAGE * 4
    told = pytest.warns(UserWarning, match=f"{nbytes} bytes of block 0 stay in memory: .*File too")
    with files_no_longer_than(nbytes + PAGE), told:
        y = saving(offload, x)
    facts = offload.told()
    assert (facts.stored, facts.kept) == (nbytes, nbytes)
    y.sum().backward()
    assert torch.equal(x.grad, 26 * x)  # type: ignore[arg-type]
    offload.close()


def test_a_folder_that_takes_no_file_is_told_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="no file can be made") as caught:
        Disk([tmp_path / "fine", tmp_path / "file" / "below"])
    assert "saved.folders" in str(caught.value)
    assert not list((tmp_path / "fine").iterdir())


def test_what_dead_processes_left_is_taken_away(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = socket.gethostname()
    left = tmp_path / f"saved-{here}-{gone.pid}-1"
    others = [
        tmp_path / f"saved-{here}-{os.getpid()}-2",
        tmp_path / f"saved-elsewhere-{gone.pid}-3",
        tmp_path / "saved",
    ]
    for path in (left, *others):
        path.write_text("x")
    clean(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_two_ranks_in_one_folder_have_files_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where open files keep their names: two of them, gone when they are closed."""

    def refuses(*_: object, **__: object) -> None:
        raise PermissionError("the file is open")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuses)
        files = [Scratch(tmp_path) for _ in range(2)]
    assert len(list(tmp_path.iterdir())) == 2
    lane = Lane()
    for seed, file in enumerate(files):
        lane.buffer[:PAGE] = values(PAGE, seed)
        file.write(lane.buffer[:PAGE], 0)
    for seed, file in enumerate(files):
        file.read(lane.buffer[:PAGE], 0)
        assert torch.equal(lane.buffer[:PAGE], values(PAGE, seed))
        file.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "said"), [("nfs4", "network"), ("tmpfs", "in memory"), ("fuse.sshfs", "network"), ("ext4", None)]
)
def test_bad_places_are_told(kind: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = [
        SimpleNamespace(mountpoint="/", fstype="xfs"),
        SimpleNamespace(mountpoint=str(tmp_path), fstype=kind),
        SimpleNamespace(mountpoint=str(tmp_path) + "-beside", fstype="ramfs"),
    ]
    monkeypatch.setattr(psutil, "disk_partitions", lambda **_: mounts)
    found = doubt(tmp_path / "not" / "there")
    assert found is None if said is None else said in str(found)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no file system in memory at a known place")
def test_the_file_system_of_this_machine() -> None:
    assert file_system(Path("/dev/shm")) in {"tmpfs", "ramfs", "devtmpfs"}
