"""The board as a process: a socket, a server, an address to open."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from lmworks.board.guard import Guard, is_loopback
from lmworks.core.errors import UsageError


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UsageError for an address that is taken or is none of this machine's."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        text = f"cannot listen on {host}, port {port}: {error.strerror or error}"
        raise UsageError(text, next_step="--port 0 takes a free port, --host the address") from error


def address(guard: Guard, port: int) -> str:
    """What a person opens: with the token, where there is one."""
    host = f"[{guard.host}]" if ":" in guard.host else guard.host
    if not is_loopback(guard.host) and guard.host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://{host}:{port}/" + (f"?token={guard.token}" if guard.token else "")


def serve(app: ASGIApp, listening: socket.socket, *, started: Callable[[], None]) -> None:
    """Answer until the process is asked to stop. Addresses are not logged: one of them holds the token."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=1
    )
    started()
    uvicorn.Server(config).run(sockets=[listening])
