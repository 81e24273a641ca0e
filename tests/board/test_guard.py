"""Who is answered: this machine's own browser, or the token; never a page of another site."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmworks.board.guard import Guard, is_loopback

HERE = Guard.of("127.0.0.1", 8472)
THERE = Guard.of("0.0.0.0", 8472)
OWN = {"host": "127.0.0.1:8472"}


def status(
    guard: Guard, headers: dict[str, str], *, method: str = "GET", path: str = "/api/runs", query: str = ""
) -> int:
    """The status of the refusal, 200 without one."""
    refusal = guard.refuses(method, path, query, headers)
    return 200 if refusal is None else refusal.status


@pytest.mark.parametrize("host", ["127.0.0.1:8472", "localhost:8472", "[::1]:8472", "LOCALHOST", "127.0.0.1:9000"])
def test_this_machine_is_answered(host: str) -> None:
    assert status(HERE, {"host": host}) == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8472", "", "10.0.0.1", "[", "a@127.0.0.1@b"],
)
def test_a_name_that_was_pointed_here_is_refused(host: str) -> None:
    assert status(HERE, {"host": host}) == 421


@given(st.text(max_size=40))
def test_any_host_and_origin_is_judged(text: str) -> None:
    assert status(HERE, {"host": text}) in (200, 421)
    assert status(HERE, {**OWN, "origin": text}) in (200, 403)
    assert status(THERE, {**OWN, "cookie": text, "authorization": text}, query=text) == 401


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "get"])
def test_nothing_is_changed(method: str) -> None:
    assert status(HERE, OWN, method=method) == 405


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"origin": "http://127.0.0.1:8472"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "script"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}, 200),
    ],
)
def test_what_another_site_sends_is_refused(headers: dict[str, str], expected: int) -> None:
    assert status(HERE, {**OWN, **headers}) == expected


def test_beyond_this_machine_the_token_is_asked_for() -> None:
    assert HERE.token is None
    assert THERE.token is not None
    assert len(THERE.token) >= 40
    assert Guard.of("0.0.0.0", 8472).token != THERE.token
    host = {"host": "192.168.1.5:8472"}
    assert status(THERE, host) == 401
    assert status(THERE, {**host, "cookie": f"lmworks-board-8472={THERE.token}"}) == 200
    assert status(THERE, {**host, "cookie": f"lmworks-board-8472={THERE.token}x"}) == 401
    assert status(THERE, {**host, "cookie": f"lmworks-board-9999={THERE.token}"}) == 401
    assert status(THERE, {**host, "authorization": f"Bearer {THERE.token}"}) == 200
    assert status(THERE, {**host, "authorization": f"Basic {THERE.token}"}) == 401
    assert status(THERE, host, path="/feed.xml", query=f"token={THERE.token}") == 200
    assert status(THERE, host, path="/api/runs", query=f"token={THERE.token}") == 401
    assert status(THERE, host, path="/", query="token=") == 401


def test_a_name_nobody_gave_is_refused_even_with_the_token() -> None:
    cookie = {"cookie": f"lmworks-board-8472={THERE.token}"}
    assert status(THERE, {"host": "evil.example", **cookie}) == 421
    assert status(Guard.of("trainer.lab", 80), {"host": "trainer.lab"}) == 401


@pytest.mark.parametrize(
    ("host", "only_here"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.1.2.3", False),
        ("trainer", False),
    ],
)
def test_which_addresses_only_this_machine_reaches(host: str, only_here: bool) -> None:
    assert is_loopback(host) is only_here
