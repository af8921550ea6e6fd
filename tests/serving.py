"""A real server on a free port with a tiny model, and a client that uses the standard library alone."""

from __future__ import annotations

import http.client
import io
import json
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from PIL import Image

from storydiffusion.server.app import Server
from storydiffusion.server.engine import Engine
from storydiffusion.server.jobs import Report, Run
from storydiffusion.server.work import Pixels, Work
from tiny import tiny_motion, tiny_sd15

TOKEN = "t" * 42 + "-"
BOUNDARY = "boundary-of-parts"


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Told:
    id: str
    event: str
    data: dict[str, Any]


@dataclass
class Client:
    port: int
    token: str = TOKEN
    timeout: float = 20.0

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.timeout)
        try:
            connection.request(method, path, body, {"Authorization": f"Bearer {self.token}", **(headers or {})})
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def get(self, path: str) -> Answer:
        return self.ask("GET", path)

    def post(self, path: str, content: Any = None) -> Answer:
        if content is None:
            return self.ask("POST", path)
        return self.ask("POST", path, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def submit(self, request: Any, images: Sequence[bytes] = (), key: str = "") -> Answer:
        headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        if key:
            headers["Idempotency-Key"] = key
        return self.ask("POST", "/jobs", multipart(request, images), headers)

    def events(self, path: str, last: str = "") -> Iterator[Told]:
        """Server-sent events until the server ends the stream or the caller stops."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.timeout)
        headers = {"Authorization": f"Bearer {self.token}", **({"Last-Event-ID": last} if last else {})}
        connection.request("GET", path, headers=headers)
        try:
            yield from parse_events(connection.getresponse())
        finally:
            connection.close()

    def until_over(self, job: str) -> list[Told]:
        return list(self.events(f"/jobs/{job}/events"))

    def result(self, job: str) -> tuple[dict[str, Any], dict[str, Pixels]]:
        answer = self.get(f"/jobs/{job}/result")
        assert answer.status == 200, answer.body
        return unpack(answer.body)


def parse_events(lines: Any) -> Iterator[Told]:
    fields: dict[str, str] = {}
    for raw in lines:
        line = raw.decode().rstrip("\n")
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        else:
            if "data" in fields:
                yield Told(fields["id"], fields["event"], json.loads(fields["data"]))
            fields = {}


def unpack(content: bytes) -> tuple[dict[str, Any], dict[str, Pixels]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        index = json.loads(archive.read("result.json"))
        return index, {
            p["panel"] if p["frame"] is None else p["file"]: np.array(Image.open(archive.open(p["file"])))
            for p in index["panels"]
        }


def multipart(request: Any, images: Sequence[bytes] = (), types: Sequence[str] = ()) -> bytes:
    text = request if isinstance(request, bytes) else json.dumps(request).encode()
    parts = [b'Content-Disposition: form-data; name="request"\r\nContent-Type: application/json\r\n\r\n' + text]
    for i, image in enumerate(images):
        type_ = types[i] if types else "image/png"
        head = f'Content-Disposition: form-data; name="images"; filename="{i}"\r\nContent-Type: {type_}\r\n\r\n'
        parts.append(head.encode() + image)
    joined = b"".join(b"--" + BOUNDARY.encode() + b"\r\n" + part + b"\r\n" for part in parts)
    return joined + b"--" + BOUNDARY.encode() + b"--\r\n"


def png(color: tuple[int, int, int] = (200, 30, 40), size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def mask_png(size: int = 64) -> bytes:
    """White in the left half."""
    pixels = np.zeros((size, size), np.uint8)
    pixels[:, : size // 2] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def story(panels: int = 2, **more: Any) -> dict[str, Any]:
    return {
        "title": "A test",
        "width": 64,
        "height": 64,
        "steps": 2,
        "seed": 3,
        "characters": [{"name": "Mira", "description": "a rabbit in a dress"}],
        "panels": [{"id": f"p{i + 1}", "prompt": f"[Mira] walks {i}"} for i in range(panels)],
        **more,
    }


def transition(frames: int = 5, *between: int, **more: Any) -> dict[str, Any]:
    """A stretch whose first, last and `between` frames are images 0, 1, 2 ..."""
    given = [0, frames - 1, *between]
    keyframes = [{"frame": frame, "image": image} for image, frame in enumerate(given)]
    return {"kind": "transition", "id": "p1-p2", "story": story(), "frames": frames, "keyframes": keyframes, **more}


def generate(panels: int = 2, **more: Any) -> dict[str, Any]:
    return {"kind": "generate", "story": story(panels), **more}


@dataclass
class Script:
    """A worker that does what a test says: waits at a gate, steps, fails."""

    gate: threading.Event = field(default_factory=threading.Event)
    began: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    seen: list[Work] = field(default_factory=list)

    def __call__(self, work: Work, report: Report, cancelled: Callable[[], bool]) -> list[Pixels]:
        from storydiffusion.errors import Cancelled

        self.seen.append(work)
        report.started(())
        self.began.set()
        while not self.gate.wait(0.002):
            if cancelled():
                raise Cancelled
        if self.error is not None:
            raise self.error
        for step in (1, 2, 3):
            report.step(work.panels, step, 3)
        return [np.full((8, 8, 3), i, np.uint8) for i in range(len(work.outputs))]


def tiny_engine() -> Engine:
    return Engine(open_model=lambda source, **_: tiny_sd15(), open_motion=lambda pipe, _: tiny_motion(pipe))


@contextmanager
def serving(run: Run | None = None, engine: Engine | None = None, **more: Any) -> Iterator[tuple[Client, Server]]:
    """A server in a thread; `run` replaces the engine's."""
    server = Server(TOKEN, engine or tiny_engine(), run=run, **more)
    listening = socket.create_server(("127.0.0.1", 0))
    process = uvicorn.Server(
        uvicorn.Config(
            server.app, http="h11", ws="none", log_level="critical", proxy_headers=False, timeout_graceful_shutdown=1
        )
    )
    thread = threading.Thread(target=process.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    wait_for(lambda: process.started)
    try:
        yield Client(listening.getsockname()[1]), server
    finally:
        server.close()
        process.should_exit = True
        thread.join(10)


def wait_for(true: Callable[[], Any], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.005)


def save_tiny(folder: Path) -> Path:
    """The tiny pipeline as a diffusers folder."""
    tiny_sd15().save_pretrained(folder, safe_serialization=True)
    return folder
