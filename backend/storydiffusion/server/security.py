"""Who may ask, and how much: asked of every request before any endpoint sees it.

The server listens where any program on the machine, and any web page open in a browser, can reach it.
So: a token that only its parent knows; no Host but its own names (a page that rebinds its DNS name to
127.0.0.1 keeps that name in Host); nothing that a browser sends (Origin, Sec-Fetch-*), allowed or not;
bodies of known types and sizes only, counted while they arrive.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from storydiffusion.errors import StoryDiffusionError
from storydiffusion.server.failures import Failure, Refused

#: 256 bits: 43 letters of base64url, or 64 of hex
TOKEN = re.compile(r"[A-Za-z0-9_-]{43,512}")
#: a tunnel may listen on any port of the client's machine, so the port of Host says nothing
HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9.-]{1,253})(?::[0-9]{1,5})?")
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

MAX_BODY = 256 * 1024 * 1024
MAX_JSON = 64 * 1024
_BOUNDARY = r"[A-Za-z0-9'()+_,./:=?-]{1,70}"
MULTIPART = re.compile(rf'multipart/form-data; ?boundary=(?:{_BOUNDARY}|"{_BOUNDARY}")', re.IGNORECASE)
JSON = re.compile(r"application/json(?:; ?charset=utf-8)?", re.IGNORECASE)


def check_token(token: str) -> str:
    """The token, if it can be one.

    Raises:
        StoryDiffusionError: it is missing, too short, or has letters that a header cannot carry.
    """
    if TOKEN.fullmatch(token):
        return token
    raise StoryDiffusionError(
        "The backend needs a token of 256 bits." if not token else "The token is no 256 bits in base64url or hex.",
        'Make one with: python -c "import secrets; print(secrets.token_urlsafe(32))" and give it as '
        "STORYDIFFUSION_TOKEN in the environment, or with --token-stdin.",
    )


class Guard:
    """ASGI middleware around the whole application.

    Args:
        app: what is guarded.
        token: what `Authorization: Bearer` must hold.
        hosts: names that Host may hold, without port.
        max_body: bytes of a multipart body.
    """

    def __init__(self, app: ASGIApp, token: str, hosts: Collection[str] = LOOPBACK, max_body: int = MAX_BODY) -> None:
        self.app = app
        self.digest = hashlib.sha256(check_token(token).encode()).digest()
        self.hosts = frozenset(host.lower() for host in hosts)
        self.max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no web sockets here
            await send({"type": "websocket.close", "code": 1008})
            return
        send = _hardened(send)
        try:
            headers = Headers(scope=scope)
            self._check_host(headers)
            _check_browser(headers)
            self._check_token(headers)
            limit = self._check_body(scope, headers)
        except Refused as refused:
            await answer(refused)(scope, receive, send)
            return
        await self.app(scope, _Counted(receive, limit), send)

    def _check_host(self, headers: Headers) -> None:
        sent = headers.getlist("host")
        match = HOST.fullmatch(sent[0]) if len(sent) == 1 else None
        if match is None or match["name"].lower() not in self.hosts:
            raise Refused(
                421,
                "forbidden",
                "This is not a name of this server.",
                "Ask for 127.0.0.1, or start it with --allow-host.",
            )

    def _check_token(self, headers: Headers) -> None:
        sent = headers.getlist("authorization")
        scheme, _, token = (sent[0] if len(sent) == 1 else "").partition(" ")
        # digests are of one length, so that the time this takes tells nothing
        same = hmac.compare_digest(hashlib.sha256(token.encode("utf-8", "replace")).digest(), self.digest)
        if not same or scheme.lower() != "bearer":
            raise Refused(401, "unauthorized", "The token is missing or wrong.", "Send the backend's own token.")

    def _check_body(self, scope: Scope, headers: Headers) -> int:
        """The most bytes the body may have."""
        sized = headers.get("content-length", "0")
        length = int(sized) if re.fullmatch(r"[0-9]{1,18}", sized) else self.max_body + 1
        if "transfer-encoding" not in headers and length == 0:
            return 0
        if headers.get("content-encoding", "identity") != "identity":
            raise Refused(415, "media_type", "The body is compressed.", "Send it as it is.")
        types = headers.getlist("content-type")
        type_ = types[0] if len(types) == 1 else ""
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            raise Refused(400, "request", f"{scope['method']} takes no body.", "Send none.")
        if scope["path"] == "/jobs" and MULTIPART.fullmatch(type_):
            limit = self.max_body
        elif scope["path"] != "/jobs" and JSON.fullmatch(type_):
            limit = MAX_JSON
        else:
            raise Refused(
                415, "media_type", "The body is of a type that is not taken here.", "See the API's description."
            )
        if length > limit:
            raise _too_large(limit)
        return limit


def _check_browser(headers: Headers) -> None:
    if any(name == "origin" or name.startswith("sec-fetch-") for name in headers.keys()):  # noqa: SIM118
        raise Refused(403, "forbidden", "Web pages may not use this server.", "Use the Krita plugin.")


def _too_large(limit: int) -> Refused:
    return Refused(
        413, "too_large", f"The request has more than {limit // 1024} KiB.", "Send fewer or smaller pictures."
    )


class _Counted:
    """`receive`, refusing at the byte that is one too many, whatever Content-Length said."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self.receive, self.left, self.limit = receive, limit, limit

    async def __call__(self) -> Message:
        message = await self.receive()
        if message["type"] == "http.request":
            self.left -= len(message.get("body", b""))
            if self.left < 0:
                raise _too_large(self.limit)
        return message


def _hardened(send: Send) -> Send:
    """Every answer: never kept, never sniffed, never a page."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [
                *message["headers"],
                (b"cache-control", b"no-store"),
                (b"x-content-type-options", b"nosniff"),
                (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
                (b"cross-origin-resource-policy", b"same-origin"),
            ]
        await send(message)

    return sending


def answer(refused: Refused) -> JSONResponse:
    """A refusal as it is sent."""
    headers = {"WWW-Authenticate": "Bearer"} if refused.status_code == 401 else {}
    if refused.status_code == 413:
        headers["Connection"] = "close"  # what is still coming is not read
    if refused.status_code == 429:
        headers["Retry-After"] = "2"
    failure: Failure = refused.failure
    return JSONResponse(failure.model_dump(), refused.status_code, headers)
