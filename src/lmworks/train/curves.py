"""One picture of a run: loss, rate, gradient norm and speed over tokens."""

from __future__ import annotations

from typing import Any

from lmworks.core.journal import rows
from lmworks.core.run import RunFolder


def draw(folder: RunFolder) -> None:
    """Write curves.png from metrics.jsonl."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  (0.4 s, and only at the end of a run)
    from matplotlib.figure import Figure  # noqa: PLC0415

    found = list(rows(folder.metrics))
    steps = [row for row in found if "loss" in row]
    checks = [row for row in found if "val_loss" in row]
    if not steps:
        return
    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)
    (loss, norm), (rate, speed) = figure.subplots(2, 2)
    loss.plot(*_line(steps, "loss"), linewidth=0.6, alpha=0.5, label="training")
    loss.plot(*_smooth(steps), linewidth=1.4, color="C0", label="training, running mean")
    if checks:
        loss.plot(*_line(checks, "val_loss"), "o-", color="C1", markersize=3, label="validation")
    loss.set_ylabel("loss (nats per token)")
    loss.legend()
    norm.plot(*_line(steps, "grad_norm"), linewidth=0.8)
    norm.set_yscale("log")
    norm.set_ylabel("gradient norm")
    rate.plot(*_line(steps, "lr"))
    rate.set_ylabel("learning rate")
    speed.plot(*_line(steps, "tokens_per_second"), linewidth=0.8)
    speed.set_ylim(bottom=0)
    speed.set_ylabel("tokens per second")
    for axes in (loss, norm, rate, speed):
        axes.set_xlabel("target tokens seen")
        axes.grid(alpha=0.3)
    figure.suptitle(folder.name)
    figure.savefig(folder.curves, dpi=120)


def _line(found: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    numbers = [row for row in found if isinstance(row[name], int | float)]
    return [row["tokens"] for row in numbers], [row[name] for row in numbers]


def _smooth(steps: list[dict[str, Any]], weight: float = 0.95) -> tuple[list[float], list[float]]:
    """Exponential running mean of the loss, corrected for its start."""
    tokens, losses = _line(steps, "loss")
    mean, norm, out = 0.0, 0.0, []
    for loss in losses:
        mean, norm = weight * mean + (1 - weight) * loss, weight * norm + (1 - weight)
        out.append(mean / norm)
    return tokens, out
