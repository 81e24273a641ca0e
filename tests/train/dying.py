"""Save twice, and be killed between two files of the second checkpoint: python -m tests.train.dying FOLDER."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lmworks.train import save
from lmworks.train.checkpoints import Checkpoints, Saving
from lmworks.train.save import Snapshot


def main() -> None:
    """The second checkpoint's optimizer is never written."""
    checkpoints = Checkpoints(Path(sys.argv[1]), Saving())
    x = torch.ones(8, 8)
    checkpoints.save(1, Snapshot(tensors={"model": {"w": x}, "optimizer": {"w/m": x}}, state={"step": 1}))
    checkpoints.wait()

    def dying(tensors: dict[str, Any], path: Path, **named: Any) -> None:
        if path.name == "optimizer.safetensors":
            os.kill(os.getpid(), signal.SIGKILL)
        save_file(tensors, path, **named)

    save.save_file = dying
    checkpoints.save(2, Snapshot(tensors={"model": {"w": x}, "optimizer": {"w/m": x}}, state={"step": 2}))
    checkpoints.wait()


if __name__ == "__main__":
    main()
