"""What the addresses answer, and that nothing that comes from outside becomes a path, a header or HTML."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from starlette.testclient import TestClient

from lmworks.board.app import STATIC, Board, make
from lmworks.board.guard import Guard
from lmworks.core.papers import METHODS
from lmworks.prove.evidence import evidence_folder
from tests.board import folders

ATOM = "{http://www.w3.org/2005/Atom}"
HOSTILE = "<img src=x onerror=alert(1)>"


def get(client: TestClient, path: str, **headers: str) -> Any:
    """The JSON of an address that must answer."""
    answer = client.get(path, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_page_and_its_files(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    names = re.findall(r'(?:src|href)="(/[^"]*)"', page.text)
    assert len(names) >= 5
    for name in names:
        assert client.get(name).status_code == 200, name
    assert client.get("/static/app.js").headers["content-type"].startswith("text/javascript")


def test_runs_and_one_run(client: TestClient) -> None:
    found = {run["name"]: run for run in get(client, "/api/runs")["runs"]}
    assert {name: run["status"] for name, run in found.items()} == {"plain": "done", "killed": "dead"}
    plain = found["plain"]["id"]
    assert get(client, f"/api/runs/{plain}")["summary"]["wall_seconds"] == 25.0
    assert get(client, f"/api/runs/{plain}/curves")["rows"] == 200
    system = get(client, f"/api/runs/{plain}/system?name=step&steps=2")
    assert system["name"] == "step"
    assert {span[2] for span in system["timeline"]["spans"]} == {199, 200}
    compared = get(client, f"/api/compare?run={plain}&run={found['killed']['id']}&run=unknown")
    assert compared["differences"] == [{"path": "optimizer.lr", "values": [1e-3, 3e-3]}]


def test_what_is_known_is_not_sent_again(client: TestClient, runs: Path) -> None:
    address = f"/api/runs/{get(client, '/api/runs')['runs'][1]['id']}/curves"
    first = client.get(address)
    again = client.get(address, headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    folders.append(runs / "plain" / "metrics.jsonl", [{"step": 201, "loss": 1.0}])
    newer = client.get(address, headers={"if-none-match": first.headers["etag"]})
    assert (newer.status_code, newer.json()["rows"]) == (200, 201)


def test_a_fresh_board_answers_the_same(client: TestClient, runs: Path) -> None:
    other = TestClient(make(Board([runs]), Guard.of("127.0.0.1", 8472)), base_url="http://127.0.0.1:8472")
    for address in ("/api/runs", f"/api/runs/{get(client, '/api/runs')['runs'][0]['id']}/system", "/api/methods"):
        assert other.get(address).content == client.get(address).content


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2fapp.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/static/vendor.js%00.css",
        "/api/runs/../../etc/passwd",
        "/api/runs/..%2f..%2fetc%2fpasswd",
        "/api/runs/%2e%2e/curves",
        "/api/runs/plain",
        "/api/methods/..%2f..%2fpyproject",
        "/api/methods/%3Cscript%3E",
        "/nothing",
    ],
)
def test_a_path_leads_nowhere(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert "root:" not in answer.text
    assert "import" not in answer.text


@pytest.mark.parametrize("cluster", ["../../etc/passwd", "/etc/passwd", "laptop.toml", "x"])
def test_a_cluster_is_one_of_those_that_are_shipped(client: TestClient, cluster: str) -> None:
    run = get(client, "/api/runs")["runs"][0]["id"]
    assert "laptop" in get(client, f"/api/runs/{run}/score")["clusters"]
    assert client.get(f"/api/runs/{run}/score", params={"cluster": cluster}).status_code == 404


def test_a_run_that_no_plan_models_says_why(client: TestClient) -> None:
    run = get(client, "/api/runs")["runs"][0]["id"]
    assert "error" in get(client, f"/api/runs/{run}/score?cluster=laptop")


@pytest.mark.parametrize("steps", ["-1", "1e9", "99999999999999999999", "٣", "x", ""])
def test_a_number_that_is_none_is_the_usual_one(client: TestClient, steps: str) -> None:
    run = get(client, "/api/runs")["runs"][1]["id"]
    found = client.get(f"/api/runs/{run}/system", params={"steps": steps}).json()
    assert min(span[2] for span in found["timeline"]["spans"]) == 181


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_can_be_sent(client: TestClient, method: str) -> None:
    assert client.request(method, "/api/runs").status_code == 405


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/", {}),
        ("/api/runs", {}),
        ("/nothing", {}),
        ("/feed.xml", {}),
        ("/", {"host": "evil.example"}),
        ("/api/runs", {"origin": "http://evil.example"}),
    ],
)
def test_every_answer_forbids_what_it_does_not_need(client: TestClient, path: str, headers: dict[str, str]) -> None:
    found = client.get(path, headers=headers).headers
    assert found["content-security-policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "unsafe" not in found["content-security-policy"]
    assert found["x-content-type-options"] == "nosniff"
    assert found["x-frame-options"] == "DENY"
    assert "access-control-allow-origin" not in found


def test_another_site_gets_nothing(client: TestClient) -> None:
    assert client.get("/api/runs", headers={"host": "evil.example"}).status_code == 421
    assert client.get("/api/runs", headers={"origin": "http://evil.example"}).status_code == 403
    assert client.get("/api/runs", headers={"sec-fetch-site": "cross-site"}).status_code == 403


def test_the_token_becomes_a_cookie_that_scripts_do_not_see(runs: Path) -> None:
    guard = Guard.of("0.0.0.0", 8472)
    client = TestClient(make(Board([runs]), guard), base_url="http://192.168.1.5:8472")
    assert client.get("/").status_code == 401
    assert client.get("/static/app.js").status_code == 401
    assert client.get("/?token=wrong").status_code == 401
    welcome = client.get(f"/?token={guard.token}")
    cookie = welcome.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert guard.token not in welcome.text
    assert client.get("/").status_code == 200
    assert client.get("/api/runs").status_code == 200


def test_names_and_texts_of_strangers_stay_data(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    path = folders.make(root / HOSTILE, optimizer={"use": HOSTILE})
    with (path / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"step": HOSTILE, "prompt": HOSTILE, "text": "</script>\ud800"}) + "\n")
    folders.append(path / "metrics.jsonl", [{"step": 201, "loss": 2.0, HOSTILE: 1.0}])
    client = TestClient(make(Board([root]), Guard.of("127.0.0.1", 1)), base_url="http://127.0.0.1")
    answer = client.get("/api/runs")
    assert answer.headers["content-type"] == "application/json"
    (run,) = answer.json()["runs"]
    assert run["name"] == HOSTILE
    assert re.fullmatch("[0-9a-f]{16}", run["id"])
    facts = get(client, f"/api/runs/{run['id']}")
    assert facts["samples"][0]["text"] == "</script>\ud800"
    assert HOSTILE in get(client, f"/api/runs/{run['id']}/curves")["steps"]


def test_the_pages_of_the_board_write_no_html_by_hand() -> None:
    ours = [path for path in STATIC.glob("*.js") if not path.name.startswith("vendor")]
    assert len(ours) >= 10
    for path in ours:
        text = path.read_text()
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "http://",
        ):
            assert word not in text, f"{path.name}: {word}"
    assert "<script>" not in (STATIC / "index.html").read_text()


def test_the_ledger(client: TestClient) -> None:
    found = {one["name"]: one for one in get(client, "/api/methods")}
    assert list(found) == list(METHODS)
    assert found["sophia"]["verdicts"]
    assert "curvature" in found["sophia"]["words"]
    one = get(client, "/api/methods/sophia")
    assert one["claims"]
    assert one["parts"][0]["slot"] == "optimizer"
    assert one["page"][0][0] == "p"
    evidence = one["evidence"][0]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", evidence["date"])
    assert evidence["findings"][0]["word"]
    assert any(arm["curves"] for arm in evidence["arms"])


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.planned])
def test_every_method_has_a_page(client: TestClient, name: str) -> None:
    assert get(client, f"/api/methods/{name}")["page"]


def test_the_feed_holds_every_evidence_newest_first(client: TestClient) -> None:
    answer = client.get("/feed.xml")
    assert answer.headers["content-type"] == "application/atom+xml; charset=utf-8"
    feed = ElementTree.fromstring(answer.content)
    entries = feed.findall(f"{ATOM}entry")
    kept = sorted(evidence_folder().glob("*/*.json"))
    assert len(entries) == min(50, len(kept))
    moments = [entry.find(f"{ATOM}updated").text for entry in entries]
    assert moments == sorted(moments, reverse=True)
    assert len({entry.find(f"{ATOM}id").text for entry in entries}) == len(entries)
    for name in ("id", "title", "updated"):
        assert feed.find(f"{ATOM}{name}").text
    links = {link.get("rel"): link.get("href") for link in feed.findall(f"{ATOM}link")}
    assert links["self"] == "http://127.0.0.1:8472/feed.xml"


def test_evidence_of_ones_own_and_hostile_texts_in_the_feed(tmp_path: Path, runs: Path) -> None:
    (kept,) = sorted((evidence_folder() / "sophia").glob("*.json"))[-1:]
    content = json.loads(kept.read_text())
    content["findings"][0]["why"] = "<script>\x00\x1b&\ud800"
    own = tmp_path / "evidence" / "sophia"
    own.mkdir(parents=True)
    (own / "2030-01-02.json").write_text(json.dumps(content | {"date": "2030-01-02"}))
    client = TestClient(
        make(Board([runs], tmp_path / "evidence"), Guard.of("127.0.0.1", 1)), base_url="http://127.0.0.1"
    )
    feed = ElementTree.fromstring(client.get("/feed.xml").content)
    (entry,) = feed.findall(f"{ATOM}entry")
    assert "<script>&" in entry.find(f"{ATOM}content").text
    assert {one["name"] for one in get(client, "/api/methods") if one["kept"]} == {"sophia"}
    (own / "2030-01-03.json").write_text("[]")
    broken = TestClient(
        make(Board([runs], tmp_path / "evidence"), Guard.of("127.0.0.1", 1)), base_url="http://127.0.0.1"
    )
    answer = broken.get("/api/methods")
    assert answer.status_code == 500
    assert "evidence cannot be read" in answer.json()["error"]
