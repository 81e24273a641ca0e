"""Files that nobody keeps: written and read by place, past the page cache, gone with the process.

A file loses its name as soon as it is open (POSIX keeps what an open file holds), so a process that is killed leaves
nothing. Where a folder cannot do that, the name stays until the file is closed; it tells the machine and the process,
and whoever next opens a file in the folder takes away what a dead process left.
"""

from __future__ import annotations

import errno
import os
import socket
import uuid
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from torch import Tensor

from lmworks.core.errors import UsageError
from lmworks.train.lanes import PAGE

NETWORK = {
    "nfs",
    "nfs4",
    "cifs",
    "smbfs",
    "smb3",
    "9p",
    "afs",
    "lustre",
    "gpfs",
    "ceph",
    "beegfs",
    "glusterfs",
    "wekafs",
}
MEMORY = {"tmpfs", "ramfs", "devtmpfs"}
F_NOCACHE = 48
"""macOS: past the page cache."""


class Scratch:
    """One open file. Raises UsageError where the folder takes none."""

    def __init__(self, folder: Path, *, direct: bool = True) -> None:
        try:
            self._path: Path | None = fresh(folder)
            self._file, self.direct = _opened(self._path, direct=direct)
        except OSError as error:
            raise UsageError(
                f"no file can be made: {error.strerror or error}",
                where=f"folder {folder} for saved tensors",
                next_step="name a folder on a local disk in saved.folders, or set saved.use = 'keep'",
            ) from error
        with suppress(OSError):  # a file system that keeps the names of open files
            self._path.unlink()
            self._path = None

    def write(self, values: Tensor, start: int) -> None:
        """Write a flat uint8 tensor of host memory, whole pages that start at a page, to a place in the file."""
        view = _view(values)
        while view:
            done = os.pwrite(self._file, view, start)
            if done == 0:
                raise OSError(errno.EIO, "nothing was written")
            view, start = view[done:], start + done

    def read(self, out: Tensor, start: int) -> None:
        """Read into the same. Raises OSError when the file is shorter than what was written."""
        view = _view(out)
        while view:
            done = os.preadv(self._file, [view], start)
            if done == 0:
                raise OSError(errno.EIO, f"{len(view)} bytes of a saved tensor are missing from its file")
            view, start = view[done:], start + done

    def close(self) -> None:
        """Give its room back."""
        os.close(self._file)
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _opened(path: Path, *, direct: bool) -> tuple[int, bool]:
    """An open file, and whether it goes past the page cache: where the system and the file system can do that."""
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
    past = getattr(os, "O_DIRECT", 0) if direct else 0
    if past:
        with suppress(OSError):
            file = os.open(path, flags | past, 0o600)
            if _takes_pages(file):
                return file, True
            os.close(file)
    file = os.open(path, flags, 0o600)
    if direct and hasattr(os, "uname") and os.uname().sysname == "Darwin":
        import fcntl  # noqa: PLC0415  (not on every system)

        fcntl.fcntl(file, F_NOCACHE, 1)
        return file, True
    return file, False


def _takes_pages(file: int) -> bool:
    """Whether single pages can be written past the page cache: some disks want larger units, some folders refuse."""
    bare = torch.zeros(2 * PAGE, dtype=torch.uint8)
    start = -bare.data_ptr() % PAGE
    try:
        os.pwrite(file, _view(bare[start : start + PAGE]), 0)
    except OSError as error:
        return error.errno != errno.EINVAL
    return True


def fresh(folder: Path) -> Path:
    """A name that no file in the folder has; leftovers of dead processes are taken away first."""
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    return folder / f"saved-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"


def clean(folder: Path) -> None:
    """Take away what processes of this machine that are no more have left in a folder."""
    for path in folder.glob(f"saved-{socket.gethostname()}-*-*"):
        process = path.name.rsplit("-", 2)[1]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            with suppress(OSError):  # somebody else took it away, or it is not ours to take
                path.unlink()


def doubt(folder: Path) -> str | None:
    """Why a folder is a bad place for saved tensors, in words; None where nothing speaks against it."""
    kind = file_system(folder)
    if kind in MEMORY:
        return f"{folder} is in memory ({kind}): what goes there takes the room that it was to free"
    if kind in NETWORK or kind.startswith("fuse.ssh"):
        return f"{folder} is on a network file system ({kind}): a local disk is faster, and disturbs nobody"
    return None


def file_system(folder: Path) -> str:
    """The kind of file system that a folder is on; empty where that cannot be told."""
    where = folder.resolve()
    kinds = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    above = [mount for mount in kinds if where.is_relative_to(mount)]
    return kinds[max(above, key=len)].lower() if above else ""


def _view(values: Tensor) -> memoryview:
    """Flat bytes of a CPU tensor, without a copy."""
    return memoryview(values.numpy())  # type: ignore[arg-type]  # arrays are buffers; numpy's types do not say so
