"""The live page on a port of 127.0.0.1, for as long as it is wanted.

Waitress waits for whole requests without a thread for each. It counts its patience from the last
byte; here it counts from the first of a request, so that a client that sends one byte at a time
cannot stay for ever.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frostline.errors import MissingExtra, StorageError, UsageError
from frostline.live.app import LiveApp
from frostline.live.watched import Render, Watched

if TYPE_CHECKING:
    from waitress.channel import HTTPChannel

__all__ = ["LiveServer", "open_server"]

HOST = "127.0.0.1"
_CONNECTIONS = 128
_REQUEST_S = 10
_LIMITS = {
    "threads": 2,
    "connection_limit": _CONNECTIONS,
    "channel_timeout": _REQUEST_S,
    "cleanup_interval": 1,
    "max_request_header_size": 8192,
    "max_request_body_size": 1,
    "ident": None,
    "asyncore_use_poll": os.name == "posix",
}


@dataclass(frozen=True, slots=True)
class LiveServer:
    """A server that listens already.

    Attributes:
        url: its address, token and all: whoever has it may read the page.
    """

    url: str
    _server: Any

    def run(self) -> None:
        """Serve until Ctrl-C."""
        self._server.run()


def open_server(paths: Sequence[Path], render: Render, *, name: str, port: int = 0) -> LiveServer:
    """Listen on loopback; nothing is served before `run`.

    Args:
        paths: run folders or studies.
        render: makes the page of them.
        name: what they are called on the page.
        port: which port, or 0 for any that is free.

    Raises:
        DataError: no such folder.
        MissingExtra: waitress is not installed.
        StorageError: the port cannot be had.
        UsageError: there is no such port.
    """
    if not 0 <= port <= 65_535:
        raise UsageError(
            f"listen on port {port}", found="no port", fix="0 (any that is free) to 65535"
        )
    watched = Watched(paths, render)
    token = secrets.token_urlsafe(16)
    server = _listen(port)
    here = int(server.effective_port)
    hosts = frozenset((f"{HOST}:{here}", f"localhost:{here}"))
    server.application = LiveApp(watched, name, token, hosts)
    return LiveServer(f"http://{HOST}:{here}/{token}/", server)


def _listen(port: int) -> Any:
    try:
        from waitress.server import create_server  # noqa: PLC0415  only this command needs it
    except ModuleNotFoundError as error:
        raise MissingExtra(
            "serve the live page",
            found="no package 'waitress' in this Python",
            fix="pip install 'frostline[live]'",
        ) from error
    try:
        # waitress does not close its socket where the port is taken, so one of ours asks first.
        with socket.socket() as asking:
            asking.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            asking.bind((HOST, port))
        server: Any = create_server(_not_yet, host=HOST, port=port, **_LIMITS)
    except OSError as error:
        raise StorageError(
            f"listen on port {port} of {HOST}",
            found=str(error),
            fix="another --port, or none: any that is free is taken",
        ) from error
    server.channel_class = _impatient(server.channel_class)
    return server


def _not_yet(environ: object, start_response: Any) -> list[bytes]:
    del environ
    start_response("503 Service Unavailable", [])
    return []


def _impatient(channel: type[HTTPChannel]) -> type[HTTPChannel]:
    """The same channel, for which a request's time runs from its first byte."""

    class Impatient(channel):
        def handle_read(self) -> None:
            unfinished, since = self.request, self.last_activity
            super().handle_read()
            if unfinished is not None and self.request is unfinished:
                self.last_activity = since

    return Impatient
