"""What goes between nodes: real connections on this machine, and whose fault bad links are."""

from __future__ import annotations

import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.guard import between
from lmworks.guard.between import Door, judge, links, measure, partners


def test_bytes_go_there_and_their_hash_comes_back() -> None:
    door = Door("127.0.0.1")
    place = ("127.0.0.1", door.port)
    try:
        assert measure(place) > 0
        assert measure(place) > 0
    finally:
        door.close()
    with pytest.raises(ConnectionRefusedError):
        measure(place)


def test_other_bytes_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(between, "TIMEOUT", 5.0)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def lie() -> None:
            guest, _ = server.accept()
            with guest:
                left = between.HEAD + between.BYTES
                while left:
                    left -= len(guest.recv(1 << 20))
                guest.sendall(bytes(32))

        thread = threading.Thread(target=lie)
        thread.start()
        with pytest.raises(OSError, match="other bytes"):
            measure(server.getsockname())
        thread.join()


def test_a_dead_partner_is_zero() -> None:
    door = Door("127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        gone = ("127.0.0.1", closed.getsockname()[1])
    try:
        found = links({"b": ("127.0.0.1", door.port), "c": gone}, ("a", "b", "c"), "a")
        assert found["b"] > 0
        assert found["c"] == 0.0
        assert links({}, ("a", "b"), "a") == {"b": 0.0}, "nor is one that has no door"
    finally:
        door.close()


@given(st.integers(2, 40))
def test_every_node_sends_to_one_and_hears_one_in_each_turn(count: int) -> None:
    nodes = [f"n{i}" for i in range(count)]
    turns = list(zip(*(partners(nodes, name) for name in nodes), strict=True))
    assert all(sorted(turn) == sorted(nodes) for turn in turns)
    assert len(turns) <= count.bit_length()
    assert all(name not in partners(nodes, name) for name in nodes)


@given(st.integers(4, 12), st.data())
def test_the_node_with_bad_links_is_named_and_no_other(count: int, data: st.DataObject) -> None:
    nodes = [f"n{i}" for i in range(count)]
    bad = data.draw(st.sampled_from(nodes))
    rate = data.draw(st.sampled_from([0.0, 1e7]))
    found = {a: {b: rate if bad in (a, b) else 1e9 for b in partners(nodes, a)} for a in nodes}
    assert list(judge(found)) == [bad]


def test_sound_links_name_nobody_and_a_single_link_names_both() -> None:
    assert judge({"a": {"b": 1e9}, "b": {"a": 0.9e9}}) == {}
    assert judge({}) == {}
    assert len(judge({"a": {"b": 0.0}, "b": {"a": 0.0}})) == 1
