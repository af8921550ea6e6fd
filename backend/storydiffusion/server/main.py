"""The process: `storydiffusion serve`.

It says one line on standard output, `{"port": N}`, when it can be asked; everything else goes to standard
error. The token never appears on a command line, where every user of the machine could read it.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import uvicorn

from storydiffusion.errors import ModelError, StoryDiffusionError
from storydiffusion.server.app import Server
from storydiffusion.server.engine import Engine
from storydiffusion.server.parent import follow
from storydiffusion.server.security import LOOPBACK, check_token

TOKEN_VARIABLE = "STORYDIFFUSION_TOKEN"
LOG = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "plain", "stream": "ext://sys.stderr"}},
    "root": {"handlers": ["stderr"], "level": "INFO"},
}


def serve(args: argparse.Namespace) -> None:
    """Runs the backend until it is told to end, or its parent has ended.

    Raises:
        StoryDiffusionError: no token, or a wrong address, port, name or model.
    """
    parent = os.getppid() if args.parent is None else args.parent
    ready = _own_stdout()
    token = read_token(args.token_stdin)
    hosts = hosts_of(args.bind, args.allow_host)
    engine = Engine(extra_models(args.model))
    listening = bind(args.bind or "127.0.0.1", args.port)
    server = Server(token, engine, hosts=hosts)
    if not args.stay:
        # nothing is on disk and nothing is owed to anybody: the shortest way out is the safest
        follow(parent, lambda: os._exit(0))
    try:
        _Process(server, listening, ready).run(sockets=[listening])
    finally:
        server.close()
        server.jobs.join(seconds=5)  # the interpreter must not end under a running step


def read_token(from_stdin: bool) -> str:
    """The token, taken out of the environment so that no child of this process has it.

    Raises:
        StoryDiffusionError: there is none, or it is too short.
    """
    given = os.environ.pop(TOKEN_VARIABLE, "")
    # byte by byte: what follows the line is not ours to swallow
    return check_token(_first_line(0) if from_stdin else given)


def _first_line(descriptor: int) -> str:
    line = b""
    while len(line) < 1024 and (byte := os.read(descriptor, 1)) not in (b"", b"\n"):
        line += byte
    return line.decode("ascii", "replace").strip()


def hosts_of(bind_to: str | None, allowed: Sequence[str]) -> list[str]:
    """The names that Host may hold.

    Raises:
        StoryDiffusionError: a name was allowed without --bind, or cannot be a name.
    """
    if allowed and not bind_to:
        raise StoryDiffusionError("--allow-host goes with --bind.", "Leave it out: 127.0.0.1 is always allowed.")
    for name in allowed:
        if not re.fullmatch(r"[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]+\]", name):
            raise StoryDiffusionError(f"“{name}” is not the name of a machine.", "Give it without port.")
    address = ipaddress_of(bind_to) if bind_to else None
    own = [] if address is None or address.is_unspecified else [_in_host(address)]
    return [*LOOPBACK, *own, *allowed]


def ipaddress_of(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address(text)
    except ValueError as error:
        raise StoryDiffusionError(f"“{text}” is not an address.", "Use one of this machine's, or 0.0.0.0.") from error


def _in_host(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    return f"[{address}]" if address.version == 6 else str(address)


def extra_models(named: Sequence[str]) -> dict[str, Path]:
    """`NAME=PATH` each.

    Raises:
        ModelError: not of that form, or nothing is there.
    """
    models: dict[str, Path] = {}
    for one in named:
        name, _, path = one.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) or not path:
            raise ModelError(f"“{one}” does not name a model.", "Write --model NAME=PATH.")
        if not Path(path).exists():
            raise ModelError(f"There is no model at {path}.", "Check the path.")
        models[name] = Path(path).resolve()
    return models


def bind(address: str, port: int) -> socket.socket:
    """A listening socket; port 0 lets the system choose.

    Raises:
        StoryDiffusionError: the address is not this machine's, or the port is taken.
    """
    family = socket.AF_INET6 if ipaddress_of(address).version == 6 else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        if sys.platform == "win32":  # there SO_REUSEADDR would let another program take the port over
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((address, port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise StoryDiffusionError(
            f"Port {port} of {address} cannot be used: {error}.", "Leave --port out, or use another."
        ) from error
    return listening


def _own_stdout() -> TextIO:
    """Standard output for the ready line alone; what libraries print goes to standard error."""
    sys.stdout.flush()
    ready = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return ready


class _Process(uvicorn.Server):
    """uvicorn, told to say the ready line and to end its streams before it waits for them."""

    def __init__(self, server: Server, listening: socket.socket, ready: TextIO) -> None:
        super().__init__(
            uvicorn.Config(
                server.app,
                http="h11",
                ws="none",
                lifespan="on",
                log_config=LOG,
                access_log=False,
                proxy_headers=False,  # nobody may say who they are
                server_header=False,
                timeout_graceful_shutdown=2,
            )
        )
        self.served, self.listening, self.ready = server, listening, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.ready.write(json.dumps({"port": self.listening.getsockname()[1]}) + "\n")
            self.ready.close()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.served.close()
        await super().shutdown(sockets)
