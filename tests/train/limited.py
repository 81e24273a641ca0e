"""A training run in a process that may have only so much memory: python limited.py RECIPE.json FOLDER BYTES."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import matplotlib.backends.backend_agg  # noqa: F401  (libraries are address space)
import numpy as np
import psutil
import torch

from lmworks.core import recipe as recipes
from lmworks.core.errors import LmworksError
from lmworks.train.loop import run
from tests.train import toy


def main() -> int:
    """Run it; the exit code is that of the command line."""
    spec, folder, room = sys.argv[1:]
    torch.set_num_threads(1)
    decoded = recipes.decode(json.loads(Path(spec).read_text(encoding="utf-8")))
    warm = toy.batch(2, 8, 61)  # whatever is loaded on first use is loaded
    toy.model()(warm.tokens_BT).sum().backward()
    np.ones((256, 256)) @ np.ones((256, 256))
    limit = psutil.Process().memory_info().vms + int(room)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    report = toy.Silent()
    try:
        run(decoded, Path(folder), resume="auto", report=report)
    except LmworksError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return error.exit_code
    finally:
        sys.stderr.write("\n".join(report.notes) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
