"""The driver's state machine under a simulated clock: every rule of the dossier, and every way a cluster can be bad."""

from __future__ import annotations

import dataclasses

import pytest

from lmworks.guard.diagnose import Rules
from tests.guard.simulated import SOUND, Cluster

AGAIN = ["halt", "check", "check", "start"]
"""Both levels of the self-check."""
ALONE = ["halt", "check", "start"]
"""Where one node is left there is nothing between nodes."""


def test_a_run_that_is_done_ends_with_zero() -> None:
    cluster = Cluster()
    cluster.turn(turns=5)
    assert cluster.end is None
    cluster.done()
    cluster.turn()
    assert cluster.end is not None
    assert cluster.end.code == 0
    assert cluster.orders == ["start", "end"]


def test_a_killed_rank_stops_all_and_all_start_again() -> None:
    cluster = Cluster()
    cluster.fails("b", kind="", message="it was ended by SIGKILL")
    cluster.settle()
    assert cluster.orders == ["start", *AGAIN]
    assert cluster.deep == [False]
    assert cluster.state.attempt == 1
    assert (cluster.state.incidents[0].kind, cluster.state.incidents[0].node) == ("killed", "b")
    assert cluster.notes == ["rank 2 of 4 failed: it was ended by SIGKILL"], "told once"
    assert cluster.state.members == ("a", "b"), "one failure is no reason to lose a node"


def test_who_vanished_is_the_cause_of_what_others_say_earlier() -> None:
    cluster = Cluster()
    cluster.fails("a", message="connection closed by peer", kind="RuntimeError", time=1.0)
    cluster.turn()
    cluster.fails("b", kind="", message="it was ended by SIGKILL", time=2.0)
    cluster.settle()
    assert cluster.state.incidents[0].node == "b"
    assert cluster.notes[-1] == "rank 2 of 4 failed: it was ended by SIGKILL"


def test_a_missed_heart_beat_of_an_agent() -> None:
    """Its node is asked to come back, and is left out when it does not."""
    cluster = Cluster()
    cluster.dead.add("b")
    cluster.turn(turns=9)
    assert cluster.orders == ["start"], "within the window"
    cluster.turn(turns=3)
    assert "nothing was heard of b for" in cluster.notes[0]
    cluster.turn(seconds=10, turns=20)
    assert cluster.revived == ["b"]
    assert cluster.evicted == {"b": "it does not answer"}
    assert cluster.state.members == ("a",)
    assert cluster.orders == ["start", *ALONE]


def test_what_others_say_when_a_node_is_gone_is_not_their_fault() -> None:
    cluster = Cluster()
    cluster.dead.add("b")
    cluster.reports["b"] = dataclasses.replace(cluster.reports["b"], order=0)
    cluster.fails("a", message="connection closed by peer", kind="RuntimeError")
    cluster.turn(turns=14)
    assert (cluster.state.incidents[0].kind, cluster.state.incidents[0].node) == ("lost", "b")


def test_an_agent_that_comes_back_stays() -> None:
    cluster = Cluster()
    cluster.dead.add("b")
    cluster.turn(turns=12)
    cluster.dead.clear()
    assert cluster.state.given is not None
    cluster._obey("b", cluster.state.given)  # what a new agent reads first
    cluster.settle()
    assert cluster.evicted == {}
    assert cluster.state.members == ("a", "b")
    assert cluster.orders == ["start", *AGAIN]


def test_a_rank_without_heart_beat_is_named() -> None:
    cluster = Cluster()
    cluster.rank(3, quiet=11.0, step=7)
    cluster.settle()
    found = cluster.state.incidents[0]
    assert (found.kind, found.node, found.rank, found.step) == ("silent", "b", 3, 7)


def test_a_rank_that_has_not_begun_has_longer() -> None:
    cluster = Cluster()
    cluster.rank(0, began=False, quiet=99.0)
    cluster.turn()
    assert cluster.state.phase == "run"
    cluster.rank(0, quiet=101.0)
    cluster.turn()
    assert cluster.state.phase == "halt"


def test_a_rank_that_is_at_its_end_need_not_beat() -> None:
    cluster = Cluster()
    cluster.all_ranks(still=50.0)
    cluster.rank(0, over=True, quiet=50.0)
    cluster.turn()
    assert cluster.state.phase == "run"
    cluster.rank(0, quiet=101.0)
    cluster.turn()
    assert cluster.state.phase == "halt", "nor may it take for ever"


def test_flat_traffic_is_a_hang_and_names_who_is_not_in_the_exchange() -> None:
    cluster = Cluster()
    cluster.all_ranks(still=31.0, waits=True, calls=50)
    cluster.rank(1, waits=False, stack=("train (loop.py:1)", "read (load.py:7)"))
    cluster.turn()
    assert "rank 1 (a) did not come to the exchange" in cluster.notes[0]
    assert "read (load.py:7)" in cluster.notes[0]
    cluster.settle()
    assert cluster.state.incidents[0].rank == 1


def test_one_rank_that_moves_is_no_hang() -> None:
    cluster = Cluster()
    cluster.all_ranks(still=500.0, waits=True)
    cluster.rank(2, still=1.0)
    cluster.turn(turns=5)
    assert cluster.state.phase == "run"


def test_slow_steps_are_no_hang() -> None:
    cluster = Cluster()
    cluster.all_ranks(still=95.0, pace=10.0)
    cluster.turn()
    assert cluster.state.phase == "run"
    cluster.all_ranks(still=101.0)
    cluster.turn()
    assert cluster.state.phase == "halt"


def test_before_the_second_step_a_run_may_stand_still_for_longer() -> None:
    cluster = Cluster()
    cluster.all_ranks(still=149.0, pace=None)
    cluster.turn()
    assert cluster.state.phase == "run"
    cluster.all_ranks(still=151.0)
    cluster.turn()
    assert cluster.state.phase == "halt"


def test_nan_goes_back_once_and_then_stops() -> None:
    """Once it may have been a machine; at the same step again it is the recipe or its data."""
    cluster = Cluster()
    cluster.saved = 5
    cluster.fails("a", kind="NonFinite", message="loss is nan", step=8)
    cluster.settle()
    assert cluster.orders == ["start", *AGAIN]
    assert cluster.deep == [True], "each node tries its ranks together"
    assert cluster.state.incidents[0].node is None, "all ranks say it together: no node is to blame"
    cluster.fails("a", kind="NonFinite", message="loss is nan", step=8)
    cluster.settle()
    assert cluster.end is not None
    assert cluster.end.code == 1
    assert "The same step again" in cluster.end.text


def test_a_crash_loop_is_given_up() -> None:
    cluster = Cluster(rules=Rules(tries=3, blames=99))
    for _ in range(3):
        cluster.fails("b")
        cluster.settle()
    assert cluster.end is not None
    assert cluster.end.code == 1
    assert "3 failures without a new checkpoint" in cluster.end.text
    assert cluster.orders.count("start") == 3


def test_failures_with_progress_between_them_are_borne() -> None:
    cluster = Cluster(rules=Rules(tries=3, blames=99))
    for saved in range(10):
        cluster.saved = saved
        cluster.fails("b")
        cluster.settle()
    assert cluster.end is None
    assert cluster.orders.count("start") == 11


def test_a_flapping_node_gives_way_to_a_spare() -> None:
    cluster = Cluster(spares=("c",))
    for _ in range(2):
        cluster.fails("b", kind="", message="it was ended by SIGKILL")
        cluster.settle()
    assert cluster.evicted == {"b": "it was the cause of failure after failure"}
    assert cluster.state.members == ("a", "c"), "in its place, so that ranks stay in order"
    assert cluster.state.spares == ()
    assert [rank.rank for rank in cluster.reports["c"].ranks] == [2, 3]


def test_a_flapping_node_without_which_nothing_works_stays() -> None:
    cluster = Cluster(fits=frozenset({2}))
    for _ in range(2):
        cluster.fails("b")
        cluster.settle()
    assert cluster.evicted == {}
    assert cluster.state.members == ("a", "b")


def test_a_node_that_fails_the_self_check_is_replaced() -> None:
    cluster = Cluster(spares=("c",))
    cluster.checks["a"] = SOUND | {"host": "a", "failed": "memory: a copy differs from what was copied"}
    cluster.fails("b")
    cluster.settle()
    assert cluster.evicted == {"a": "memory: a copy differs from what was copied"}
    assert cluster.state.members == ("c", "b")


def test_a_node_with_dead_links_is_replaced() -> None:
    cluster = Cluster(members=("a", "b", "c", "d"), spares=("e",))
    cluster.links = {(x, y): 0.0 for x in "abcd" for y in "abcd" if "c" in (x, y)}
    cluster.fails("a")
    cluster.settle()
    assert list(cluster.evicted) == ["c"]
    assert "3 are dead" in cluster.evicted["c"] or "4 are dead" in cluster.evicted["c"]
    assert cluster.state.members == ("a", "b", "e", "d")


def test_without_spares_a_run_shrinks_where_its_layout_allows_it() -> None:
    cluster = Cluster(members=("a", "b", "c"), fits=frozenset({2, 3}))
    cluster.checks["b"] = SOUND | {"host": "b", "failed": "no network"}
    cluster.fails("b")
    cluster.settle()
    assert cluster.state.members == ("a", "c")


def test_without_spares_and_with_a_fixed_layout_the_run_ends_and_says_so() -> None:
    cluster = Cluster(fits=frozenset({2}))
    cluster.checks["b"] = SOUND | {"host": "b", "failed": "no network"}
    cluster.fails("b")
    cluster.settle()
    assert cluster.end is not None
    assert cluster.end.code == 1
    assert "1 nodes are left" in cluster.end.text
    assert "no network" in cluster.end.text


def test_when_all_nodes_fail_the_self_check_it_is_suspected() -> None:
    cluster = Cluster(spares=("c", "d"))
    for name in ("a", "b"):
        cluster.checks[name] = SOUND | {"host": name, "failed": "no network"}
    cluster.fails("b")
    cluster.settle()
    assert cluster.end is not None
    assert cluster.end.code == 1
    assert "every node fails the self-check" in cluster.end.text
    assert cluster.evicted == {}, "no spare is spent on a check that is wrong"


def test_a_second_failure_during_recovery() -> None:
    """A node dies while the nodes are checked after another failure."""
    cluster = Cluster(spares=("c",))
    cluster.fails("b")
    cluster.turn()  # halt
    cluster.dead.add("a")
    cluster.reports["a"] = dataclasses.replace(cluster.reports["a"], doing="runs", check=None)
    cluster.turn(seconds=5, turns=60)
    assert cluster.evicted == {"a": "it does not answer"}
    assert cluster.state.members == ("c", "b")
    assert cluster.reports["b"].doing == "runs"


def test_a_failure_at_once_after_a_restart_goes_round_again() -> None:
    cluster = Cluster()
    cluster.fails("a")
    cluster.settle()
    cluster.fails("b")
    cluster.settle()
    assert cluster.orders == ["start", *AGAIN, *AGAIN]
    assert cluster.end is None


def test_a_damaged_checkpoint_is_set_aside() -> None:
    cluster = Cluster()
    cluster.fails("a", kind="CheckpointError", message="model.safetensors does not have the bytes that were written")
    cluster.settle()
    assert cluster.aside == 1
    assert cluster.state.incidents[0].kind == "damaged"


def test_a_checkpoint_that_could_not_be_written_sets_nothing_aside() -> None:
    cluster = Cluster()
    cluster.fails("a", kind="CheckpointError", message="step-00000005: could not be written: disk full")
    cluster.settle()
    assert cluster.aside == 0
    assert cluster.orders == ["start", *AGAIN]


@pytest.mark.parametrize("code", [2, 130])
def test_what_trying_again_does_not_mend_ends_at_once(code: int) -> None:
    cluster = Cluster()
    cluster.fails("a", exit_code=code, message="no such setting")
    cluster.settle()
    assert cluster.end is not None
    assert cluster.end.code == code
    assert "start" not in cluster.orders[1:]


def test_asked_to_stop_the_ranks_save_and_the_run_can_go_on() -> None:
    cluster = Cluster()
    cluster.asked = 1
    cluster.settle()
    assert cluster.orders == ["start", "stop", "end"]
    assert cluster.end is not None
    assert cluster.end.code == 3


def test_asked_twice_all_end_at_once() -> None:
    cluster = Cluster()
    cluster.asked = 1
    cluster.dead.update("ab")  # they do not answer
    cluster.turn()
    cluster.asked = 2
    cluster.turn(turns=60)
    assert cluster.orders == ["start", "stop", "halt", "end"]
    assert cluster.end is not None
    assert cluster.end.code == 1


def test_a_stop_during_a_recovery_ends_it() -> None:
    cluster = Cluster()
    cluster.fails("a")
    cluster.turn()
    cluster.asked = 1
    cluster.settle()
    assert cluster.end is not None
    assert "start" not in cluster.orders[1:]


def test_ranks_that_stop_by_themselves_end_the_run() -> None:
    """At a limit of minutes, for example."""
    cluster = Cluster()
    for name in ("a", "b"):
        cluster.fails(name, exit_code=3, kind="Stopped", message="reached its limit")
    cluster.settle()
    assert cluster.orders == ["start", "stop", "end"], "nobody is killed while it saves"
    assert cluster.end is not None
    assert cluster.end.code == 3
    assert "reached its limit" in cluster.end.text


@pytest.mark.parametrize("evict", [False, True])
def test_a_slow_rank_is_told_once_or_evicted(evict: bool) -> None:
    cluster = Cluster(spares=("c",), rules=Rules(evict_slow=evict))
    cluster.slow = 3
    cluster.turn(turns=4)
    cluster.slow = None
    cluster.settle()
    assert len([text for text in cluster.notes if "rank 3 (b) is slow" in text]) == 1
    assert cluster.state.members == (("a", "c") if evict else ("a", "b"))
    assert cluster.orders == (["start", *AGAIN] if evict else ["start"])


def test_a_node_that_never_starts_its_ranks_is_lost() -> None:
    cluster = Cluster()
    cluster.reports["b"] = dataclasses.replace(cluster.reports["b"], doing="waits", ranks=())
    cluster.turn(seconds=10, turns=11)
    assert cluster.state.incidents or cluster.state.phase == "halt"
    assert "nothing was heard of b" in cluster.notes[0]
