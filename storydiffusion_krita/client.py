"""HTTP to the backend: blocking calls, for worker threads. No Qt, no Krita."""

from __future__ import annotations

import http.client
import io
import json
import secrets
import ssl
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from .texts import tr

#: what this plugin understands; the backend says its own at /health
PROTOCOL = 1
TIMEOUT_SECONDS = 30.0
#: the server sends a comment every 10 s: a stream that is silent for longer is dead
STREAM_TIMEOUT_SECONDS = 25.0


class Failure(Exception):
    """What went wrong: `kind` for programs, `sentence` for the artist, `remedy` for what to do."""

    def __init__(self, kind: str, sentence: str, remedy: str = "") -> None:
        super().__init__(f"{sentence} {remedy}".strip())
        self.kind, self.sentence, self.remedy = kind, sentence, remedy


class Unreachable(Failure):
    """Nobody answered; the same request may be sent again."""

    def __init__(self) -> None:
        super().__init__("unreachable", tr("The backend does not answer."), tr("Check that it runs, and its address."))


@dataclass(frozen=True)
class Address:
    """Where a backend listens, and the token that opens it."""

    host: str
    port: int
    token: str
    secure: bool = False

    @property
    def local(self) -> bool:
        return self.host in ("127.0.0.1", "localhost", "::1")


def parse_address(text: str, token: str) -> Address:
    """`http://127.0.0.1:8765`, `localhost:8765`, ….

    Raises:
        Failure: it is no address, or the token cannot be one.
    """
    text = text.strip()
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 0)
    except ValueError:
        host, port, parts = "", 0, urlsplit("")
    if not host or not port or parts.scheme not in ("http", "https"):
        raise Failure(
            "address",
            tr("“{text}” is not the address of a backend.", text=text[:60]),
            tr("Write it as 127.0.0.1:8765: a machine and a port."),
        )
    if not token.isascii() or not token.strip().isprintable() or not token.strip():
        raise Failure("address", tr("The backend's token is missing."), tr("It is the one that the backend was given."))
    return Address(host, port, token.strip(), parts.scheme == "https")


@dataclass(frozen=True)
class Event:
    """One server-sent event."""

    id: str
    kind: str
    data: dict[str, Any]


def parse_events(lines: Iterable[bytes]) -> Iterator[Event]:
    """Events from a stream's lines, as the HTML standard (9.2) has them; comments are skipped."""
    name, last_id = "", ""
    data: list[str] = []
    for raw in lines:
        line = raw.decode("utf-8", "replace").rstrip("\r\n")
        if not line:
            if data:
                try:
                    content = json.loads("\n".join(data))
                except ValueError:
                    content = None
                if isinstance(content, dict):
                    yield Event(last_id, name or str(content.get("event", "")), content)
            name, data = "", []
            continue
        field, _, value = line.partition(":")
        value = value[1:] if value.startswith(" ") else value
        if field == "id":
            last_id = value
        elif field == "event":
            name = value
        elif field == "data":
            data.append(value)


@dataclass(frozen=True)
class Made:
    """A panel of a result: its picture as PNG bytes. Of a film: the file."""

    panel: str
    png: bytes
    seed: int


class Client:
    """A backend at an address. Every method may be called from any thread, and blocks."""

    def __init__(self, address: Address, timeout: float = TIMEOUT_SECONDS) -> None:
        self.address, self.timeout = address, timeout

    def health(self, timeout: float = 5.0) -> dict[str, Any]:
        """Raises Failure, as every method: also where it is not a backend or one of another version."""
        told = self._json("GET", "/health", timeout=timeout)
        if not isinstance(told, dict) or "protocol" not in told:
            raise Failure("address", tr("Something else listens at this address."), tr("Check the port."))
        if told["protocol"] != PROTOCOL:
            raise Failure(
                "version",
                tr("Backend and plugin are of different versions."),
                tr("Update the older one: the backend says {version}.", version=told.get("version", "?")),
            )
        return told

    def models(self) -> list[dict[str, Any]]:
        models: list[dict[str, Any]] = self._json("GET", "/models", timeout=120.0)["models"]
        return models

    def submit(self, request: dict[str, Any], images: Sequence[bytes], key: str) -> str:
        """Queues a job, or finds the one that has this key; its id."""
        boundary = secrets.token_hex(16)
        body = multipart(request, images, boundary)
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}", "Idempotency-Key": key}
        return str(self._json("POST", "/jobs", body, headers, timeout=120.0)["id"])

    def cancel(self, job: str) -> None:
        self._ask("POST", f"/jobs/{job}/cancel")

    def forget(self, job: str) -> None:
        self._ask("DELETE", f"/jobs/{job}")

    def result(self, job: str) -> list[Made]:
        content = self._ask("GET", f"/jobs/{job}/result", timeout=300.0)
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                index = json.loads(archive.read("result.json"))
                return [Made(one["panel"], archive.read(one["file"]), one["seed"]) for one in index["panels"]]
        except (zipfile.BadZipFile, KeyError, ValueError, TypeError) as error:
            raise Failure("result", tr("The result arrived damaged."), tr("Make it again.")) from error

    def events(self, last_id: str = "") -> Iterator[Event]:
        """What all jobs tell, after event `last_id`; ends with the stream.

        Raises:
            Unreachable: nobody there, or silent for longer than the server ever is.
        """
        connection = self._connection(STREAM_TIMEOUT_SECONDS)
        headers = {**self._headers(), **({"Last-Event-ID": last_id} if last_id else {})}
        try:
            connection.request("GET", "/events", headers=headers)
            response = connection.getresponse()
            if response.status != 200:
                raise _failure(response.status, response.read())
            yield from parse_events(response)
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable from error
        finally:
            connection.close()

    def _json(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None,
              timeout: float = 0.0) -> Any:  # fmt: skip
        try:
            return json.loads(self._ask(method, path, body, headers, timeout))
        except ValueError as error:
            raise Failure("address", tr("Something else listens at this address."), tr("Check the port.")) from error

    def _ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None,
             timeout: float = 0.0) -> bytes:  # fmt: skip
        connection = self._connection(timeout or self.timeout)
        try:
            connection.request(method, path, body, {**self._headers(), **(headers or {})})
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable from error
        finally:
            connection.close()
        if response.status >= 300:
            raise _failure(response.status, content)
        return content

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        # straight to the address: a proxy has no business with an unfinished story
        if self.address.secure:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(self.address.host, self.address.port, timeout=timeout, context=context)
        return http.client.HTTPConnection(self.address.host, self.address.port, timeout=timeout)

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.address.token}"}


def multipart(request: dict[str, Any], images: Sequence[bytes], boundary: str) -> bytes:
    """A job as it travels: `request`, then the pictures it names by index."""
    head = 'Content-Disposition: form-data; name="{}"; filename="{}"\r\nContent-Type: {}\r\n\r\n'
    parts = [head.format("request", "request.json", "application/json").encode() + json.dumps(request).encode()]
    for index, image in enumerate(images):
        kind = "image/png" if image.startswith(b"\x89PNG") else "image/jpeg"
        parts.append(head.format("images", index, kind).encode() + image)
    return b"".join(f"--{boundary}\r\n".encode() + part + b"\r\n" for part in parts) + f"--{boundary}--\r\n".encode()


def _failure(status: int, content: bytes) -> Failure:
    """What the backend said, or what its status means where it said nothing that can be read."""
    try:
        told = json.loads(content)
        return Failure(told["kind"], told["sentence"], told.get("remedy", ""))
    except (ValueError, KeyError, TypeError):
        return Failure("error", tr("The backend refused this (HTTP {status}).", status=status))
