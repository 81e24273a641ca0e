"""Alerts to a web address of a person's choosing. Nothing is sent unless a recipe names one."""

from __future__ import annotations

import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Mapping
from typing import Any, final
from urllib.parse import urlsplit

SECONDS = 3.0
"""How long a post may take."""


@final
class Webhook:
    """Posts JSON from a thread, so that no step waits. It never raises: what failed is told by `failures`."""

    def __init__(self, address: str, *, seconds: float = SECONDS) -> None:
        """`address`: an http(s) URL, or $NAME, the environment variable that holds one."""
        self._address, self._seconds = address, seconds
        self._failures: deque[str] = deque(maxlen=8)

    def post(self, content: Mapping[str, Any]) -> threading.Thread:
        """Send it; the thread that does so."""
        thread = threading.Thread(target=self._send, args=(content,), name="lmworks-webhook")
        thread.start()
        return thread

    def failures(self) -> list[str]:
        """What went wrong since it was asked last. An address is never in it: it may hold a secret."""
        return [self._failures.popleft() for _ in range(len(self._failures))]

    def _send(self, content: Mapping[str, Any]) -> None:
        url = self._url()
        try:
            if url is None:
                raise ValueError(f"the environment has no {self._address.removeprefix('$')}")
            data = json.dumps(content, default=str).encode()
            request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
            with urllib.request.build_opener(_Here).open(request, timeout=self._seconds):
                pass
        except urllib.error.HTTPError as error:
            self._failures.append(f"{_host(url)} answered {error.code}")
            error.close()
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            self._failures.append(f"{_host(url)}: {type(reason).__name__}" if url is not None else str(error))

    def _url(self) -> str | None:
        return os.environ.get(self._address[1:]) if self._address.startswith("$") else self._address


class _Here(urllib.request.HTTPRedirectHandler):
    """Goes nowhere else: an alert is for the address that was named."""

    def redirect_request(self, *unused: Any) -> None:
        return None


def _host(url: str | None) -> str:
    try:
        return urlsplit(url or "").hostname or "no host"
    except ValueError:
        return "no host"


def legal(address: str) -> bool:
    """Whether an address is a URL of the web, or the name of an environment variable behind a $."""
    if address.startswith("$"):
        return address[1:].isidentifier()
    try:
        parts = urlsplit(address)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)
