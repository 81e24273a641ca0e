"""A mixture as a picture: shares with their spread, what each source is worth, and a slice of the simplex."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lmworks.mix.problem import Floats
from lmworks.mix.slices import triangle

NATURAL, CHOSEN, GOOD, BAD = "#b8b8b8", "#4c78a8", "#54a24b", "#e45756"


def draw(content: dict[str, Any], path: Path) -> None:
    """Write the picture as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  (0.4 s, and only for pictures)
    from matplotlib.figure import Figure  # noqa: PLC0415

    part = content.get("slice")
    panels = 3 if part is not None else 2
    figure = Figure(figsize=(5 * panels, 1.8 + 0.34 * len(content["sources"]) + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels)
    _shares(axes[0], content["sources"])
    _worth(axes[1], content.get("worth", []))
    if part is not None:
        _slice(axes[2], part)
    figure.suptitle(f"mixture by {content['recommendation']['rule']}", fontsize=10, wrap=True)
    figure.savefig(path, dpi=120)


def _flat(parts_N3: Floats) -> tuple[Floats, Floats]:
    """Barycentric to plane coordinates."""
    return parts_N3[:, 1] + parts_N3[:, 2] / 2, parts_N3[:, 2] * np.sqrt(3) / 2


def _shares(axes: Any, sources: list[dict[str, Any]]) -> None:
    at = np.arange(len(sources))
    natural, share = [one["natural"] for one in sources], [one["share"] for one in sources]
    axes.barh(at - 0.2, natural, height=0.36, color=NATURAL, label="natural")
    axes.barh(at + 0.2, share, height=0.36, color=CHOSEN, label="chosen")
    for y, one in zip(at, sources, strict=True):
        axes.plot([one["low"], one["high"]], [y + 0.2, y + 0.2], color="#222222", linewidth=1.4)
        if one["cap"] < 1:
            axes.plot([one["cap"], one["cap"]], [y - 0.4, y + 0.4], color=BAD, linewidth=1.0, linestyle=":")
    axes.set_yticks(at, [one["name"] for one in sources])
    axes.invert_yaxis()
    axes.set_xlabel("share; line: 5 to 95 % of refits; dotted: cap")
    axes.legend(fontsize=8)


def _worth(axes: Any, found: list[dict[str, Any]]) -> None:
    at = np.arange(len(found))
    points = [one["point"] for one in found]
    spread = [0.0 if one["point_sd"] is None else one["point_sd"] for one in found]
    axes.barh(at, points, xerr=spread, color=[GOOD if point > 0 else BAD for point in points], height=0.6)
    axes.axvline(0, color="#333333", linewidth=0.8)
    axes.set_yticks(at, [one["source"] for one in found])
    axes.invert_yaxis()
    axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel("what the target loses per further hundredth of the tokens")


def _slice(axes: Any, part: dict[str, Any]) -> None:
    x, y = _flat(triangle())
    shown = axes.tricontourf(x, y, part["values"], levels=14, cmap="viridis_r")
    axes.figure.colorbar(shown, ax=axes, shrink=0.7, label="predicted target")
    if part["runs"]:
        axes.scatter(*_flat(np.array(part["runs"])), s=12, color="white", edgecolor="#333333", label="runs")
    axes.scatter(*_flat(np.array([part["chosen"]])), s=90, marker="*", color=BAD, label="chosen")
    for (u, v), name in zip(((0, -0.06), (1, -0.06), (0.5, 0.9)), part["sources"], strict=True):
        axes.text(u, v, name, ha="center", fontsize=9)
    axes.set_title(f"{part['whole']:.0%} of the tokens, the rest as chosen", fontsize=9, pad=24)
    axes.set_axis_off()
    axes.legend(fontsize=8, loc="upper right")
