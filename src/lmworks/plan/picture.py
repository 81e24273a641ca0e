"""A plan as a picture: memory of every place of the pipeline by class, and one step on the clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmworks.parallel.footprint import CLASSES, WORDS
from lmworks.parallel.timeline import COLOURS
from lmworks.plan.cluster import Cluster
from lmworks.plan.search import ROOM, Answer, Plan, described

MEMORY = ("#4c78a8", "#9ecae9", "#f58518", "#54a24b", "#e45756", "#bab0ac")
"""Fill of each class of memory."""
LANES = {"compute": 0, "network": 1, "away": 2}
SPANS = {
    "forward": "#8ab6e8",
    "backward": "#f2b27c",
    "gather": "#a8d5a2",
    "reduce": "#e08a8a",
    "out": "#c9b3e6",
    "in": "#8f76b8",
}
"""Fill of what goes on a rank's lanes."""


def draw(answer: Answer, plan: Plan, cluster: Cluster, path: Path) -> None:
    """Write a plan as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  (0.4 s, and only for pictures)
    from matplotlib.figure import Figure  # noqa: PLC0415

    places = plan.choice.layout.pp
    figure = Figure(figsize=(12, 4.2 + 0.22 * places), layout="constrained")
    FigureCanvasAgg(figure)
    memory, step = figure.subplots(2, 1, height_ratios=(1, 1.3))
    _memory(memory, answer, plan, cluster)
    if plan.step.timeline is not None:
        _pipeline(step, plan)
    else:
        _lanes(step, plan)
    figure.suptitle(f"{answer.devices} x {cluster.device}: {described(plan.choice)}", fontsize=11)
    figure.savefig(path, dpi=120)


def _memory(axes: Any, answer: Answer, plan: Plan, cluster: Cluster) -> None:
    places = range(plan.choice.layout.pp)
    told = [answer.ground.footprint(plan.choice, place).by_class() for place in places]
    left = [0.0] * len(told)
    for name, colour in zip(CLASSES, MEMORY, strict=True):
        sizes = [(found[name] or 0) / 1e9 for found in told]
        axes.barh(list(places), sizes, left=left, color=colour, label=WORDS[name], height=0.8)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    whole = cluster.memory_bytes.value / 1e9
    axes.axvline(whole, color="#333333", linewidth=1.2)
    axes.axvline(ROOM * whole, color="#333333", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 1.05 * whole)
    axes.invert_yaxis()
    axes.set_xlabel("GB of one device; dotted: what a plan may take")
    axes.set_ylabel("place in the pipeline")
    axes.set_yticks(list(places) if len(told) <= 32 else list(places)[::8])
    axes.legend(fontsize=7, ncols=len(CLASSES), loc="lower right", bbox_to_anchor=(1, 1), frameon=False)


def _pipeline(axes: Any, plan: Plan) -> None:
    timeline = plan.step.timeline
    assert timeline is not None, "there is one to draw"
    for event in timeline.events:
        taken = event.end - event.start
        axes.barh(
            event.rank, taken, left=event.start, height=0.85, color=COLOURS[event.kind], edgecolor="white", lw=0.4
        )
    axes.invert_yaxis()
    axes.set_xlabel("seconds of one step: forward blue, backward orange, waiting white")
    axes.set_ylabel("place in the pipeline")


def _lanes(axes: Any, plan: Plan) -> None:
    spans = plan.step.walk.spans
    for span in spans:
        taken, colour = span.end - span.start, SPANS[span.what]
        axes.barh(LANES[span.lane], taken, left=span.start, height=0.8, color=colour, edgecolor="white", lw=0.2)
    shown = [what for what in SPANS if any(span.what == what for span in spans)]
    handles = [axes.barh(0, 0, color=SPANS[what]) for what in shown]
    lanes = [lane for lane in LANES if any(span.lane == lane for span in spans)]
    axes.set_yticks([LANES[lane] for lane in lanes], lanes)
    axes.invert_yaxis()
    axes.set_xlabel("seconds of the last micro-batch of a step, block by block, on one rank")
    axes.legend(handles, shown, fontsize=7, ncols=6, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
