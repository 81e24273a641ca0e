"""A trace for programs and for people: Perfetto's JSON, and a page of our own without links to anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lmworks.audit import hang
from lmworks.audit.trace import Trace, grid, heat, lanes, slow_ranks
from lmworks.core import files

HTML = Path(__file__).with_name("trace.html.jinja")
MOST_SPANS = 200_000
"""More than so many make a page heavy: the later ones are left out, and the page says so."""
CATEGORIES = ("work", "exchange")


def perfetto(trace: Trace, path: Path) -> None:
    """Write Chrome's trace events, which ui.perfetto.dev and chrome://tracing open: a process a rank, a thread a row of
    a stream. Times are microseconds since the first span."""
    zero = _zero(trace)
    events: list[dict[str, Any]] = []
    for rank in trace.ranks:
        axes = ", ".join(f"{axis} {place}" for axis, place in rank.axes.items())
        name = f"rank {rank.number}" + (f" ({axes})" if axes else "")
        events.append({"ph": "M", "name": "process_name", "pid": rank.number, "args": {"name": name}})
        events.append(
            {"ph": "M", "name": "process_sort_index", "pid": rank.number, "args": {"sort_index": rank.number}}
        )
        thread = 0
        for stream, height, placed in lanes(rank):
            rows = 1 if stream == "main" else height  # what nests is one thread
            for row in range(rows):
                label = stream if row == 0 else f"{stream} {row + 1}"
                told = {"pid": rank.number, "tid": thread + row, "args": {"name": label}}
                events.append({"ph": "M", "name": "thread_name", **told})
            for step, span, row in placed:
                args = {"step": step, "bytes": span.bytes} | ({} if span.number is None else {"number": span.number})
                events.append(
                    {
                        "ph": "X",
                        "name": span.name,
                        "cat": CATEGORIES[span.exchange],
                        "ts": round(1e6 * (span.start - zero), 3),
                        "dur": round(1e6 * (span.end - span.start), 3),
                        "pid": rank.number,
                        "tid": thread + (row if rows > 1 else 0),
                        "args": args,
                    }
                )
            thread += rows
    files.write_text(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _zero(trace: Trace) -> float:
    return min((span.start for rank in trace.ranks for _, span in rank.spans), default=0.0)


def page(trace: Trace, path: Path, *, stuck: hang.Hang | None = None) -> None:
    """Write timeline, heat map and the grid of ranks as one HTML file; `stuck`: who waits for whom as well."""
    from jinja2 import Environment  # noqa: PLC0415

    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(HTML.read_text("utf-8"))
    table, (work, exchanges) = heat(trace), trace.names
    content = {
        "run": trace.run,
        "steps": trace.steps,
        "timeline": _timeline(trace),
        "heat": [{"name": name, "exchange": name in exchanges, "seconds": table[name]} for name in (*work, *exchanges)],
        "ranks": [rank.number for rank in trace.ranks],
        "grid": grid(trace),
        "slow": [slow.text() for slow in slow_ranks(trace)],
        "slow_ranks": [slow.rank for slow in slow_ranks(trace)],
        "error": max(rank.error for rank in trace.ranks),
        "hang": None if stuck is None else hang.report(stuck),
        "hang_text": None if stuck is None else hang.text(stuck),
    }
    files.write_text(path, template.render(content=content))


def _timeline(trace: Trace) -> dict[str, Any]:
    """Rows and spans as short lists: [row, name, start, length, step, bytes, number], times in microseconds."""
    zero, names, rows, spans = _zero(trace), dict[str, int](), [], []
    exchange: list[bool] = []
    base = 0
    for rank in trace.ranks:
        for stream, height, placed in lanes(rank):
            rows.append({"rank": rank.number, "stream": stream, "first": base, "height": height})
            for step, span, row in placed:
                if span.name not in names:
                    names[span.name] = len(names)
                    exchange.append(span.exchange)
                start, length = 1e6 * (span.start - zero), 1e6 * (span.end - span.start)
                number = -1 if span.number is None else span.number
                told = [base + row, names[span.name], round(start, 1), round(length, 1), step, span.bytes, number]
                spans.append(told)
            base += height
    spans.sort(key=lambda span: span[2])
    left_out = max(0, len(spans) - MOST_SPANS)
    return {"names": list(names), "exchange": exchange, "rows": rows, "spans": spans[:MOST_SPANS], "left_out": left_out}
