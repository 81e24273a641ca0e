"""What people see of a data run: a table for the terminal, a picture, and a page that holds everything in one file."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from lmworks.core import files

HTML = Path(__file__).with_name("report.html.jinja")
HEADER = ["step", "in", "kept", "kept %", "changed", "MB out", "dropped"]


def write(content: dict[str, Any], folder: Path) -> Path:
    """Write account.json, report.png and report.html into a folder; returns the page."""
    files.write_json(folder / "account.json", content)
    draw(content, folder / "report.png")
    page = folder / "report.html"
    files.write_text(page, html(content, folder / "report.png"))
    return page


def rows(content: dict[str, Any]) -> list[list[str]]:
    """A step a row."""
    found = []
    for step in content["steps"]:
        share = 100 * step["kept"] / step["seen"] if step["seen"] else 0.0
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in step["dropped"].items())
        counts = [f"{step['seen']:,}", f"{step['kept']:,}", f"{share:.2f}", f"{step['changed']:,}"]
        found.append([step["name"], *counts, f"{step['bytes_out'] / 1e6:.1f}", dropped or "-"])
    return found


def draw(content: dict[str, Any], path: Path) -> None:
    """Documents by step: kept, and dropped by reason, of all that were read."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  (0.4 s, and only at the end)
    from matplotlib.figure import Figure  # noqa: PLC0415

    steps = content["steps"]
    figure = Figure(figsize=(11, 1.4 + 0.5 * len(steps)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    reasons = list(dict.fromkeys(reason for step in steps for reason in step["dropped"]))
    places = range(len(steps))
    axes.barh(places, [step["kept"] for step in steps], color="0.75", label="kept")
    left = [step["kept"] for step in steps]
    for i, reason in enumerate(reasons):
        widths = [step["dropped"].get(reason, 0) for step in steps]
        axes.barh(places, widths, left=left, color=f"C{i % 10}", label=reason)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(places, [step["name"] for step in steps])
    axes.invert_yaxis()
    axes.set_xlabel("documents")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.savefig(path, dpi=110)


def html(content: dict[str, Any], picture: Path) -> str:
    """One page without links to anything: table, picture, sources, findings, samples."""
    from jinja2 import Environment  # noqa: PLC0415

    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(HTML.read_text("utf-8"))
    encoded = base64.b64encode(picture.read_bytes()).decode()
    return template.render(content=content, header=HEADER, rows=rows(content), picture=encoded)
