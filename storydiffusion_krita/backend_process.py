"""The backend's life: found, installed, started, watched, started again. No Qt, no Krita.

`Backend` is a state machine. Everything slow runs in threads of its own and comes back through `post`;
all methods are called on the thread that `post` brings things to.

    absent -> installing -> starting -> ready -> (ended) -> starting …
    connecting -> ready -> lost -> connecting …               with an address
    any -> failed                                             with a sentence and a remedy
"""

from __future__ import annotations

import contextlib
import os
import shlex
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .client import Address, Client, Failure, parse_address
from .environment import COMMAND_VARIABLE, Environment, Installation, Post
from .process import Process
from .texts import tr

#: so many ends within so many seconds, and it is not started again by itself
MAX_ENDS, ENDS_SECONDS = 3, 120.0
RETRY_SECONDS = 1.0


@dataclass(frozen=True)
class Status:
    """The status line: `action` is what its button does: 'install', 'update', 'start', 'stop_install', ''."""

    state: str
    text: str
    remedy: str = ""
    action: str = ""
    fraction: float | None = None


class Backend:
    """The one backend that the docker talks to.

    `changed` is told of every new `status`; `connected` of a client that answers, or None when it went.
    """

    def __init__(
        self,
        environment: Environment,
        post: Post,
        start: Callable[..., Any] = Process,
        install: Callable[..., Any] = Installation,
        make_client: Callable[[Address], Client] = Client,
        clock: Callable[[], float] = time.monotonic,
        later: Callable[[float, Callable[[], None]], None] | None = None,
        command: Sequence[str] | None = None,
    ) -> None:
        self.environment = environment
        self.device = "cpu"
        self.changed: Callable[[Status], None] = lambda status: None
        self.connected: Callable[[Client | None], None] = lambda client: None
        self.status = Status("absent", "")
        self.health: dict[str, Any] = {}
        self._post, self._start, self._install, self._make_client = post, start, install, make_client
        self._clock = clock
        self._later = later or (lambda seconds, call: _later(seconds, call, post))
        self._given = list(command) if command is not None else shlex.split(os.environ.get(COMMAND_VARIABLE, ""))
        self._process: Any = None
        self._installation: Any = None
        self._address: Address | None = None
        self._remote = False
        self._round = 0
        self._ends: list[float] = []
        self._asking = False

    @property
    def log(self) -> Path:
        if self.status.state in ("installing", "failed") and self.status.action in ("install", "stop_install"):
            return self.environment.log
        return self.environment.folder / "backend.log"

    def log_text(self, size: int = 20_000) -> str:
        """The end of the log that belongs to what is going on."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - size))
                return file.read().decode("utf-8", "replace")
        except OSError:
            return ""

    # ----------------------------------------------------------------------- what is asked for

    def begin(self, device: str, remote: str = "", token: str = "") -> None:
        """Starts what there is: a remote backend, the one installed here, or nothing yet."""
        self.end()
        self.device, self._ends = device, []
        if remote:
            self._connect_to(remote, token)
        elif self._given or self.environment.installed() is not None:
            self.start()
        else:
            self._say(Status("absent", tr("The backend is not installed yet."), "", "install"))

    def install(self) -> None:
        """Installs or updates the backend here, then starts it."""
        self.end()
        self._round += 1
        self._say(Status("installing", tr("Preparing the installation"), "", "stop_install", 0.0))
        self._installation = self._install(
            self.environment, self.device, self._post, self._install_progress, self._installed
        )

    def start(self) -> None:
        self.end()
        self._round += 1
        command = self._given or self.environment.command()
        self._say(Status("starting", tr("The backend is starting")))
        log = self.environment.folder / "backend.log"
        self._process = self._start(command, log, self._post, self._ready, self._ended)

    def restart(self) -> None:
        """By hand: earlier ends do not count."""
        self._ends = []
        if self._remote and self._address is not None:
            self._check(self._address)
        else:
            self.start()

    def end(self) -> None:
        """Ends whatever runs, at once."""
        self._round += 1
        for one in (self._process, self._installation):
            if one is not None:
                one.stop()
        was_connected = self.status.state == "ready"
        self._process = self._installation = None
        self._remote = False
        if was_connected:
            self.connected(None)

    # ----------------------------------------------------------------------- what happened

    def _install_progress(self, text: str, fraction: float) -> None:
        self._say(Status("installing", text, "", "stop_install", fraction))

    def _installed(self, failure: Failure | None) -> None:
        self._installation = None
        if failure is None:
            self._ends = []
            self.start()
        else:
            self._say(Status("failed", failure.sentence, failure.remedy, "install"))

    def stop_install(self) -> None:
        self.end()
        self._say(Status("absent", tr("The installation was stopped; it can go on later."), "", "install"))

    def _ready(self, address: Address) -> None:
        self._address = address
        self._check(address)

    def _ended(self, why: str) -> None:
        self._process = None
        now = self._clock()
        self._ends = [at for at in self._ends if now - at < ENDS_SECONDS] + [now]
        if self.status.state == "ready":
            self.connected(None)
        never_ready = self.status.state == "starting" and len(self._ends) > 1
        if never_ready or len(self._ends) > MAX_ENDS:
            text = tr("The backend ends by itself: {why}", why=why or tr("it does not say why"))
            remedy = tr("See the log. Starting it again, or installing it again, may help.")
            self._say(Status("failed", text, remedy, "start"))
            return
        self._say(Status("restarting", tr("The backend ended and is being restarted")))
        this_round = self._round
        self._later(RETRY_SECONDS / 2, lambda: self.start() if this_round == self._round else None)

    def _connect_to(self, remote: str, token: str) -> None:
        try:
            self._address = parse_address(remote, token)
        except Failure as failure:
            self._say(Status("failed", failure.sentence, failure.remedy))
            return
        self._remote = True
        self._say(Status("connecting", tr("Connecting to {host}", host=f"{self._address.host}:{self._address.port}")))
        self._check(self._address)

    def _check(self, address: Address) -> None:
        """Asks the backend whether it is one, in a thread."""
        this_round, client = self._round, self._make_client(address)

        def ask() -> None:
            failure: Failure | None = None
            told: dict[str, Any] = {}
            try:
                told = client.health()
            except Failure as error:
                failure = error
            self._post(lambda: self._checked(this_round, client, told, failure))

        threading.Thread(target=ask, name="storydiffusion health", daemon=True).start()

    def _checked(self, this_round: int, client: Client, told: dict[str, Any], failure: Failure | None) -> None:
        if this_round != self._round:
            return
        if failure is None:
            self.health = told
            self._say(self._ready_status())
            self.connected(client)
            return
        if failure.kind == "unreachable":
            if not self._remote and self._process is None:
                return  # it ended, and is being started again
            self._say(Status("lost", failure.sentence, failure.remedy if self._remote else tr("Asking again.")))
            address = self._address
            self._later(
                2 * RETRY_SECONDS, lambda: self._check(address) if address and this_round == self._round else None
            )
        elif failure.kind == "version" and not self._remote:
            self._say(Status("failed", failure.sentence, failure.remedy, "update"))
        else:
            self._say(Status("failed", failure.sentence, failure.remedy, "start"))

    def lost(self) -> None:
        """A request got no answer. A process here is watched anyway; one elsewhere is asked again."""
        if self.status.state == "ready" and self._address is not None:
            self.connected(None)
            if self._remote:
                self._say(Status("lost", tr("The connection to the backend broke."), tr("Trying again.")))
            else:
                self._say(Status("lost", tr("The backend does not answer."), tr("Asking again.")))
            self._check(self._address)

    def refresh(self) -> None:
        """Asks for the health again, to show device and model once they are known."""
        if self.status.state != "ready" or self._address is None or self._asking:
            return
        self._asking = True
        client, this_round = self._make_client(self._address), self._round

        def ask() -> None:
            told: dict[str, Any] = {}
            with contextlib.suppress(Failure):
                told = client.health()
            self._post(lambda: answer(told))

        def answer(told: dict[str, Any]) -> None:
            self._asking = False
            if told and this_round == self._round and self.status.state == "ready":
                self.health = told
                self._say(self._ready_status())

        threading.Thread(target=ask, name="storydiffusion health", daemon=True).start()

    def _ready_status(self) -> Status:
        devices = {"cuda": "GPU", "mps": "GPU", "cpu": "CPU"}
        parts = [devices.get(str(self.health.get("device")), ""), tr("ready")]
        if self._remote and self._address is not None:
            parts.insert(0, f"{self._address.host}:{self._address.port}")
            if not self._address.local and not self._address.secure:
                parts.append(tr("not encrypted"))
        elif not self._given and self.environment.outdated(self.device):
            return Status("ready", " · ".join(filter(None, parts)), tr("A newer backend came with it."), "update")
        return Status("ready", " · ".join(filter(None, parts)))

    def _say(self, status: Status) -> None:
        if status != self.status:
            self.status = status
            self.changed(status)


def _later(seconds: float, call: Callable[[], None], post: Post) -> None:
    timer = threading.Timer(seconds, lambda: post(call))
    timer.daemon = True
    timer.start()
