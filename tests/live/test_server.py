"""The server as a process of its own: loopback only, hostile clients, a run that goes on."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from frostline.errors import DataError, MissingExtra, StorageError, UsageError
from frostline.live.server import open_server

pytest.importorskip("waitress", reason="needs waitress: pip install 'frostline[live]'")

_SERVE = """
import sys
from pathlib import Path
from frostline.live.server import open_server
server = open_server([Path(sys.argv[1])], lambda paths: "<p>" + "x" * 100_000, name="run")
print(server.url, flush=True)
server.run()
print("stopped", flush=True)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "record.jsonl").write_text("x")
    return folder


@contextmanager
def _serving(run: Path) -> Iterator[tuple[str, int, subprocess.Popen[str]]]:
    with subprocess.Popen(
        [sys.executable, "-c", _SERVE, str(run)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/([\w-]{20,})/", url)
            assert found is not None, url
            yield found[2], int(found[1]), process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def serving(run) -> Iterator[tuple[str, int]]:
    with _serving(run) as (token, port, _):
        yield token, port


def _open(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def _answer(connection: socket.socket, sent: bytes) -> bytes:
    """All that comes back until the other side closes or stops sending."""
    connection.sendall(sent)
    connection.settimeout(1)
    got = b""
    try:
        while some := connection.recv(65536):
            got += some
    except TimeoutError:
        pass
    except ConnectionResetError:
        pass
    return got


def _get(token: str, port: int, path: str = "state", *, close: bool = True) -> bytes:
    with _open(port) as connection:
        ending = "Connection: close\r\n" if close else ""
        ask = f"GET /{token}/{path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{ending}\r\n"
        return _answer(connection, ask.encode())


def _code(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


def test_it_answers_on_loopback_and_nowhere_else(serving):
    token, port = serving
    assert _code(_get(token, port)) == 200
    page = _get(token, port, "page")
    assert page.endswith(b"x" * 100_000)
    assert b"\r\nServer:" not in page
    listening = [
        line.split()[1]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and line.split()[1].endswith(f":{port:04X}")
    ] if Path("/proc/net/tcp").exists() else ["0100007F:"]  # fmt: skip
    assert [address.partition(":")[0] for address in listening] == ["0100007F"]


@pytest.mark.parametrize(
    ("request_", "codes"),
    [
        (b"GET /{t}/state HTTP/1.1\r\n\r\n", {400}),
        (b"GET /{t}/state HTTP/1.0\r\n\r\n", {400}),
        (b"GET /{t}/state HTTP/1.1\r\nHost: evil.example\r\n\r\n", {403}),
        (b"GET /{t}/state HTTP/1.1\r\nHost: {h}\r\nHost: evil.example\r\n\r\n", {400, 403}),
        (b"GET http://evil.example/{t}/state HTTP/1.1\r\nHost: {h}\r\n\r\n", {200, 400, 403, 404}),
        (b"GET //evil.example/{t}/state HTTP/1.1\r\nHost: {h}\r\n\r\n", {400, 403, 404}),
        (b"GET /{t}/../../etc/passwd HTTP/1.1\r\nHost: {h}\r\n\r\n", {403, 404}),
        (b"GET /{t}/%2e%2e%2fetc/passwd HTTP/1.1\r\nHost: {h}\r\n\r\n", {403, 404}),
        (b"GET /{t}/%00 HTTP/1.1\r\nHost: {h}\r\n\r\n", {400, 404}),
        (b"GET /{t}/page\\.. HTTP/1.1\r\nHost: {h}\r\n\r\n", {400, 404}),
        (b"TRACE /{t}/state HTTP/1.1\r\nHost: {h}\r\n\r\n", {405}),
        (b"POST /{t}/state HTTP/1.1\r\nHost: {h}\r\nContent-Length: 4\r\n\r\nabcd", {405, 413}),
        (b"GET /{t}/state HTTP/1.1\r\nHost: {h}\r\n" + b"Content-Length: 2\r\n" * 2 + b"\r\nab",
         {400, 413}),
        (b"GET /{t}/state HTTP/1.1\r\nHost: {h}\r\nTransfer-Encoding: chunked\r\n\r\n"
         b"ffff\r\n" + b"a" * 0xffff + b"\r\n0\r\n\r\n", {400, 413}),
        (b"GET /{t}/state HTTP/1.1\r\nHost: {h}\r\nX: " + b"a" * 9000 + b"\r\n\r\n", {431}),
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: {h}\r\n\r\n", {400, 414, 431}),
        (b"GET /{t}/state HTTP/1.1\r\nHost: {h}\r\n" + b"X: a\r\n" * 3000 + b"\r\n", {431}),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", {400}),
        (b"nonsense\r\n\r\n", {400}),
    ],
)  # fmt: skip
def test_strange_requests_are_refused(serving, run, request_, codes):
    token, port = serving
    sent = request_.replace(b"{t}", token.encode()).replace(b"{h}", f"127.0.0.1:{port}".encode())
    with _open(port) as connection:
        answer = _answer(connection, sent)
    assert _code(answer) in codes, answer[:200]
    assert str(run).encode() not in answer
    assert b"root:" not in answer
    assert _code(_get(token, port)) == 200


@pytest.mark.slow
def test_idle_and_slow_clients_go_and_others_are_answered(run):
    """Half of them send nothing, half a byte every half second, for ever: both are let go."""
    with _serving(run) as (token, port, _), ExitStack() as stack:
        clients = [stack.enter_context(_open(port)) for _ in range(128)]
        began, alive = time.monotonic(), set(range(64, 128))
        while alive and time.monotonic() - began < 30:
            for number in sorted(alive):
                try:
                    clients[number].sendall(b"G")
                    clients[number].settimeout(0.001)
                    if clients[number].recv(1000) == b"":
                        alive.discard(number)
                except TimeoutError:
                    continue
                except OSError:
                    alive.discard(number)
            time.sleep(0.5)
        assert not alive, f"{len(alive)} clients that send a byte at a time are still there"
        start = time.monotonic()
        assert _code(_get(token, port)) == 200
        assert time.monotonic() - start < 1


def test_ctrl_c_ends_it_in_order(run):
    with _serving(run) as (token, port, process):
        assert _code(_get(token, port)) == 200
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == "stopped\n"
        assert process.wait(10) == 0


def test_a_port_that_is_taken_is_told(run, serving):
    _, port = serving
    with pytest.raises(StorageError, match=f"port {port}"):
        open_server([run], lambda paths: "", name="x", port=port)


@pytest.mark.parametrize("port", [-1, 65_536, 70_000])
def test_what_is_no_port_is_refused(run, port):
    with pytest.raises(UsageError, match=str(port)):
        open_server([run], lambda paths: "", name="x", port=port)


def test_what_is_not_there_cannot_be_watched(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        open_server([tmp_path / "nowhere"], lambda paths: "", name="x")


def test_without_waitress_the_message_says_how_to_get_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "waitress.server", None)
    with pytest.raises(MissingExtra, match=r"frostline\[live\]"):
        open_server([run], lambda paths: "", name="x")
