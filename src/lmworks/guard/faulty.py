"""A rank with a fault in it: puts the fault in, then runs the command as it is. The trainer knows nothing of it.

    python -m lmworks.guard.faulty FAULTS.json train RECIPE --run DIR

The first fault of the file that has not happened yet is put in, where it is meant for this rank.
"""

from __future__ import annotations

import errno
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from lmworks.core.files import write_json
from lmworks.guard import faults
from lmworks.guard.faults import Fault
from lmworks.guard.report import Folder, table_at
from lmworks.model.checkpoint import complete
from lmworks.parallel.wire import Wire
from lmworks.train import loop, save, step

REDUCES = ("all-reduce", "reduce-scatter", "all-to-all", "send")
"""Exchanges in which gradients travel."""
SLOWER = """
import os, signal, sys, time
pid = int(sys.argv[1])
while os.getppid() == pid:
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.02)
    os.kill(pid, signal.SIGCONT)
    time.sleep(0.04)
"""
"""Stops its parent for a third of the time."""


class Injector:
    """Lets one fault happen in this process, once."""

    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        self._now = 0
        """The step that is being made."""
        self._done = False
        self._backward = False
        """Whether a backward pass of this step has begun."""

    def put_in(self) -> None:
        """Lay the fault where it will happen."""
        at = self._fault.at
        loop.Loop._step = _before(loop.Loop._step, self._begin)  # type: ignore[method-assign]
        if at == "start":
            loop._build = _before(loop._build, self._happen)
        elif at == "load":
            save.Stored.pieces = _before(save.Stored.pieces, self._happen)  # type: ignore[method-assign]
        elif at == "update":
            step.guard = _after(step.guard, self._in_step)
        elif at == "save":
            save.save_file = _after(save.save_file, self._in_save)  # type: ignore[attr-defined]  # safetensors' own
        elif at == "forward":
            register_module_forward_pre_hook(lambda module, args: self._in_step())
        else:
            register_module_forward_hook(self._on_backward)
            if at == "reduce":
                Wire.note = _before(Wire.note, self._on_exchange)  # type: ignore[method-assign]

    def _begin(self, running: loop.Loop) -> None:
        self._now, self._backward = running.progress.step + 1, False

    def _due(self) -> bool:
        return not self._done and self._now == self._fault.step

    def _in_step(self, *unused: Any) -> None:
        if self._due():
            self._happen()

    def _in_save(self, *unused: Any, **named: Any) -> None:
        if not self._done and self._now >= self._fault.step:
            self._happen()

    def _on_backward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Lay a hook on what the backward pass comes through."""
        if self._due() and not self._backward and isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(self._in_backward)  # type: ignore[no-untyped-call]  # torch's

    def _in_backward(self, gradient: Tensor) -> Tensor | None:
        self._backward = True
        if self._fault.at != "backward" or not self._due():
            return None
        self._happen()
        return gradient * float("nan") if self._fault.kind == "nan" else None

    def _on_exchange(self, wire: Wire, axis: str, operation: str, size: float) -> None:
        if self._backward and operation in REDUCES:
            self._in_step()

    def _happen(self, *unused: Any, **named: Any) -> None:
        """The fault itself. It is marked first: afterwards nobody may be there to do it."""
        if self._done:
            return
        self._done = True
        write_json(Path(self._fault.mark), {"time": time.time(), "step": self._now, "pid": os.getpid()})
        acts: dict[str, Callable[[], None]] = {
            "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
            "hang": lambda: os.kill(os.getpid(), signal.SIGSTOP),
            "stuck": _wait_for_ever,
            "slow": _be_slow,
            "nan": lambda: None,
            "corrupt": self._corrupt,
            "diskfull": _no_space,
            "driver": self._kill_driver,
        }
        acts[self._fault.kind]()

    def _corrupt(self) -> None:
        """Change one byte in the middle of the largest file of the newest checkpoint, and die."""
        newest = complete(Path(self._fault.run) / "checkpoints")[-1]
        path = max(newest.glob("*.safetensors"), key=lambda file: file.stat().st_size)
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            (byte,) = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 0xFF]))
        os.kill(os.getpid(), signal.SIGKILL)

    def _kill_driver(self) -> None:
        held = table_at(Folder(Path(self._fault.run)).lease)
        assert held is not None, "a drill has a driver"
        os.kill(int(held["pid"]), signal.SIGKILL)


def _wait_for_ever() -> None:
    while True:
        time.sleep(60)


def _be_slow() -> None:
    subprocess.Popen([sys.executable, "-c", SLOWER, str(os.getpid())])


def _no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _before(function: Callable[..., Any], first: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with something done before it."""

    def both(*args: Any, **named: Any) -> Any:
        first(*args, **named)
        return function(*args, **named)

    return both


def _after(function: Callable[..., Any], then: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with something done after it."""

    def both(*args: Any, **named: Any) -> Any:
        result = function(*args, **named)
        then(*args, **named)
        return result

    return both


def main(words: list[str]) -> None:
    """Put the fault in, and run the command."""
    waiting = [fault for fault in faults.read(Path(words[0])) if not Path(fault.mark).exists()]
    if waiting and waiting[0].rank == int(os.environ.get("RANK", "0")):
        Injector(waiting[0]).put_in()
    sys.argv = ["lmworks", *words[1:]]
    runpy.run_module("lmworks", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
