"""The picture of a gpu_memory record: what a micro-batch costs and brings, and losses side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
from matplotlib import pyplot as plt


def draw(found: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Left: tokens/s over GiB of activations, a point for each micro-batch. Right: losses, where there are any."""
    with_loss = {arm: run["losses"] for arm, run in found.items() if run.get("losses")}
    figure, panels = plt.subplots(1, 2 if with_loss else 1, figsize=(12 if with_loss else 7, 5), squeeze=False)
    curves = panels[0][0]
    for arm, run in found.items():
        points = [p for p in run.get("points", []) if p["activations"] is not None]
        if points:
            wide, fast = [p["activations"] / 2**30 for p in points], [p["tokens_per_second"] for p in points]
            curves.plot(wide, fast, marker="o", label=arm)
            for x, y, p in zip(wide, fast, points, strict=True):
                curves.annotate(str(p["micro"]), (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
    curves.set(xlabel="activations at the peak, GiB (numbers: rows of a micro-batch)", ylabel="tokens/s")
    curves.set_ylim(bottom=0)
    if curves.lines:
        curves.legend(fontsize=8)
    if with_loss:
        for arm, values in with_loss.items():
            panels[0][1].plot(range(1, len(values) + 1), values, label=arm, linewidth=1)
        panels[0][1].set(xlabel="step", ylabel="loss, nats")
        panels[0][1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
