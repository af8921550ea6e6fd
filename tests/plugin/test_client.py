"""The client against a small server of the standard library."""

from __future__ import annotations

import io
import json
import threading
import time
import zipfile
from collections.abc import Iterator
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from storydiffusion_krita import client as client_module
from storydiffusion_krita.client import Address, Client, Event, Failure, Unreachable, parse_address, parse_events
from storydiffusion_krita.jobs import Listener

TOKEN = "a" * 43


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.health: dict[str, Any] = {"protocol": 1, "version": "1", "device": "cpu"}
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        self.streams: list[bytes] = []
        self.result = b""
        self.hold = threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def _take(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((method, self.path, dict(self.headers), body))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"kind": "unauthorized", "sentence": "The token is wrong.", "remedy": "Send yours."})
        elif self.path == "/health":
            self._answer(200, self.server.health)
        elif self.path == "/events":
            self._stream()
        elif self.path == "/jobs":
            self._answer(202, {"id": "f" * 32})
        elif self.path.endswith("/result"):
            self._answer(200, self.server.result)
        elif self.path == "/broken":
            self._answer(500, b"<html>")
        elif self.path.endswith("/cancel"):
            self._answer(200, {})
        else:
            self._answer(404, {"kind": "not_found", "sentence": "There is no such job.", "remedy": ""})

    def do_GET(self) -> None:
        self._take("GET")

    def do_POST(self) -> None:
        self._take("POST")

    def do_DELETE(self) -> None:
        self._take("DELETE")

    def _answer(self, status: int, content: Any) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        if self.server.streams:
            self.wfile.write(self.server.streams.pop(0))
        else:
            self.server.hold.wait(5)


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield one
    one.hold.set()
    one.shutdown()
    one.server_close()


@pytest.fixture
def client(server: Server) -> Client:
    return Client(Address("127.0.0.1", server.server_address[1], TOKEN), timeout=5)


def test_the_token_goes_in_the_header_and_nothing_that_a_browser_sends(client: Client, server: Server) -> None:
    assert client.health()["device"] == "cpu"
    headers = {name.lower() for name in server.requests[0][2]}
    assert "authorization" in headers
    assert not headers & {"origin", "referer", "cookie"}


def test_what_the_backend_refuses_arrives_in_its_words(client: Client) -> None:
    wrong = Client(Address(client.address.host, client.address.port, "b" * 43))
    with pytest.raises(Failure) as caught:
        wrong.health()
    assert (caught.value.kind, caught.value.remedy) == ("unauthorized", "Send yours.")
    with pytest.raises(Failure, match="no such job"):
        client.forget("0" * 32)


@pytest.mark.parametrize(("told", "kind"), [({"protocol": 2, "version": "9"}, "version"), ({"hello": 1}, "address"),
                                            ([1], "address")])  # fmt: skip
def test_another_program_or_version_is_told_apart(client: Client, server: Server, told: Any, kind: str) -> None:
    server.health = told
    with pytest.raises(Failure) as caught:
        client.health()
    assert caught.value.kind == kind


def test_nobody_there_is_unreachable(server: Server, client: Client) -> None:
    free = Client(Address("127.0.0.1", 9, TOKEN))
    with pytest.raises(Unreachable):
        free.health()


def test_a_job_is_one_multipart_body_with_its_key(client: Client, server: Server) -> None:
    assert client.submit({"kind": "generate"}, [b"\x89PNG1", b"\xff\xd8jpeg"], "key-1") == "f" * 32
    _, _, headers, body = server.requests[0]
    assert headers["Idempotency-Key"] == "key-1"
    whole = BytesParser().parsebytes(b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n\r\n" + body)
    parts = whole.get_payload()
    assert [part.get_param("name", header="content-disposition") for part in parts] == ["request", "images", "images"]
    assert [part.get_content_type() for part in parts] == ["application/json", "image/png", "image/jpeg"]
    assert json.loads(parts[0].get_payload(decode=True)) == {"kind": "generate"}
    assert parts[2].get_payload(decode=True) == b"\xff\xd8jpeg"


def test_a_result_is_its_pictures_by_panel(client: Client, server: Server) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("result.json", json.dumps({"panels": [{"panel": "p1", "file": "p1.png", "seed": 3}]}))
        archive.writestr("p1.png", b"png")
    server.result = buffer.getvalue()
    made = client.result("f" * 32)
    assert [(one.panel, one.png, one.seed) for one in made] == [("p1", b"png", 3)]
    server.result = b"half a zip"
    with pytest.raises(Failure, match="damaged"):
        client.result("f" * 32)


def test_events_are_read_as_the_standard_says() -> None:
    lines = [
        *(b": hello\n", b"retry: 500\n", b"\n"),
        *(b"id: a-1\r\n", b"event: step\n", b'data: {"job": "j",\n', b'data:"n": 1}\n', b"\n"),
        *(b"event: x\n", b"data: no json\n", b"\n"),
        *(b'data: {"event": "late"}\n', b"\n"),
        b'data: {"half": 1}',
    ]
    assert list(parse_events(lines)) == [
        Event("a-1", "step", {"job": "j", "n": 1}),
        Event("a-1", "late", {"event": "late"}),
    ]


def test_a_broken_stream_goes_on_after_the_last_event(client: Client, server: Server, monkeypatch: Any) -> None:
    monkeypatch.setattr("storydiffusion_krita.jobs.RETRY_SECONDS", 0.01)
    server.streams = [
        b'id: a-1\nevent: step\ndata: {"job": "j"}\n\n',
        b'id: a-2\nevent: finished\ndata: {"job": "j"}\n\n',
    ]
    heard: list[Event] = []
    broken: list[Failure] = []
    listener = Listener(client, lambda call: call(), heard.append, broken.append)
    end = time.monotonic() + 5
    while len([r for r in server.requests if r[1] == "/events"]) < 3 and time.monotonic() < end:
        time.sleep(0.005)
    listener.stop()
    asked = [headers.get("Last-Event-ID") for _, path, headers, _ in server.requests if path == "/events"]
    assert asked[:3] == [None, "a-1", "a-2"]
    assert [event.kind for event in heard] == ["step", "finished"]
    assert broken, "a server that ends closes its stream: somebody has to ask whether it is still the same"


def test_a_stream_that_is_silent_for_too_long_is_dead(client: Client, server: Server, monkeypatch: Any) -> None:
    monkeypatch.setattr(client_module, "STREAM_TIMEOUT_SECONDS", 0.1)
    with pytest.raises(Unreachable):
        list(client.events())


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("127.0.0.1:8765", "127.0.0.1", 8765), (" http://box:80/ ", "box", 80), ("https://box", "box", 443),
     ("[::1]:99", "::1", 99)],
)  # fmt: skip
def test_addresses_that_people_type(text: str, host: str, port: int) -> None:
    address = parse_address(text, TOKEN)
    assert (address.host, address.port) == (host, port)


@pytest.mark.parametrize("text", ["", "box", "box:0x", "ftp://box:1", "box:99999999", "http://:80"])
def test_what_is_no_address_is_said(text: str) -> None:
    with pytest.raises(Failure, match="not the address"):
        parse_address(text, TOKEN)


@pytest.mark.parametrize("token", ["", "  ", "tökén", "a\nb"])
def test_a_token_that_no_header_can_carry_is_refused(token: str) -> None:
    with pytest.raises(Failure):
        parse_address("box:80", token)
