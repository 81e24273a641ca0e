"""Posts reach an address on this machine; what fails is told without the address, and nothing is ever raised."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from lmworks.train.health import Health, Rule, shipped
from lmworks.train.slots import StepRecord
from lmworks.train.webhook import Webhook, legal
from tests.train.test_health import probe


class Server(http.server.ThreadingHTTPServer):
    """Keeps what is posted; answers as its path says."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.heard: list[dict[str, Any]] = []

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.heard.append(json.loads(data))
        code = {"/broken": 500, "/moved": 302}.get(self.path.split("?")[0], 200)
        self.send_response(code)
        if code == 302:
            self.send_header("Location", self.server.url("elsewhere"))
        self.end_headers()

    def log_message(self, *unused: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def test_a_post_arrives(server: Server) -> None:
    hook = Webhook(server.url("here?token=secret"))
    hook.post({"rule": "x", "value": 1.5}).join()
    assert server.heard == [{"rule": "x", "value": 1.5}]
    assert hook.failures() == []


def test_an_address_may_stand_in_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALERTS_TO", server.url("here"))
    Webhook("$ALERTS_TO").post({"a": 1}).join()
    assert server.heard == [{"a": 1}]
    missing = Webhook("$NOBODY_SET_THIS")
    missing.post({"a": 1}).join()
    assert missing.failures() == ["the environment has no NOBODY_SET_THIS"]


@pytest.mark.parametrize(
    ("path", "said"), [("broken?token=secret", "answered 500"), ("moved?token=secret", "answered 302")]
)
def test_what_fails_is_told_without_the_secret(server: Server, path: str, said: str) -> None:
    hook = Webhook(server.url(path))
    hook.post({"a": 1}).join()
    (failure,) = hook.failures()
    assert said in failure
    assert "secret" not in failure
    assert len(server.heard) == 1, "a redirect is not followed"
    assert hook.failures() == []


def test_nobody_there_is_no_error(server: Server) -> None:
    url = server.url("x?token=secret").replace(str(server.server_port), "9")
    hook = Webhook(url)
    hook.post({"a": 1}).join()
    (failure,) = hook.failures()
    assert failure == "127.0.0.1: ConnectionRefusedError"


def test_alerts_are_posted_without_their_batch_and_failures_become_a_line(server: Server) -> None:
    rule = Rule(name="x", metric="m", baseline="limits", high=1.0, after=0, quiet=1, keep_batch=True, action="webhook")
    plain = Rule(name="y", metric="m", baseline="limits", high=1.0, after=0, quiet=1)
    without = tuple(rule.name for rule in shipped())
    watcher = Health(rules=(rule, plain), without=without, webhook=server.url("broken?token=secret")).start()
    record = StepRecord(step=1, tokens=0, loss=1.0, grad_norm=1.0, lr=1e-3, seconds=0.1, row={"m": 2.0})
    first = watcher.look(record, probe())
    assert first is not None
    assert len(first.alerts) == 2
    for thread in [thread for thread in threading.enumerate() if thread.name == "lmworks-webhook"]:
        thread.join()
    (heard,) = server.heard
    assert heard["rule"] == "x"
    assert "batch" not in heard
    second = watcher.look(StepRecord(step=2, tokens=0, loss=1.0, grad_norm=1.0, lr=1e-3, seconds=0.1), probe())
    told = first.reason + ("" if second is None else second.reason)  # an answer may come at once
    assert told.count("an alert was not posted: 127.0.0.1 answered 500") == 1


@pytest.mark.parametrize(
    ("address", "well"),
    [
        ("https://a.b/c", True),
        ("http://localhost:80", True),
        ("$NAME", True),
        ("a.b/c", False),
        ("http://", False),
        ("$", False),
    ],
)
def test_addresses(address: str, well: bool) -> None:
    assert legal(address) is well
