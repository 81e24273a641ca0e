"""Arm `product`: the rate of a square matrix product, 2048 x 2048 x 2048, in the job's precision."""

from __future__ import annotations

import torch

from peers.job import Enough, Timeline, read_job

SIZE = 2048


def main() -> None:
    """Time one product per mark."""
    job = read_job()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job.precision]
    a, b = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
    timeline = Timeline(job, flops=2 * SIZE**3)
    try:
        while True:
            torch.mm(a, b)
            timeline.mark()
    except Enough:
        return


if __name__ == "__main__":
    main()
