"""What happened to the documents of a run, from the manifests of its units: counts that balance, and samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lmworks.core.errors import DataError
from lmworks.data.stage import Settling
from lmworks.data.units import manifest_of
from lmworks.make.recipe import Data, stage_name
from lmworks.make.rounds import Trail
from lmworks.make.work import SAMPLES

Step = dict[str, Any]


def account(recipe: Data, trail: Trail) -> dict[str, Any]:
    """All steps of a run as JSON values. Raises DataError when the documents do not add up."""
    steps = [_step("reading", trail.reads)]
    mended: Counter[str] = Counter()
    for unit in trail.reads:
        mended.update(manifest_of(unit).get("mended", {}))
    if mended:
        steps[0]["findings"] = {"documents that were not UTF-8 and were mended, as": dict(sorted(mended.items()))}
    for number, (stage, units) in enumerate(zip(recipe.stages, trail.stages, strict=True)):
        step = _step(stage_name(stage), units)
        if isinstance(stage, Settling):
            verdict = trail.verdicts[number]
            step["findings"] = stage.findings(verdict)
            step["seconds"] += manifest_of(verdict)["seconds"]
        steps.append(step)
    _must_balance(steps)
    handed = [manifest_of(unit) for unit in trail.handed]
    totals: dict[str, Counter[str]] = {"splits": Counter(), "licences": Counter()}
    for manifest in handed:
        for name, counter in totals.items():
            counter.update(manifest[name])
    sums = {name: dict(sorted(counter.items())) for name, counter in totals.items()}
    if sum(sums["splits"].values()) != steps[-1]["kept"]:
        raise _unbalanced("writing", steps[-1]["kept"], sum(sums["splits"].values()))
    return {"steps": steps, **sums, "jobs": trail.made}


def gone_sources(content: dict[str, Any]) -> dict[str, str]:
    """Sources of which nothing is left, each with the step that dropped its last documents."""
    found: dict[str, str] = {}
    for step in content["steps"]:
        for source, counts in step["sources"].items():
            if counts["seen"] and not counts["kept"]:
                found.setdefault(source, step["name"])
    return found


def _step(name: str, units: Sequence[Path]) -> Step:
    manifests = [manifest_of(unit) for unit in units]
    step: Step = {"name": name}
    for key in ("seen", "kept", "changed", "bytes_in", "bytes_out", "seconds"):
        step[key] = sum(manifest[key] for manifest in manifests)
    dropped: Counter[str] = Counter()
    sources: dict[str, Counter[str]] = {}
    samples: dict[str, list[dict[str, Any]]] = {}
    for manifest in manifests:
        dropped.update(manifest["dropped"])
        counts = {key: manifest[key] for key in ("seen", "kept", "bytes_in", "bytes_out")}
        sources.setdefault(manifest["source"], Counter()).update(counts)
        for reason, shown in manifest["samples"].items():
            samples.setdefault(reason, []).extend({**sample, "source": manifest["source"]} for sample in shown)
    step["dropped"] = dict(dropped.most_common())
    step["sources"] = {source: dict(counts) for source, counts in sources.items()}
    step["samples"] = {
        reason: sorted(shown, key=lambda s: (s["order"], s["id"]))[:SAMPLES] for reason, shown in samples.items()
    }
    return step


def _must_balance(steps: Sequence[Step]) -> None:
    for step in steps:
        if step["kept"] + sum(step["dropped"].values()) != step["seen"]:
            raise _unbalanced(step["name"], step["seen"], step["kept"] + sum(step["dropped"].values()))
    for before, after in pairwise(steps):
        if after["seen"] != before["kept"]:
            raise _unbalanced(after["name"], before["kept"], after["seen"])


def _unbalanced(name: str, there: int, told: int) -> DataError:
    return DataError(
        f"the documents do not add up: {there:,} went into '{name}', {told:,} are accounted for",
        next_step="remove the run's work/ folder and run again; if it stays, this is a fault of lmworks",
    )
