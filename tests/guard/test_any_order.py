"""Any order of failures under a simulated clock: the run ends or goes on, and what is kept is what is known."""

from __future__ import annotations

import dataclasses
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.guard import driver
from tests.guard.simulated import SOUND, Cluster

FAULTS = st.sampled_from(["a fails", "b fails", "b dies", "b silent", "b returns", "hang", "nan", "saved", "bad check"])


@settings(max_examples=30)
@given(st.lists(st.tuples(FAULTS, st.integers(1, 12)), max_size=12))
def test_whatever_happens_the_run_ends_or_runs(happenings: list[tuple[str, int]]) -> None:
    """No order of failures leaves the driver waiting for ever, loses a rank's place, or runs on an evicted node."""
    cluster = Cluster(spares=("c",))
    for what, turns in happenings:
        _happen(cluster, what)
        cluster.turn(turns=turns)
        if cluster.end is not None:
            break
        assert not set(cluster.state.members) & set(cluster.evicted)
        assert len(set(cluster.state.members)) == len(cluster.state.members)
        assert driver.decoded(_as_json(cluster)) == cluster.state, "what is kept is what is known"
    if cluster.end is None:
        cluster.turn(seconds=10, turns=80)
    assert cluster.end is not None or cluster.state.phase == "run"


def _happen(cluster: Cluster, what: str) -> None:
    reports = cluster.reports
    if what.endswith("fails") and reports.get(what[0]) and reports[what[0]].ranks:
        cluster.fails(what[0])
    elif what == "b dies":
        cluster.dead.add("b")
    elif what == "b returns" and cluster.state.given is not None and "b" not in cluster.evicted:
        cluster.dead.discard("b")
        cluster._obey("b", cluster.state.given)
    elif what == "b silent":
        cluster.rank(3, quiet=100.0)
    elif what == "hang":
        cluster.all_ranks(still=100.0, waits=True)
    elif what == "nan" and reports.get("a") and reports["a"].ranks:
        cluster.fails("a", kind="NonFinite", step=4)
    elif what == "saved":
        cluster.saved = (cluster.saved or 0) + 5
    elif what == "bad check":
        cluster.checks["b"] = SOUND | {"host": "b", "failed": "memory"}


def _as_json(cluster: Cluster) -> dict[str, object]:
    found: dict[str, object] = json.loads(json.dumps(dataclasses.asdict(cluster.state)))
    return found
