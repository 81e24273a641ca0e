"""What people see of a comparison: text for the terminal, a picture, and a page that holds everything in one file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmworks.core import files

TAKES = {"last": "last", "mean": "mean of", "min": "least", "max": "greatest", "reach": "steps to the other's last"}
HTML = Path(__file__).with_name("report.html.jinja")


def write(content: dict[str, Any], claims: Sequence[dict[str, Any]], folder: Path) -> Path:
    """Write curves.png, comparison.json and report.html into a folder; returns the page."""
    draw(content, folder / "curves.png")
    files.write_json(folder / "comparison.json", content)
    page = folder / "report.html"
    files.write_text(page, html(content, claims, folder / "curves.png"))
    return page


def arm_rows(content: dict[str, Any]) -> list[list[str]]:
    """One arm a row: name, chosen values, tuning runs, steps, last metric with its range, seconds, memory."""
    rows = []
    for arm in content["arms"]:
        values = [run[content["metric"]] for run in arm["runs"]]
        seconds = [run["seconds"] for run in arm["runs"]]
        memory = [run["memory_bytes"] for run in arm["runs"]]
        edge = " (edge of the grid)" if arm["at_the_edge_of_its_grid"] else ""
        chosen = ", ".join(f"{path.rpartition('.')[2]}={number(value)}" for path, value in arm["chosen"].items())
        rows.append(
            [
                arm["name"] + (" *" if arm["name"] == content["baseline"] else ""),
                chosen + edge,
                str(len(arm["tried"])),
                str(arm["steps"]),
                _spread(values),
                _mean(seconds, 1),
                _mean([m / 2**20 if isinstance(m, float | int) else m for m in memory], 0),
            ]
        )
    return rows


ARM_HEADER = ["arm", "tuned", "tuning runs", "steps", "metric (range)", "seconds", "peak MiB"]
FINDING_HEADER = ["claim", "test", "seen", "95 % interval", "bound", "could have seen", "verdict"]


def finding_rows(content: dict[str, Any]) -> list[list[str]]:
    """Claim, what was compared, mean over seeds, interval, bound, smallest effect it could have told, verdict."""
    rows = []
    for finding in content["findings"]:
        test = finding["test"]
        low, high = finding["interval"]
        rows.append(
            [
                test["claim"],
                sentence(test),
                number(finding["mean"]),
                f"{number(low)} to {number(high)}",
                number(finding["bound"]),
                number(finding["could_see"]),
                f"{finding['verdict']}: {finding['why']}",
            ]
        )
    return rows


def finding_lines(content: dict[str, Any]) -> list[str]:
    """The findings for a terminal: verdict and claim, what was compared, what was seen, why."""
    lines = []
    for claim, what, seen, interval, bound, could_see, verdict in finding_rows(content):
        word, _, why = verdict.partition(": ")
        lines += [
            f"{word.upper():<10}  {claim}".rstrip(),
            f"            {what}",
            f"            seen {seen} ({interval}), bound {bound}, could have seen {could_see}",
            f"            {why}",
        ]
    return lines


def sentence(test: dict[str, Any]) -> str:
    """'sophia-g / adamw, last val_loss: less'."""
    if test["take"] == "reach":
        return f"{test['arm']} comes down to {test['against']}'s last {test['column']} at this share of its budget"
    sign = "/" if test["compare"] == "ratio" else "-"
    return f"{test['arm']} {sign} {test['against']}, {TAKES[test['take']]} {test['column']}: {test['want']}"


def number(value: Any) -> str:
    """Four figures; 'inf' and 'nan' as they are."""
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _spread(values: Sequence[Any]) -> str:
    numbers = [v for v in values if isinstance(v, int | float)]
    if len(numbers) < len(values) or not numbers:
        return ", ".join(number(v) for v in values)
    return f"{sum(numbers) / len(numbers):.4f} ({min(numbers):.4f} to {max(numbers):.4f})"


def _mean(values: Sequence[Any], digits: int) -> str:
    numbers = [v for v in values if isinstance(v, int | float)]
    return f"{sum(numbers) / len(numbers):.{digits}f}" if numbers else ""


def draw(content: dict[str, Any], path: Path) -> None:
    """The metric along the axis (mean over seeds, range as a band), and each arm's end against the baseline's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  (0.4 s, and only at the end)
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    along, ends = figure.subplots(1, 2, width_ratios=[3, 2])
    for i, arm in enumerate(content["arms"]):
        _draw_arm(along, arm, f"C{i}")
    along.set_xlabel(content["axis"])
    along.set_ylabel(content["metric"])
    along.legend()
    along.grid(alpha=0.3)
    _draw_ends(ends, content)
    figure.suptitle(content["method"] or "comparison")
    figure.savefig(path, dpi=120)


def _draw_arm(axes: Any, arm: dict[str, Any], colour: str) -> None:
    curves = [run["curve"] for run in arm["runs"] if run["curve"] and run["failed"] is None]
    if not curves:
        axes.plot([], [], color=colour, label=f"{arm['name']} (exploded)")
        return
    length = min(len(curve) for curve in curves)
    places = [sum(curve[i][0] for curve in curves) / len(curves) for i in range(length)]
    columns = [[curve[i][1] for curve in curves] for i in range(length)]
    alone = {"marker": "o"} if length == 1 else {}  # a line of one point would not be seen
    axes.plot(places, [sum(c) / len(c) for c in columns], color=colour, label=arm["name"], **alone)
    axes.fill_between(
        places, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.2, linewidth=0
    )


def _draw_ends(axes: Any, content: dict[str, Any]) -> None:
    metric = content["metric"]
    base = next(arm for arm in content["arms"] if arm["name"] == content["baseline"])
    others = [arm for arm in content["arms"] if arm is not base]
    if content["axis"] == "steps":  # arms of another length are held against each other only
        others = [arm for arm in others if arm["steps"] == base["steps"]]
    names = []
    for i, arm in enumerate(others):
        pairs = [(a[metric], b[metric]) for a, b in zip(arm["runs"], base["runs"], strict=True)]
        values = [a - b for a, b in pairs if isinstance(a, int | float) and isinstance(b, int | float)]
        axes.plot(values, [i] * len(values), "o", color=f"C{content['arms'].index(arm)}", alpha=0.7)
        if values:
            axes.plot([sum(values) / len(values)], [i], "|", color="black", markersize=16)
        names.append(arm["name"])
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.5, len(names) - 0.5)
    axes.invert_yaxis()
    axes.set_xlabel(f"last {metric} minus that of {content['baseline']}, seed by seed")
    axes.grid(alpha=0.3, axis="x")


def html(content: dict[str, Any], claims: Sequence[dict[str, Any]], picture: Path) -> str:
    """One page without links to anything: claims, findings, picture, arms, tuning, what made it."""
    from jinja2 import Environment  # noqa: PLC0415

    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(HTML.read_text("utf-8"))
    return template.render(
        content=content,
        claims=claims,
        arms=arm_rows(content),
        arm_header=ARM_HEADER,
        findings=finding_rows(content),
        finding_header=FINDING_HEADER,
        picture=base64.b64encode(picture.read_bytes()).decode(),
        number=number,
    )
