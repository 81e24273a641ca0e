"""What scored runs teach a cluster's plans, and files that teach nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lmworks.core.errors import LmworksError
from lmworks.plan import cluster as clusters
from lmworks.plan import residuals, search
from lmworks.plan.cluster import Cluster, Figure
from lmworks.plan.residuals import Residual, correction, figures_of, file_of, keep, kept
from tests.plan.conftest import recipe


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("LMWORKS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def residual(cluster: Cluster, factor: float, run: str = "a", **over: Any) -> Residual:
    facts: dict[str, Any] = {
        "run": run,
        "folder": "runs/a",
        "cluster": cluster.name,
        "figures": figures_of(cluster),
        "precision": "fp32",
        "devices": 2,
        "steps": 9,
        "predicted_seconds": 1.0,
        "measured_seconds": factor,
        "factor": factor,
    }
    return Residual(**{**facts, **over})


def test_nothing_scored_corrects_nothing(laptop: Cluster) -> None:
    found = correction(laptop, "fp32")
    assert (found.factor, found.runs, found.in_words()) == (1.0, 0, [])
    assert not file_of(laptop).exists()


def test_a_plan_takes_the_median_and_a_run_counts_once(laptop: Cluster) -> None:
    for run, factor in (("a", 9.0), ("b", 1.2), ("c", 1.4), ("a", 1.3)):
        path = keep(laptop, residual(laptop, factor, run))
    assert path == file_of(laptop)
    assert {entry.run: entry.factor for entry in kept(laptop)} == {"a": 1.3, "b": 1.2, "c": 1.4}
    found = correction(laptop, "fp32")
    assert (found.factor, found.runs, found.lowest, found.highest) == (1.3, 3, 1.2, 1.4)
    assert found.in_words() == ["corrected by 3 runs: x1.3 (1.2 to 1.4) on what devices do by themselves"]
    assert correction(laptop, "fp32", without="b").factor == pytest.approx(1.35)


def test_other_figures_and_precisions_are_named_and_left_out(laptop: Cluster) -> None:
    keep(laptop, residual(laptop, 2.0))
    keep(laptop, residual(laptop, 3.0, "b", precision="bf16"))
    found = correction(laptop, "fp32")
    assert (found.factor, found.runs) == (2.0, 1)
    assert "1 of the runs" in found.in_words()[1]
    faster = dataclasses.replace(laptop, fp32=Figure(value=2e11, source="a test"))
    found = correction(faster, "fp32")
    assert (found.factor, found.runs) == (1.0, 0)
    assert "2 of the runs" in found.left_out[0]
    assert "score them again" in found.left_out[0]
    dearer = dataclasses.replace(laptop, watts=Figure(value=99, source="a test"))
    assert correction(dearer, "fp32").runs == 1, "no time hangs on watts"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"{not json}\n", "line 1 is not JSON"),
        (b"[1, 2]\n", "line 1 holds no scored run"),
        (b'{"run": "a"}\n', "line 1 holds no scored run"),
        (b"\xff\xfe\n", "cannot be read"),
        (b'{"run": "a"', "cut short"),
    ],
)
def test_a_damaged_file_is_named_and_neither_used_nor_added_to(laptop: Cluster, text: bytes, says: str) -> None:
    path = file_of(laptop)
    path.parent.mkdir(parents=True)
    path.write_bytes(text)
    found = correction(laptop, "fp32")
    assert (found.factor, found.runs) == (1.0, 0)
    assert says in found.left_out[0]
    assert str(path) in found.left_out[0]
    with pytest.raises(LmworksError, match="score the runs again"):
        keep(laptop, residual(laptop, 2.0))
    assert path.read_bytes() == text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"factor": 0.0}, "factor"),
        ({"factor": float("inf")}, "not finite"),
        ({"factor": "1.2"}, "factor"),
        ({"steps": 0}, "steps"),
        ({"cluster": "Another"}, "is of the cluster 'Another'"),
        ({"extra": 1}, "has no setting 'extra'"),
    ],
)
def test_foreign_lines_are_refused(laptop: Cluster, change: dict[str, Any], says: str) -> None:
    path = keep(laptop, residual(laptop, 2.0))
    table = dataclasses.asdict(residual(laptop, 1.5, "b")) | change
    path.write_text(path.read_text() + json.dumps(table) + "\n")
    assert says in correction(laptop, "fp32").left_out[0]
    with pytest.raises(LmworksError, match="line 2"):
        kept(laptop)


def test_a_place_that_cannot_be_written_is_named(laptop: Cluster, own_home: Path) -> None:
    own_home.write_text("a file where the home should be")
    with pytest.raises(LmworksError, match="LMWORKS_HOME"):
        keep(laptop, residual(laptop, 2.0))


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.7])
def test_a_slowed_device_takes_so_many_times_as_long(laptop: Cluster, factor: float) -> None:
    plain, slowed = (
        search.search(recipe(precision="fp32"), each, devices=1) for each in (laptop, laptop.slowed(factor))
    )
    for one, other in zip(plain.plans, slowed.plans, strict=True):
        assert other.choice == one.choice
        assert other.step.seconds.total == pytest.approx(factor * one.step.seconds.total)
        assert other.closed == pytest.approx(factor * one.closed)


def test_links_stay_as_they_are(unit: Cluster) -> None:
    plain, slowed = (search.search(recipe(), each, devices=2) for each in (unit, unit.slowed(2.0)))
    told = {plan.choice: plan.step.seconds for plan in plain.plans}
    seen = {plan.choice: plan.step.seconds for plan in slowed.plans}
    assert seen.keys() == told.keys()
    for choice, seconds in seen.items():
        assert seconds.total == pytest.approx(told[choice].total), "where all else is at once, a byte takes its second"


def test_every_shipped_cluster_has_a_file_of_its_own() -> None:
    found = [residuals.file_of(clusters.load(name)) for name in clusters.names()]
    assert len(set(found)) == len(found)
