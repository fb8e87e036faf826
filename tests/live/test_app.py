"""Who may read what: token, host, site, method; fixed addresses; headers on every answer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from frostline.live.app import LiveApp
from frostline.live.watched import Watched

HOST = "127.0.0.1:8000"
TOKEN = "token-of-this-watch"  # noqa: S105
PATHS = ("", "state", "page")


@pytest.fixture
def app(tmp_path) -> LiveApp:
    (tmp_path / "record.jsonl").write_text("x")
    watched = Watched((tmp_path,), lambda paths: "<p>the page</p>")
    return LiveApp(watched, "a <run>", TOKEN, {HOST, "localhost:8000"})


def _ask(app: LiveApp, path: str = "", *, method: str = "GET", host: str | None = HOST, **headers):
    environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": ""}
    environ |= {f"HTTP_{name.upper()}": value for name, value in headers.items()}
    if host is not None:
        environ["HTTP_HOST"] = host
    told: list = []
    body = b"".join(app(environ, lambda status, headers: told.extend((status, dict(headers)))))
    return int(told[0].split()[0]), told[1], body.decode()


@pytest.mark.parametrize("path", PATHS)
def test_with_token_and_host_everything_is_there(app, path):
    code, headers, body = _ask(app, f"/{TOKEN}/{path}")
    assert code == 200
    assert int(headers["Content-Length"]) == len(body.encode())
    assert _ask(app, f"/{TOKEN}/{path}", host="localhost:8000")[0] == 200
    code, head, empty = _ask(app, f"/{TOKEN}/{path}", method="HEAD")
    assert (code, empty) == (200, "")
    assert path == "state" or head["Content-Length"] == headers["Content-Length"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("token", ["", "x", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "\udcff\xe9"])
def test_without_the_token_nothing_is_there(app, path, token):
    code, _, body = _ask(app, f"/{token}/{path}")
    assert code == 403
    assert TOKEN not in body


@pytest.mark.parametrize(
    ("host", "code"),
    [
        (None, 400),
        ("", 403),
        ("evil.example", 403),
        ("127.0.0.1", 403),
        ("127.0.0.1:8001", 403),
        ("127.0.0.1.evil:8000", 403),
        ("evil.example:8000", 403),
        ("[::1]:8000", 403),
        ("127.0.0.1:8000, evil.example", 403),
        ("LOCALHOST:8000", 403),
    ],
)
def test_another_host_is_refused_against_rebinding(app, host, code):
    assert _ask(app, f"/{TOKEN}/state", host=host)[0] == code


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"origin": "null"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "https://127.0.0.1:8000"}, 403),
        ({"origin": "http://127.0.0.1:8000"}, 200),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-site"}, 403),
        ({"sec_fetch_site": "same-origin"}, 200),
        ({"sec_fetch_site": "none"}, 200),
    ],
)
def test_other_sites_are_refused(app, headers, code):
    assert _ask(app, f"/{TOKEN}/state", **headers)[0] == code


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "GETX"])
def test_it_is_read_only(app, method):
    code, headers, _ = _ask(app, f"/{TOKEN}/state", method=method)
    assert (code, headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    "path",
    [
        "/..", "/../../etc/passwd", "/page/", "/page/..", "//page", "/record.jsonl", "/\x00",
        "/page\x00", "/%2e%2e/etc/passwd", "\\..\\x", "/state/state", "/favicon.ico",
    ],
)  # fmt: skip
def test_no_part_of_an_address_names_a_file(app, path, tmp_path):
    code, _, body = _ask(app, f"/{TOKEN}{path}")
    assert code in (403, 404)
    assert str(tmp_path) not in body


def test_every_answer_keeps_other_sites_out(app):
    for path in (*(f"/{TOKEN}/{p}" for p in PATHS), "/", f"/{TOKEN}/nothing"):
        _, headers, _ = _ask(app, path)
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"  # the address holds the token
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert not [name for name in headers if name.lower().startswith("access-control")]


def test_the_page_around_runs_its_own_script_only(app):
    _, headers, body = _ask(app, f"/{TOKEN}/")
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert "a &lt;run&gt;" in body
    assert not re.search(r"\son\w+=|https?://", body)
    policy = _ask(app, f"/{TOKEN}/page")[1]["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "connect-src" not in policy  # falls back to nothing: the report can reach nothing


def test_the_state_is_small_and_the_page_is_not_sent_twice(app):
    state = json.loads(_ask(app, f"/{TOKEN}/state")[2])
    assert set(state) == {"version", "phase", "changed_s", "problem"}
    code, headers, _ = _ask(app, f"/{TOKEN}/page")
    assert headers["ETag"] == f'"{state["version"]}"'
    code, _, body = _ask(app, f"/{TOKEN}/page", if_none_match=headers["ETag"])
    assert (code, body) == (304, "")
    assert _ask(app, f"/{TOKEN}/page", if_none_match='"other"')[0] == 200


def test_without_a_page_it_says_why(tmp_path):
    def fail(paths):
        raise ValueError("<b>no</b>")

    app = LiveApp(Watched((tmp_path,), fail), "x", TOKEN, {HOST})
    assert "nothing to show yet" in _ask(app, f"/{TOKEN}/page")[2]
    Path(tmp_path, "record.jsonl").write_text("x")
    code, _, body = _ask(app, f"/{TOKEN}/page")
    assert code == 503
    assert "ValueError: &lt;b&gt;no&lt;/b&gt;" in body
