"""Who may read what: a WSGI application with three fixed addresses, read-only.

Loopback is shared by all users of a machine and by every page in their browsers. Hence a token in
the address, the exact names of this host only (against DNS rebinding), no requests from other
sites, no header that lets another site read an answer, and no part of an address that becomes the
name of a file.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from frostline.live.shell import notice, shell, shell_policy
from frostline.live.watched import Watched

__all__ = ["LiveApp"]

StartResponse = Callable[[str, list[tuple[str, str]]], object]

_HTML, _JSON, _TEXT = (
    f"{kind}; charset=utf-8" for kind in ("text/html", "application/json", "text/plain")
)
#: The report brings scripts and styles of its own; none may reach anything but this page.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "font-src data:; frame-ancestors 'self'; base-uri 'none'; form-action 'none'"
)
_ALWAYS = (
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cache-Control", "no-cache"),
)


@dataclass(frozen=True, slots=True)
class _Answer:
    status: str
    kind: str = _TEXT
    text: str = ""
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class LiveApp:
    """The application.

    Args:
        watched: what it shows.
        name: what that is called.
        token: what an address must start with.
        hosts: host and port as a browser may name them, e.g. "127.0.0.1:8000".
    """

    watched: Watched
    name: str
    token: str
    hosts: Collection[str]

    def __call__(
        self, environ: Mapping[str, Any], start_response: StartResponse
    ) -> Iterable[bytes]:
        """Answer one request."""
        answer = self._answer(environ)
        body = answer.text.encode()
        length = () if answer.status.startswith("304") else (("Content-Length", str(len(body))),)
        headers = [("Content-Type", answer.kind), *length, *_ALWAYS, *answer.headers]
        start_response(answer.status, headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    def _answer(self, environ: Mapping[str, Any]) -> _Answer:
        if (refused := self._refused(environ)) is not None:
            return refused
        first, _, rest = environ.get("PATH_INFO", "").removeprefix("/").partition("/")
        if not hmac.compare_digest(_bytes(first), _bytes(self.token)):
            return _Answer("403 Forbidden", text="the address lacks the token of this watch\n")
        match rest:
            case "":
                policy = ("Content-Security-Policy", shell_policy())
                return _Answer("200 OK", _HTML, shell(self.name), (policy,))
            case "state":
                state = json.dumps(self.watched.state().to_json(), ensure_ascii=True)
                return _Answer("200 OK", _JSON, state)
            case "page":
                return self._page(environ)
            case _:
                return _Answer("404 Not Found", text="nothing here\n")

    def _refused(self, environ: Mapping[str, Any]) -> _Answer | None:
        if "HTTP_HOST" not in environ:
            return _Answer("400 Bad Request", text="no Host header\n")
        if environ["HTTP_HOST"] not in self.hosts:
            return _Answer("403 Forbidden", text="another host than this one\n")
        origin = environ.get("HTTP_ORIGIN")
        if origin is not None and origin.removeprefix("http://") not in self.hosts:
            return _Answer("403 Forbidden", text="asked from another site\n")
        # Other ports of this host are the same site, and not this page.
        if environ.get("HTTP_SEC_FETCH_SITE", "none") not in ("none", "same-origin"):
            return _Answer("403 Forbidden", text="asked from another site\n")
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            allow = (("Allow", "GET, HEAD"),)
            return _Answer("405 Method Not Allowed", text="read-only\n", headers=allow)
        return None

    def _page(self, environ: Mapping[str, Any]) -> _Answer:
        page, policy = self.watched.page(), ("Content-Security-Policy", _PAGE_POLICY)
        if page is None:
            text = notice(self.watched.state().problem or "nothing to show yet")
            return _Answer("503 Service Unavailable", _HTML, text, (policy,))
        tag = f'"{page.version}"'
        if environ.get("HTTP_IF_NONE_MATCH") == tag:
            return _Answer("304 Not Modified", _HTML, headers=(("ETag", tag),))
        return _Answer("200 OK", _HTML, page.html, (policy, ("ETag", tag)))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
