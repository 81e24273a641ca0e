"""What every test stands on: one torch thread, no network, a home of its own, tiers."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch is imported: spinning OpenMP threads of two test processes slow each other down several times.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch

# Before Triton is imported, which torch.distributed does: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

TIERS = {"ranks", "slow", "gpu"}

# The same examples in every run; no deadline, because a busy machine is not a fault of the code.
hypothesis.settings.register_profile("lmworks", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("lmworks")


def pytest_configure(config: pytest.Config) -> None:
    """Compute on one thread, as OMP_NUM_THREADS alone does not bind torch's own pools."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tier `fast` to every test without one, and skip `gpu` where there is no device."""
    for item in items:
        tiers = TIERS & {mark.name for mark in item.iter_markers()}
        if not tiers:
            item.add_marker(pytest.mark.fast)
        if "gpu" in tiers and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def lmworks_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[os.PathLike[str]]:
    """A fresh LMWORKS_HOME (caches, fetched models) per test process, also for the commands that tests start."""
    home = tmp_path_factory.mktemp("lmworks-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMWORKS_HOME", str(home))
        yield home


@pytest.fixture(autouse=True)
def closed_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test reach this machine only. Nothing is downloaded without being asked for."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in {"127.0.0.1", "::1", "localhost"}:
            raise RuntimeError(f"a test tried to reach {address[0]}; tests run without a network")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_here)


@pytest.fixture
def little_room(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB in memory."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)  # lazily: what is mapped may still be held
