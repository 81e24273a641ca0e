"""Who may ask the board: this machine's own browser, or somebody with the token; never another site's page.

A page of any site can make a browser send requests to 127.0.0.1, and can point a name of its own at it (DNS
rebinding). So every request must name a host that is ours, must not come from another site, and only reads. Beyond
127.0.0.1 a token is asked for as well.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

Scope = Mapping[str, Any]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""No script, style or connection but our own files; no inline script."""
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "private, no-cache",
}
"""On every answer."""


@dataclass(frozen=True)
class Refusal:
    """Why a request is not answered."""

    status: int
    text: str


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address or name."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class Guard:
    """The rules for one board."""

    host: str
    """What it is bound to."""
    token: str | None
    """What everybody must show; None where only this machine reaches it."""
    names: frozenset[str] = frozenset()
    """What this machine is called, where others reach it."""
    cookie: str = "lmworks-board"
    """The cookie that keeps the token; ports of one host share cookies, so it is named by its port."""

    @classmethod
    def of(cls, host: str, port: int) -> Guard:
        """A guard with a fresh token where others reach the address."""
        cookie = f"lmworks-board-{port}"
        if is_loopback(host):
            return cls(host=host, token=None, cookie=cookie)
        names = frozenset(name.lower() for name in ("localhost", host, socket.gethostname(), socket.getfqdn()))
        return cls(host=host, token=secrets.token_urlsafe(32), names=names, cookie=cookie)

    def refuses(self, method: str, path: str, query: str, headers: Mapping[str, str]) -> Refusal | None:
        """Why a request is not answered; None for one that is. Header names are in lower case."""
        if method not in ("GET", "HEAD"):
            return Refusal(405, "the board only shows: GET and HEAD")
        if not self._is_ours(headers.get("host", "")):
            return Refusal(421, "this host name is not the board's")
        if self._is_foreign(headers):
            return Refusal(403, "this request comes from another site")
        if not self._shows_token(path, query, headers):
            return Refusal(401, "open the address with ?token=... that `lmworks board` printed")
        return None

    def welcomes(self, query: str) -> bool:
        """Whether an address carries the token, to be kept as a cookie."""
        return self.token is not None and _same(_token_in(query), self.token)

    def _is_ours(self, host: str) -> bool:
        """Names can be pointed at any address, addresses cannot: so names must be known."""
        name = _parts(f"//{host}")[0]
        return is_loopback(name) if self.token is None else name in self.names or _is_address(name)

    def _is_foreign(self, headers: Mapping[str, str]) -> bool:
        """Whether a browser says that another site's page asks. Opening a link to the board is no such thing."""
        origin = headers.get("origin")
        if origin is not None and _parts(origin)[1] != headers.get("host", "").lower():
            return True
        opens = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
        return headers.get("sec-fetch-site", "none") not in ("same-origin", "none") and not opens

    def _shows_token(self, path: str, query: str, headers: Mapping[str, str]) -> bool:
        if self.token is None:
            return True
        shown = [_cookie(headers.get("cookie", ""), self.cookie)]
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            shown.append(bearer.strip())
        if path in ("/", "/feed.xml"):  # a feed reader has no cookies
            shown.append(_token_in(query))
        return any([_same(one, self.token) for one in shown])  # noqa: C419  (all are compared, whichever it is)


def _same(shown: str, token: str) -> bool:
    return hmac.compare_digest(shown.encode(errors="replace"), token.encode())


def _token_in(query: str) -> str:
    return parse_qs(query, max_num_fields=20).get("token", [""])[0] if query.count("&") < 20 else ""


def _cookie(header: str, name: str) -> str:
    try:
        found = SimpleCookie(header).get(name)
    except CookieError:
        return ""
    return found.value if found is not None else ""


def _parts(address: str) -> tuple[str, str]:
    """Host name, and host with port, of an address in lower case; empty for what is none."""
    try:
        found = urlsplit(address)
        return found.hostname or "", found.netloc.lower()
    except ValueError:
        return "", ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
