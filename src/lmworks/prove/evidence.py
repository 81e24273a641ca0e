"""Evidence: a comparison kept as JSON with everything that made it, and whether it still speaks of today's code."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmworks.core import files
from lmworks.core.papers import METHODS
from lmworks.core.recipe import recipes_folder
from lmworks.core.run import code_version, hardware, versions

if TYPE_CHECKING:  # lmworks methods reads evidence without loading torch
    from lmworks.prove.compare import ArmResult, Comparison
    from lmworks.train.arm import Measured

FORMAT = 1
PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One kept comparison."""

    path: Path
    content: dict[str, Any]

    @property
    def date(self) -> str:
        """When it was made."""
        return str(self.content["date"])

    @property
    def commit(self) -> str:
        """The commit it was made at, 'unknown' outside a checkout; '+' when the sources had been changed since."""
        code = self.content["code"]
        return str(code.get("commit", "unknown"))[:10] + ("+" if code.get("dirty") else "")

    @property
    def findings(self) -> list[dict[str, Any]]:
        """What was found, test by test."""
        return list(self.content["findings"])

    def stale(self) -> list[str]:
        """What has changed since: the method's own code, or its proof. Empty when the evidence is of today's."""
        now = fingerprints(self.content["method"])
        return [name for name, digest in self.content["made_of"].items() if now.get(name) != digest]

    def summary(self) -> str:
        """'2 hold, 1 not seen', and 'stale' when it is of an older commit."""
        counts: dict[str, int] = {}
        for finding in self.findings:
            counts[finding["verdict"]] = counts.get(finding["verdict"], 0) + 1
        words = [f"{counts[v]} {v}" for v in ("holds", "not seen", "contrary", "refused", "confounded") if v in counts]
        return ", ".join(words) + (" (stale)" if self.stale() else "")


def evidence_folder() -> Path:
    """Where evidence of proofs lies: inside the wheel, or in a checkout's benchmarks/evidence/proofs."""
    inside = PACKAGE / "evidence"
    return inside if inside.is_dir() else PACKAGE.parents[1] / "benchmarks" / "evidence" / "proofs"


def page_file(module: str) -> Path:
    """The file of a method's module whose docstring is its page."""
    place = PACKAGE.joinpath(*module.split("."))
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def proof_file(method: str) -> Path:
    """The proof that lmworks ships for a method; it may be missing."""
    return recipes_folder() / "proofs" / f"{method}.toml"


def evidence_of(method: str, folder: Path | None = None) -> list[Evidence]:
    """Everything that was kept for a method, oldest first: what is shipped, or what lies in `folder`."""
    paths = sorted(((folder or evidence_folder()) / method).glob("*.json"), key=when)
    return [Evidence(path=path, content=json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def when(path: Path) -> tuple[str, int]:
    """Date and number of the day in a file's name, as `save` gives it: 2026-11-24.json, then 2026-11-24-2.json."""
    return path.stem[:10], int(path.stem[11:] or 1)


def fingerprints(method: str) -> dict[str, str]:
    """Hashes of what a method's evidence depends on: its own code and its proof."""
    found: dict[str, str] = {}
    module = METHODS[method].module if method in METHODS else None
    if module is not None:
        page = page_file(module)
        sources = sorted(page.parent.rglob("*.py")) if page.name == "__init__.py" else [page]
        found |= {f"src/lmworks/{p.relative_to(PACKAGE)}": files.sha256_of(p) for p in sources if p.is_file()}
    path = proof_file(method)
    if path.is_file():
        found[f"recipes/proofs/{method}.toml"] = files.sha256_of(path)
    return found


def content_of(comparison: Comparison) -> dict[str, Any]:
    """A comparison as JSON: command, commit, hardware, every arm with every run, curves of the metric, findings."""
    proof = comparison.proof
    content: dict[str, Any] = plain(
        {
            "format": FORMAT,
            "method": proof.method,
            "grade": "desk",
            "label": "measured",
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "command": _command(),
            "code": code_version(),
            "versions": versions(),
            "hardware": hardware(),
            "made_of": fingerprints(proof.method) if proof.method else {},
            "seeds": list(proof.seeds),
            "axis": proof.axis,
            "metric": proof.metric,
            "baseline": proof.baseline,
            "confounded": comparison.confounded,
            "arms": [_arm(result, proof.metric, proof.axis) for result in comparison.arms.values()],
            "findings": [finding.to_json() for finding in comparison.findings],
        }
    )
    return content


def save(content: dict[str, Any], folder: Path | None = None) -> Path:
    """Keep evidence under its method and date; an earlier one of the day stays beside it. Returns the file."""
    place = (folder or evidence_folder()) / str(content["method"])
    place.mkdir(parents=True, exist_ok=True)
    names = [content["date"], *(f"{content['date']}-{i}" for i in range(2, 100))]
    path = next(place / f"{name}.json" for name in names if not (place / f"{name}.json").exists())
    files.write_json(path, content)
    return path


def _command() -> list[str]:
    return ["lmworks", *sys.argv[1:]]


def _arm(result: ArmResult, metric: str, axis: str) -> dict[str, Any]:
    return {
        "name": result.arm.name,
        "set": result.arm.set,
        "steps": result.steps,
        "chosen": result.chosen,
        "at_the_edge_of_its_grid": result.at_edge(),
        "tried": [{"point": tried.point, "value": tried.value} for tried in result.tried],
        "runs": [_run(seed, run, metric, axis) for seed, run in result.runs.items()],
    }


def _run(seed: int, run: Measured, metric: str, axis: str) -> dict[str, Any]:
    columns = ("tokens", "flops", "seconds")
    return {
        "seed": seed,
        "failed": run.failed,
        metric: run.take(metric, "last"),
        "memory_bytes": run.take("memory_bytes", "max"),
        **{name: run.spent(name) for name in columns},
        "curve": [[round(place, 6), value] for place, value in run.curve(metric, axis)],
    }


def plain(value: Any) -> Any:
    """JSON values only: infinite and missing numbers as the strings 'inf' and 'nan'."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value
