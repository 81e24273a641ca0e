"""The board's addresses. Each answers GET with what the disk says now; there is none that changes anything.

/                             the page; /static/NAME its files
/api/runs                     every run, how it goes
/api/runs/ID                  one run: recipe, record, samples, what happened, memory, energy
/api/runs/ID/curves           its columns
/api/runs/ID/system           where its time went, heat map of a kind of span (?name=), timeline (?steps=)
/api/runs/ID/score            the run beside a plan (?cluster=)
/api/compare                  how recipes differ (?run=ID&run=ID...)
/api/methods                  the ledger; /api/methods/NAME one method
/feed.xml                     new evidence
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmworks.board import facts
from lmworks.board.feed import atom
from lmworks.board.guard import HEADERS, Guard
from lmworks.board.ledger import Ledger
from lmworks.board.runs import Run, Runs
from lmworks.core.errors import LmworksError

STATIC = Path(__file__).with_name("static")
KINDS = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".json": "application/json",
    ".txt": "text/plain",
}
"""What the page is made of. Not asked of the system, which may know other names, and browsers are told not to guess."""
MOST_COMPARED = 12
"""Runs in one comparison."""
MOST_STEPS = 10_000
"""Steps of one timeline."""
WELCOME = """<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="0;url=/">
<title>lmworks board</title><p><a href="/">Open the board</a></p></html>"""
"""Keeps the token out of the address bar. A page, not a redirect: a strict cookie does not follow a redirect that
began on another site."""


class Board:
    """What the addresses answer with."""

    def __init__(self, runs: Sequence[Path], evidence: Path | None = None) -> None:
        self.runs, self.ledger = Runs(runs), Ledger(evidence)
        self._files = {path.name: path.read_bytes() for path in sorted(STATIC.iterdir()) if path.suffix in KINDS}
        self._reading, self._scoring = Lock(), Lock()

    def page(self, request: Request) -> Response:
        """The page itself."""
        return _answered(request, self._files["index.html"], "text/html; charset=utf-8")

    def static(self, request: Request) -> Response:
        """A file of the page, by its name among those that were there when the board started."""
        name = request.path_params["name"]
        if name not in self._files:
            return _missing("no such file")
        return _answered(request, self._files[name], f"{KINDS[Path(name).suffix]}; charset=utf-8")

    def all_runs(self, request: Request) -> Response:
        """Every run."""
        with self._reading:
            return _json(request, {"roots": [str(r) for r in self.runs.roots], "runs": self.rows()})

    def rows(self) -> list[dict[str, Any]]:
        """Every run, how it goes."""
        return [run.row() for run in self.runs.all()]

    def run(self, request: Request) -> Response:
        """One run."""
        with self._reading:
            run = self._run(request)
            return _json(request, facts.run_facts(run)) if run else _missing(NO_RUN)

    def curves(self, request: Request) -> Response:
        """The columns of one run."""
        with self._reading:
            run = self._run(request)
            return _json(request, run.curves.picture()) if run else _missing(NO_RUN)

    def system(self, request: Request) -> Response:
        """Time, heat map and timeline of one run."""
        with self._reading:
            run = self._run(request)
            if run is None:
                return _missing(NO_RUN)
            run.system.look()
            names = run.system.names()
            name = request.query_params.get("name", "")
            chosen = name if name in names else "step"
            asked = request.query_params.get("steps", "")
            steps = min(int(asked), MOST_STEPS) if asked.isascii() and asked.isdigit() and len(asked) < 10 else 20
            found = {"names": names, "name": chosen, "time": run.system.time(), "heat": run.system.heat(chosen)}
            return _json(request, found | {"timeline": run.system.timeline(steps)})

    def score(self, request: Request) -> Response:
        """One run beside a plan on a cluster; without a cluster the names of those there are."""
        with self._reading:
            run = self._run(request)
        known, cluster = facts.clusters(), request.query_params.get("cluster")
        if run is None:
            return _missing(NO_RUN)
        if cluster is None:
            return _json(request, {"clusters": known})
        if cluster not in known:
            return _missing("no such cluster")
        with self._scoring:  # seconds of work: one at a time, while everything else goes on
            return _json(request, {"clusters": known, **facts.score(run, cluster)})

    def compare(self, request: Request) -> Response:
        """How the recipes of several runs differ."""
        with self._reading:
            asked = dict.fromkeys(request.query_params.getlist("run")[:MOST_COMPARED])
            runs = [run for run_id in asked if (run := self.runs.get(run_id)) is not None]
            if not runs:
                return _missing(NO_RUN)
            return _json(request, {"runs": [run.row() for run in runs], "differences": facts.differences(runs)})

    def methods(self, request: Request) -> Response:
        """The ledger."""
        with self._reading:
            return _json(request, self.ledger.rows())

    def method(self, request: Request) -> Response:
        """One method."""
        with self._reading:
            found = self.ledger.method(request.path_params["name"])
            return _json(request, found) if found else _missing("no method is called so")

    def feed(self, request: Request) -> Response:
        """New evidence."""
        with self._reading:
            base = f"{request.url.scheme}://{request.headers.get('host', '')}"
            return _answered(request, atom(self.ledger.evidence(), base), "application/atom+xml; charset=utf-8")

    def _run(self, request: Request) -> Run | None:
        return self.runs.get(request.path_params["id"])


NO_RUN = "no such run: it was moved or deleted"


def make(board: Board, guard: Guard) -> ASGIApp:
    """The application: routes behind the guard."""
    routes = [
        Route("/", board.page),
        Route("/static/{name}", board.static),
        Route("/api/runs", board.all_runs),
        Route("/api/runs/{id}", board.run),
        Route("/api/runs/{id}/curves", board.curves),
        Route("/api/runs/{id}/system", board.system),
        Route("/api/runs/{id}/score", board.score),
        Route("/api/compare", board.compare),
        Route("/api/methods", board.methods),
        Route("/api/methods/{name}", board.method),
        Route("/feed.xml", board.feed),
    ]
    inner = Starlette(routes=routes, exception_handlers={LmworksError: _failed})
    return _Guarded(GZipMiddleware(inner, minimum_size=1000, compresslevel=5), guard)


class _Guarded:
    """Asks the guard before the application, and puts its headers on every answer."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app, self._guard = app, guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._other(scope, receive, send)

        async def dressed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        query = scope["query_string"].decode("latin-1")
        headers = {key.lower(): value for key, value in Headers(scope=scope).items()}
        refusal = self._guard.refuses(scope["method"], scope["path"], query, headers)
        if refusal is not None:
            return await PlainTextResponse(refusal.text, refusal.status)(scope, receive, dressed)
        if scope["path"] == "/" and self._guard.welcomes(query):
            return await self._welcome()(scope, receive, dressed)
        return await self._app(scope, receive, dressed)

    async def _other(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._app(scope, receive, send)

    def _welcome(self) -> Response:
        answer = HTMLResponse(WELCOME)
        answer.set_cookie(self._guard.cookie, self._guard.token or "", httponly=True, samesite="strict")
        return answer


def _json(request: Request, value: Any) -> Response:
    body = json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    return _answered(request, body, "application/json")


def _answered(request: Request, body: bytes, kind: str) -> Response:
    """The body, or 304 where the browser has these very bytes."""
    tag = f'"{hashlib.sha256(body).hexdigest()[:24]}"'
    headers = {"etag": tag}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type=kind, headers=headers)


def _missing(text: str) -> Response:
    return Response(json.dumps({"error": text}), 404, media_type="application/json")


def _failed(request: Request, error: Exception) -> Response:
    return Response(json.dumps({"error": str(error)}), 500, media_type="application/json")
