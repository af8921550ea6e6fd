"""Every security promise of the backend, over a list of bypasses, on every endpoint there is.

The application is called without a network in between, so that no client library tidies a request up;
where the HTTP parser is part of the promise, raw bytes go to a real socket.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import socket
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serving import BOUNDARY, TOKEN, Client, Script, generate, multipart, png, serving
from storydiffusion.cli import main
from storydiffusion.errors import ImageError, StoryDiffusionError
from storydiffusion.server import images, security
from storydiffusion.server.app import Server
from storydiffusion.server.main import bind, extra_models, hosts_of
from storydiffusion.server.protocol import MAX_IMAGES
from storydiffusion.server.work import Part

GOOD: list[tuple[bytes, bytes]] = [(b"host", b"127.0.0.1:8000"), (b"authorization", b"Bearer " + TOKEN.encode())]
JOB = "0" * 32


@pytest.fixture(scope="module")
def server() -> Server:
    script = Script()
    script.gate.set()
    return Server(TOKEN, run=script)


def surfaces() -> list[tuple[str, str]]:
    """Every endpoint, from the application itself, and what is none."""
    described = Server(TOKEN).api.openapi()["paths"]
    found = [(method.upper(), path.format(job_id=JOB)) for path, methods in described.items() for method in methods]
    assert len(found) >= 11
    return [*found, ("GET", "/openapi.json"), ("GET", "/nothing"), ("OPTIONS", "/jobs"), ("HEAD", "/health")]


SURFACES = surfaces()


def ask(
    server: Server,
    method: str,
    path: str,
    headers: list[tuple[bytes, bytes]],
    body: list[bytes] | None = None,
    kind: str = "http",
    limit: int | None = None,
) -> tuple[int, dict[str, str], bytes]:
    """One call of the ASGI application; status 0 where it answered nothing."""
    sent: list[Any] = []
    chunks = list(body or [])
    taken: list[bytes] = []

    async def receive() -> Any:
        if not chunks:
            if taken or not body:
                return {"type": "http.request", "body": b"", "more_body": False}
            return {"type": "http.disconnect"}
        taken.append(chunks.pop(0))
        return {"type": "http.request", "body": taken[-1], "more_body": bool(chunks)}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": kind,
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    asyncio.run(asyncio.wait_for(server.app(scope, receive, send), 10))
    start = next((m for m in sent if m["type"] == "http.response.start"), None)
    if start is None:
        return 0, {}, repr(sent).encode()
    return (
        start["status"],
        {k.decode().lower(): v.decode() for k, v in start["headers"]},
        b"".join(m.get("body", b"") for m in sent if m["type"] == "http.response.body"),
    )


def everywhere(server: Server, headers: list[tuple[bytes, bytes]], statuses: set[int], kind: str) -> None:
    for method, path in SURFACES:
        status, answered, body = ask(server, method, path, headers)
        assert status in statuses, f"{method} {path} answered {status}"
        assert json.loads(body)["kind"] == kind
        assert not [name for name in answered if name.startswith("access-control-")]


# The token -------------------------------------------------------------------------------------------

WRONG_TOKENS: dict[str, list[bytes]] = {
    "none": [],
    "empty": [b""],
    "no token": [b"Bearer"],
    "no token but a space": [b"Bearer "],
    "another": [b"Bearer " + b"u" * 43],
    "the beginning of it": [b"Bearer " + TOKEN[:-1].encode()],
    "more than it": [b"Bearer " + TOKEN.encode() + b"x"],
    "in another case": [b"Bearer " + TOKEN.upper().encode()],
    "with a space behind": [b"Bearer " + TOKEN.encode() + b" "],
    "with two spaces": [b"Bearer  " + TOKEN.encode()],
    "without scheme": [TOKEN.encode()],
    "of another scheme": [b"Basic " + TOKEN.encode()],
    "twice": [b"Bearer " + TOKEN.encode()] * 2,
    "the right one second": [b"Bearer wrong", b"Bearer " + TOKEN.encode()],
    "the right one in a list": [b"Bearer wrong, Bearer " + TOKEN.encode()],
    "letters of no alphabet": [b"Bearer \xff\xfe\x00"],
    "a null": [b"Bearer \x00" + TOKEN.encode()],
    "very long": [b"Bearer " + b"t" * 100_000],
}


@pytest.mark.parametrize("sent", WRONG_TOKENS.values(), ids=WRONG_TOKENS)
def test_no_endpoint_answers_without_the_token(server: Server, sent: list[bytes]) -> None:
    everywhere(server, [GOOD[0], *((b"authorization", one) for one in sent)], {401}, "unauthorized")


def test_a_token_in_the_address_a_cookie_or_the_body_is_none(server: Server) -> None:
    for headers in ([(b"cookie", f"token={TOKEN}".encode())], [(b"x-api-key", TOKEN.encode())]):
        everywhere(server, [GOOD[0], *headers], {401}, "unauthorized")
    assert ask(server, "GET", f"/health?token={TOKEN}", [GOOD[0]])[0] == 401


def test_the_token_opens_the_endpoints(server: Server) -> None:
    """The other tests of this file would also pass on a server that refuses everything."""
    for path in ("/health", "/jobs", "/openapi.json"):
        assert ask(server, "GET", path, GOOD)[0] == 200
    status, headers, _ = ask(server, "GET", "/health", [GOOD[0]])
    assert (status, headers["www-authenticate"]) == (401, "Bearer")


@pytest.mark.parametrize(
    "token", ["", "short", "t" * 42, "t" * 42 + " ", "t" * 42 + "\n", "t" * 42 + "é", "t" * 600, "🙂" * 50]
)
def test_a_token_of_less_than_256_bits_starts_no_server(token: str) -> None:
    with pytest.raises(StoryDiffusionError, match="256 bits"):
        Server(token)


# Host: DNS rebinding ---------------------------------------------------------------------------------

WRONG_HOSTS = [
    b"", b"evil.example", b"evil.example:8000", b"127.0.0.1.evil.example", b"evil.example@127.0.0.1",
    b"127.0.0.1@evil.example", b"127.0.0.1:8000@evil.example", b"localhost.evil.example", b"localhost.",
    b"127.0.0.1:8000:8000", b"127.0.0.1:", b"127.0.0.1:evil", b"127.0.0.1:-1", b"127.0.0.1:999999",
    b"127.0.0.1, evil.example", b"127.0.0.1 evil.example", b"127.0.0.1/evil", b"127.0.0.1#", b"127.0.0.1?",
    b"127.1", b"127.0.0.2", b"0.0.0.0", b"0", b"2130706433", b"0x7f000001", b"0177.0.0.1", b"::1", b"[::]", b"[::1",
    b"[::1].evil.example", b"[::ffff:127.0.0.1]", b"127.0.0.1\\evil", b"127.0.0.1%00", b"\x00127.0.0.1", b"127.0.0.1\t",
    b" 127.0.0.1", "１２７.0.0.1".encode(), b"*", b"localhost\xff", b"http://127.0.0.1", b"a" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("host", WRONG_HOSTS, ids=lambda host: repr(host[:24]))
def test_another_name_in_host_is_refused_everywhere(server: Server, host: bytes) -> None:
    everywhere(server, [(b"host", host), GOOD[1]], {421}, "forbidden")


@pytest.mark.parametrize(
    "hosts",
    [[], [b"127.0.0.1", b"127.0.0.1"], [b"evil.example", b"127.0.0.1"], [b"127.0.0.1", b"evil.example"]],
)
def test_no_host_and_two_hosts_are_refused(server: Server, hosts: list[bytes]) -> None:
    everywhere(server, [*((b"host", host) for host in hosts), GOOD[1]], {421}, "forbidden")


@pytest.mark.parametrize("name", [b"x-forwarded-host", b"x-host", b"forwarded", b"x-original-host"])
def test_no_other_header_stands_in_for_host(server: Server, name: bytes) -> None:
    assert ask(server, "GET", "/health", [(b"host", b"evil.example"), (name, b"127.0.0.1"), GOOD[1]])[0] == 421


@pytest.mark.parametrize("host", [b"127.0.0.1", b"127.0.0.1:1", b"localhost:65535", b"LOCALHOST", b"[::1]:8000"])
def test_the_names_of_this_machine_are_answered(server: Server, host: bytes) -> None:
    assert ask(server, "GET", "/health", [(b"host", host), GOOD[1]])[0] == 200


# Web pages -------------------------------------------------------------------------------------------

ORIGINS = [b"http://evil.example", b"null", b"", b"http://127.0.0.1:8000", b"http://localhost", b"file://",
           b"chrome-extension://abc", b"https://127.0.0.1"]  # fmt: skip


@pytest.mark.parametrize("origin", ORIGINS)
def test_any_origin_is_refused_everywhere_and_given_no_cors(server: Server, origin: bytes) -> None:
    everywhere(server, [*GOOD, (b"origin", origin)], {403}, "forbidden")


@pytest.mark.parametrize("site", [b"cross-site", b"same-origin", b"same-site", b"none"])
def test_what_only_browsers_send_is_refused(server: Server, site: bytes) -> None:
    """An image tag or a link sends no Origin, but says where it comes from."""
    everywhere(server, [*GOOD, (b"sec-fetch-site", site)], {403}, "forbidden")


def test_a_preflight_is_not_answered_for(server: Server) -> None:
    headers = [GOOD[0], (b"origin", b"http://evil.example"), (b"access-control-request-method", b"POST")]
    status, answered, _ = ask(server, "OPTIONS", "/jobs", headers)
    assert status == 403
    assert not [name for name in answered if name.startswith("access-control-")]


def test_no_answer_can_be_kept_sniffed_or_framed(server: Server) -> None:
    for headers in (GOOD, [GOOD[0]]):
        answered = ask(server, "GET", "/health", headers)[1]
        assert answered["cache-control"] == "no-store"
        assert answered["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answered["content-security-policy"]


def test_there_are_no_web_sockets(server: Server) -> None:
    for method, path in SURFACES:
        status, _, said = ask(server, method, path, GOOD, kind="websocket")
        assert status == 0
        assert b"websocket.close" in said


@pytest.mark.parametrize(
    "path", ["/docs", "/redoc", "/static/x", "/../etc/passwd", "/%2e%2e/etc/passwd", "//evil", "/jobs/"]
)
def test_there_are_no_pages_files_or_redirects(server: Server, path: str) -> None:
    assert ask(server, "GET", path, GOOD)[0] == 404


# Bodies ----------------------------------------------------------------------------------------------

WRONG_TYPES = [
    b"", b"application/json", b"text/plain", b"application/x-www-form-urlencoded", b"application/octet-stream",
    b"multipart/form-data", b"multipart/form-data; boundary=", b"multipart/form-data; boundary=" + b"x" * 71,
    b"multipart/mixed; boundary=x", b"multipart/form-data; charset=utf-7; boundary=x",
    b"multipart/form-data; boundary=x; charset=idna", b"multipart/form-data; boundary=a; boundary=b",
    b"multipart/form-data; boundary=\xff", b"multipart/form-data, application/json",
]  # fmt: skip


@pytest.mark.parametrize("type_", WRONG_TYPES)
def test_a_job_of_another_content_type_is_refused(server: Server, type_: bytes) -> None:
    body = multipart(generate(1))
    headers = [*GOOD, (b"content-type", type_), (b"content-length", str(len(body)).encode())]
    status, _, said = ask(server, "POST", "/jobs", headers, [body])
    assert (status, json.loads(said)["kind"]) == (415, "media_type")


@pytest.mark.parametrize(
    "type_", [b"text/plain", b"", b"application/xml", b"application/json; charset=utf-7", b"text/json"]
)
def test_json_is_taken_as_json_only(server: Server, type_: bytes) -> None:
    """A form of text/plain is what a web page can send without being asked first."""
    headers = [*GOOD, (b"content-type", type_), (b"content-length", b"15")]
    assert ask(server, "POST", f"/jobs/{JOB}/move", headers, [b'{"position": 0}'])[0] == 415


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate", b"br", b"gzip, identity", b"x"])
def test_a_compressed_body_is_refused(server: Server, encoding: bytes) -> None:
    headers = [*job_headers(100), (b"content-encoding", encoding)]
    assert ask(server, "POST", "/jobs", headers, [zlib.compress(b"0" * 1000)])[0] == 415


@pytest.mark.parametrize(
    "length", [b"268435457", b"99999999999999999", b"999999999999999999999999", b"-1", b"1e3", b"x"]
)
def test_a_body_announced_too_large_is_refused_before_it_is_read(server: Server, length: bytes) -> None:
    headers = [*GOOD, (b"content-type", f"multipart/form-data; boundary={BOUNDARY}".encode())]
    status, answered, said = ask(server, "POST", "/jobs", [*headers, (b"content-length", length)], [b"x"])
    assert (status, json.loads(said)["kind"]) == (413, "too_large")
    assert answered["connection"] == "close"


@pytest.mark.parametrize("announced", [b"10", None])
def test_a_body_that_grows_past_the_limit_is_cut_off(announced: bytes | None) -> None:
    small = Server(TOKEN, run=Script(), max_body=10_000)
    headers = [*GOOD, (b"content-type", f"multipart/form-data; boundary={BOUNDARY}".encode())]
    headers.append((b"transfer-encoding", b"chunked") if announced is None else (b"content-length", announced))
    body = multipart(generate(1), [b"x" * 50_000])
    chunks = [body[i : i + 1000] for i in range(0, len(body), 1000)]
    status, _, said = ask(small, "POST", "/jobs", headers, chunks)
    assert (status, json.loads(said)["kind"]) == (413, "too_large")


def test_a_body_where_none_belongs_is_refused(server: Server) -> None:
    for method, path in SURFACES:
        if method in ("GET", "DELETE", "HEAD", "OPTIONS"):
            assert ask(server, method, path, [*GOOD, (b"content-length", b"5")], [b"hello"])[0] == 400


def test_json_nested_without_end_is_refused(server: Server) -> None:
    for text in (b"[" * 60_000, b'{"a":' * 10_000):
        headers = [*GOOD, (b"content-type", b"application/json"), (b"content-length", str(len(text)).encode())]
        assert ask(server, "POST", f"/jobs/{JOB}/move", headers, [text])[0] in (400, 422)
        body = multipart(text)
        assert ask(server, "POST", "/jobs", job_headers(len(body)), [body])[0] == 422


def test_more_parts_than_pictures_are_refused(server: Server) -> None:
    body = multipart(generate(1), [b"x"] * (MAX_IMAGES + 2))
    assert ask(server, "POST", "/jobs", job_headers(len(body)), [body])[0] == 400


def job_headers(length: int) -> list[tuple[bytes, bytes]]:
    type_ = f"multipart/form-data; boundary={BOUNDARY}".encode()
    return [*GOOD, (b"content-type", type_), (b"content-length", str(length).encode())]


# Through the parser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live() -> Iterator[Client]:
    script = Script()
    script.gate.set()
    with serving(script) as (client, _):
        yield client


AUTHORIZED = f"Authorization: Bearer {TOKEN}\r\n"
RAW = {
    "no Host in HTTP/1.0": f"GET /health HTTP/1.0\r\n{AUTHORIZED}\r\n",
    "no Host in HTTP/1.1": f"GET /health HTTP/1.1\r\n{AUTHORIZED}\r\n",
    "two Hosts": f"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil\r\n{AUTHORIZED}\r\n",
    "a folded Host": f"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n evil\r\n{AUTHORIZED}\r\n",
    "an absolute target": f"GET http://evil/health HTTP/1.1\r\nHost: 127.0.0.1\r\n{AUTHORIZED}\r\n",
    "a proxy's CONNECT": f"CONNECT evil:443 HTTP/1.1\r\nHost: 127.0.0.1\r\n{AUTHORIZED}\r\n",
    "two lengths": "POST /jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n"
    f"{AUTHORIZED}\r\nab",
    "a space before the colon": f"GET /health HTTP/1.1\r\nHost : 127.0.0.1\r\n{AUTHORIZED}\r\n",
    "no HTTP": "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "a header without end": "GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + "x" * 200_000,
    "a token that ends the line": "GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer \r\n"
    f"{TOKEN}\r\n\r\n",
}


@pytest.mark.parametrize("sent", RAW.values(), ids=RAW)
def test_a_request_that_is_bent_is_not_answered_as_a_straight_one(live: Client, sent: str) -> None:
    with socket.create_connection(("127.0.0.1", live.port), timeout=5) as connection:
        try:
            connection.sendall(sent.encode("latin-1"))
            connection.shutdown(socket.SHUT_WR)
            said = connection.recv(65536)
        except OSError:  # it has hung up already
            said = b""
    assert not re.match(rb"HTTP/1.1 [25]", said), said[:200]
    assert live.get("/health").status == 200


# Pictures --------------------------------------------------------------------------------------------


def saved(format_: str, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (8, 6)).save(buffer, format_, **options)
    return buffer.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A small file that says it is a large picture."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = zlib.compress(b"\0" * 1_000_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


BAD_PICTURES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "image/png"),
    "text": (b"hello", "image/png"),
    "a GIF": (saved("GIF", "P"), "image/png"),
    "a BMP": (saved("BMP"), "image/png"),
    "a TIFF": (saved("TIFF"), "image/png"),
    "an ICO": (saved("ICO"), "image/png"),
    "an EPS, which Pillow hands to Ghostscript": (saved("EPS"), "image/png"),
    "a PDF": (saved("PDF"), "image/png"),
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', "image/png"),
    "a PNG that says it is a JPEG": (saved("PNG"), "image/jpeg"),
    "a JPEG that says it is a PNG": (saved("JPEG"), "image/png"),
    "a RIFF that is no WebP": (b"RIFF\x00\x00\x00\x00WAVEfmt ", "image/webp"),
    "a PNG of its first bytes": (saved("PNG")[:20], "image/png"),
    "half a JPEG": (saved("JPEG")[:300], "image/jpeg"),
    "half a WebP": (saved("WEBP")[:30], "image/webp"),
    "a PNG that lost its middle": (png()[:60] + png()[-20:], "image/png"),
    "65 megapixels": (png_claiming(8200, 8200), "image/png"),
    "a decompression bomb": (png_claiming(100_000, 100_000), "image/png"),
    "no pixels": (png_claiming(0, 0), "image/png"),
    "negative pixels": (png_claiming(2**31, 2**31), "image/png"),
}


@pytest.mark.parametrize(("data", "type_"), BAD_PICTURES.values(), ids=BAD_PICTURES)
def test_what_is_no_sound_picture_is_an_image_failure(data: bytes, type_: str) -> None:
    for decode in (images.decode_picture, images.decode_mask):
        with pytest.raises(ImageError) as failure:
            decode(data, type_, "Image 0")
        assert failure.value.remedy


def test_a_decoder_is_not_started_for_another_format(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: opened.append(kwargs["formats"]) or 1 / 0)
    with pytest.raises(ImageError):
        images.decode_picture(saved("EPS"), "image/png", "Image 0")
    assert not opened
    with pytest.raises(ZeroDivisionError):
        images.decode_picture(b"\x89PNG\r\n\x1a\n", "image/png", "Image 0")
    assert opened == [("PNG",)]


def test_good_pictures_are_read_as_they_look() -> None:
    half = np.zeros((4, 4, 4), np.uint8)
    half[:, :2] = (255, 0, 0, 255)
    buffer = io.BytesIO()
    Image.fromarray(half).save(buffer, "PNG")
    read = images.decode_picture(buffer.getvalue(), "image/png", "Image 0")
    assert read[0, 0].tolist() == [255, 0, 0]
    assert read[0, 3].tolist() == [255, 255, 255], "transparency lies on white"
    deep = io.BytesIO()
    Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(deep, "PNG")
    assert images.decode_mask(deep.getvalue(), "image/png", "Image 0")[0, 0] == 127
    for format_, type_ in (("JPEG", "image/jpeg"), ("WEBP", "image/webp")):
        assert images.decode_picture(saved(format_), type_, "Image 0").shape == (6, 8, 3)


def test_pictures_of_a_request_have_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    from storydiffusion.server import protocol, work

    monkeypatch.setattr(work, "MAX_TOTAL_PIXELS", 3 * 64 * 64)
    story = generate(6)["story"]
    request = {
        "kind": "extend",
        "story": story,
        "panels": ["p6"],
        "pictures": [{"panel": f"p{i + 1}", "image": i} for i in range(4)],
    }
    asked = protocol.JOB_REQUEST.validate_json(json.dumps(request))
    with pytest.raises(ImageError, match="together"):
        work.work_of(asked, [Part("image/png", png())] * 4)


# Files -----------------------------------------------------------------------------------------------


def test_a_job_reads_and_writes_no_file_outside_the_package(server: Server, tmp_path: Path) -> None:
    """Seen by Python's audit hook: pictures larger than any spool stay in memory, no request opens a path."""
    touched: list[str] = []
    watching = [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if watching[0] and event == "open" and isinstance(arguments[0], str | bytes):
            touched.append(os.fsdecode(arguments[0]))

    ask(server, "POST", "/jobs", job_headers(1), [b"x"])  # what is imported late is imported now
    body = multipart(generate(1))
    ask(server, "POST", "/jobs", job_headers(len(body)), [body])
    sys.addaudithook(hook)
    try:
        noise = np.random.default_rng(0).integers(0, 255, (1200, 1200, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, "PNG")
        story = {**generate(1)["story"], "title": str(tmp_path), "negative_prompt": "/etc/passwd"}
        request = {"kind": "refine", "story": story, "panel": "p1", "image": 0, "plan": "none"}
        body = multipart(request, [buffer.getvalue()])
        assert len(body) > 3_000_000
        assert ask(server, "POST", "/jobs", job_headers(len(body)), [body])[0] == 202
    finally:
        watching[0] = False
    package = str(Path(images.__file__).parents[1].parent.parent)
    strange = [path for path in touched if not path.startswith((package, sys.prefix, sys.base_prefix))]
    assert not strange, strange


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("/home/mira/models/x.safetensors is damaged", "x.safetensors is damaged"),
        (r"C:\Users\Mira\models\x.safetensors is damaged", "x.safetensors is damaged"),
        ("‘x’ is not there: /srv/models/x.", "‘x’ is not there: x."),
        ("Use 8/16 or and/or", "Use 8/16 or and/or"),
        ("somebody/model is not pinned", "somebody/model is not pinned"),
    ],
)
def test_failures_name_files_and_not_folders(said: str, kept: str) -> None:
    from storydiffusion.errors import ModelError
    from storydiffusion.server.failures import failure_of

    assert failure_of(ModelError(said)).sentence == kept


# The process -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "token", "words"),
    [
        ([], "", "token"),
        ([], "short", "256 bits"),
        (["--bind", "0.0.0.0"], "", "token"),
        (["--bind", "example.com"], TOKEN, "address"),
        (["--bind", "192.0.2.1"], TOKEN, "cannot be used"),
        (["--allow-host", "studio"], TOKEN, "--bind"),
        (["--bind", "0.0.0.0", "--allow-host", "a b"], TOKEN, "name"),
        (["--port", "99999"], TOKEN, "cannot be used"),
        (["--model", "x"], TOKEN, "NAME=PATH"),
        (["--model", "../x=y"], TOKEN, "does not name"),
        (["--model", "x=/no/such/model"], TOKEN, "no model"),
    ],
)
def test_serve_refuses_to_start_with_a_sentence(
    arguments: list[str],
    token: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("STORYDIFFUSION_TOKEN", token)
    monkeypatch.setattr("storydiffusion.server.main._own_stdout", lambda: sys.stdout)
    monkeypatch.setattr("storydiffusion.server.main._Process", None)  # a server that would start is an error
    assert main(["serve", "--stay", *arguments]) == 1
    assert words in capfd.readouterr().err
    assert "STORYDIFFUSION_TOKEN" not in os.environ, "children would inherit the token"


def test_the_token_cannot_be_given_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["serve", "--token", TOKEN])
    assert stop.value.code == 2


def test_it_binds_to_this_machine_alone_unless_told(tmp_path: Path) -> None:
    with bind("127.0.0.1", 0) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"
        assert listening.getsockname()[1] > 0
    assert hosts_of(None, []) == ["127.0.0.1", "localhost", "[::1]"]
    assert hosts_of("0.0.0.0", []) == ["127.0.0.1", "localhost", "[::1]"], "every name would be let in"
    assert hosts_of("192.0.2.7", ["studio.local"])[3:] == ["192.0.2.7", "studio.local"]
    assert extra_models([f"mine={tmp_path}"]) == {"mine": tmp_path.resolve()}


@pytest.mark.parametrize("sent", [b"", b"Bearer t", b"Bearer " + TOKEN.encode(), b"Bearer " + b"x" * 9000])
def test_the_token_is_compared_in_constant_time(server: Server, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    """By hmac's own comparison, of two digests of one length whatever was sent."""
    compared: list[tuple[bytes, bytes]] = []
    monkeypatch.setattr(security.hmac, "compare_digest", lambda a, b: bool(compared.append((a, b))))
    assert ask(server, "GET", "/health", [GOOD[0], (b"authorization", sent)])[0] == 401
    assert [tuple(map(len, pair)) for pair in compared] == [(32, 32)]
