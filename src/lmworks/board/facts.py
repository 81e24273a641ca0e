"""What the page of one run shows besides its curves, and how runs differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmworks.board.reading import ends, number, opened, plain, table, table_of, text
from lmworks.board.runs import Run
from lmworks.core import recipe as recipes
from lmworks.core.errors import LmworksError

SAMPLES = 60
"""Texts that are shown, the newest."""
RECIPE_BYTES = 1 << 20


def run_facts(run: Run) -> dict[str, Any]:
    """Everything about a run but its curves and spans, as JSON values."""
    run.system.look()
    record, summary = table(run.folder.record), table(run.folder.summary)
    return {
        **run.row(),
        "folder": str(run.path),
        "recipe": _text_of(run.folder.recipe),
        "record": plain({name: record[name] for name in SHOWN_OF_RECORD if name in record}),
        "summary": plain({name: value for name, value in summary.items() if name not in ("memory", "energy")}),
        "energy": plain(table_of(summary.get("energy"))),
        "memory": memory(run),
        "samples": samples(run),
        "told": list(run.system.told)[::-1],
        "sent": list(run.system.sent),
        "command": " ".join(text(word, 200) for word in record.get("command") or [])[:1000],
    }


SHOWN_OF_RECORD = (
    "id",
    "code",
    "versions",
    "hardware",
    "parameters",
    "peak_flops",
    "peak_flops_source",
    "recipe_sha256",
    "parent",
    "data",
)


def memory(run: Run) -> list[dict[str, Any]]:
    """Bytes by class, predicted and measured, of each rank that told them."""
    found = []
    for rank in sorted(run.system.memory):
        sides = run.system.memory[rank]
        names = dict.fromkeys(text(name, 80) for side in sides.values() for name in side)
        classes = [{"name": name, **{side: number(sides[side].get(name)) for side in sides}} for name in names]
        found.append({"rank": rank, "classes": classes})
    return found


def samples(run: Run) -> list[dict[str, Any]]:
    """The newest texts that the model wrote, newest first."""
    rows = ends(run.folder.samples, most=1 << 20)[-SAMPLES:]
    return [
        {"step": number(row.get("step")), "prompt": text(row.get("prompt"), 4000), "text": text(row.get("text"))}
        for row in reversed(rows)
    ]


def _text_of(path: Path) -> str:
    file = opened(path)
    if file is None:
        return ""
    with file:
        return file.read(RECIPE_BYTES).decode(errors="replace")


def differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Settings in which recipes differ: path, and the value of each run; None where it has no such setting."""
    tables = [run.recipe() for run in runs]
    paths: dict[str, None] = {}
    for other in tables[1:]:
        paths |= dict.fromkeys(recipes.differences(tables[0], other))
    found = []
    for path in paths:
        values = [plain(_at(table, path)) for table in tables]
        found.append({"path": path, "values": values})
    return found


def _at(value: Any, path: str) -> Any:
    """What stands at a dotted path; a key may hold dots itself."""
    if not path:
        return value
    if not isinstance(value, dict):
        return None
    for key in value:
        if path == key:
            return value[key]
        if path.startswith(f"{key}.") and (found := _at(value[key], path[len(key) + 1 :])) is not None:
            return found
    return None


def clusters() -> list[str]:
    """The clusters that lmworks ships."""
    return sorted(path.stem for path in (recipes.recipes_folder() / "clusters").glob("*.toml"))


def score(run: Run, cluster: str) -> dict[str, Any]:
    """The run beside what a plan tells of it on a shipped cluster; seconds of work, and torch is loaded for it.

    `error` in place of figures where the two do not go together.
    """
    from lmworks.plan import cluster as machines  # noqa: PLC0415  (loads torch, which the rest of the board does not)
    from lmworks.plan import score as scores  # noqa: PLC0415

    try:
        chosen = machines.load(cluster)
        found = scores.score(run.path, chosen)
    except LmworksError as error:
        return {"error": str(error)}
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:  # files of a stranger
        return {"error": f"this run cannot be planned: {type(error).__name__}: {error}"}
    told = scores.as_json(found, chosen, None)
    told["rows"] = scores.table_rows(found)
    return dict(plain(told))
