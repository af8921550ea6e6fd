"""The backend's life: found, installed, started, watched, started again. No Qt, no Krita.

`Backend` is a state machine. Everything slow runs in threads of its own and comes back through `post`;
all methods are called on the thread that `post` brings things to.

    absent -> installing -> starting -> ready -> (ended) -> starting …
    connecting -> ready -> lost -> connecting …               with an address
    any -> failed                                             with a sentence and a remedy
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .client import Address, Client, Failure, parse_address
from .texts import tr

#: seconds that a start may take: the first one after an install compiles every module
START_SECONDS = 180.0
#: so many ends within so many seconds, and it is not started again by itself
MAX_ENDS, ENDS_SECONDS = 3, 120.0
RETRY_SECONDS = 1.0
PYTHON = (3, 10)
TOKEN_VARIABLE = "STORYDIFFUSION_TOKEN"
COMMAND_VARIABLE = "STORYDIFFUSION_COMMAND"

Post = Callable[[Callable[[], None]], None]


# --------------------------------------------------------------------------- the environment


def child_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process' environment without what Krita put in for its own Python and libraries."""
    given = dict(os.environ if environment is None else environment)
    for name in ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "QT_PLUGIN_PATH", COMMAND_VARIABLE, TOKEN_VARIABLE):
        given.pop(name, None)
    if "APPIMAGE" in given:  # its libraries are older or newer than those the child is linked to
        given.pop("LD_LIBRARY_PATH", None)
        given.pop("LD_PRELOAD", None)
    given["PYTHONUNBUFFERED"] = "1"
    return given


def torch_source(device: str, platform: str = sys.platform) -> list[str]:
    """Options for pip and uv that choose the build of PyTorch.

    PyPI has the CUDA build for Linux, the CPU build for Windows and the MPS build for macOS.
    """
    index = {"cpu": "cpu", "cuda": "cu130", "rocm": "rocm7.2"}.get(device, "")
    on_pypi = {"linux": "cuda", "win32": "cpu", "darwin": "mps"}.get(platform)
    if device == on_pypi or not index or platform == "darwin":
        return []
    return ["--extra-index-url", f"https://download.pytorch.org/whl/{index}"]


@dataclass(frozen=True)
class Step:
    """One command of an installation; `done` says that an earlier try got past it."""

    title: str
    command: tuple[str, ...]
    done: bool = False


class Environment:
    """A private Python environment in the user's data folder, made from the wheel that the plugin carries.

    Args:
        folder: the user's data folder.
        wheels: where the plugin's wheel lies.
    """

    def __init__(self, folder: Path, wheels: Path) -> None:
        self.folder, self.wheels = folder, wheels
        self.path = folder / "environment"
        self.marker = self.path / "storydiffusion.json"
        self.log = folder / "install.log"

    @property
    def python(self) -> Path:
        return self.path / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")

    @property
    def wheel(self) -> Path | None:
        return max(self.wheels.glob("storydiffusion-*.whl"), default=None, key=lambda path: path.stat().st_mtime)

    def stamp(self, device: str) -> dict[str, str]:
        """What an installation of this wheel for this device is marked with."""
        wheel = self.wheel
        content = hashlib.sha256(wheel.read_bytes()).hexdigest() if wheel is not None else ""
        return {"wheel": content, "device": device}

    def installed(self) -> dict[str, str] | None:
        """The mark of a finished installation, None where there is none."""
        try:
            mark = json.loads(self.marker.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return mark if isinstance(mark, dict) and self.python.exists() else None

    def outdated(self, device: str) -> bool:
        """Whether the plugin carries another backend than the one installed, or for another device."""
        mark = self.installed()
        return mark is not None and self.wheel is not None and mark != self.stamp(device)

    def steps(self, device: str, uv: str | None, python: Sequence[str] | None) -> list[Step]:
        """What an installation runs, in order.

        Raises:
            Failure: the plugin carries no wheel, or there is neither uv nor a Python that is new enough.
        """
        wheel = self.wheel
        if wheel is None:
            raise Failure(
                "install",
                tr("This plugin was installed without its backend."),
                tr("Import the plugin's zip again, or connect to a running backend."),
            )
        made = self.python.exists()
        if uv:
            create: tuple[str, ...] = (uv, "venv", "--python", ">=3.10,<3.14", str(self.path))
            install: tuple[str, ...] = (uv, "pip", "install", "--python", str(self.python))
            # both indexes count: the other libraries of PyTorch's index are old
            more: tuple[str, ...] = ("--index-strategy", "unsafe-best-match")
        elif python:
            create = (*python, "-m", "venv", str(self.path))
            install = (str(self.python), "-m", "pip", "install", "--no-input", "--disable-pip-version-check")
            more = ()
        else:
            raise Failure(
                "install",
                tr("Python 3.10 or newer was not found on this computer."),
                tr("Install it from python.org, or uv from astral.sh, and press Install again."),
            )
        source = torch_source(device)
        libraries = [*install, *(more if source else ()), *source, str(wheel)]
        if (self.installed() or {}).get("device", device) != device:  # the other build has the same version
            libraries += ["--reinstall-package", "torch"] if uv else ["--force-reinstall"]
        fresh = ("--reinstall-package", "storydiffusion") if uv else ("--force-reinstall", "--no-deps")
        check = "import importlib.metadata as m; m.version('storydiffusion'); import torch"
        return [
            Step(tr("Making a Python environment"), create, made),
            Step(tr("Fetching PyTorch and the other libraries (2 to 6 GB)"), tuple(libraries)),
            Step(tr("Installing the backend"), (*install, *fresh, str(wheel))),
            Step(tr("Checking the installation"), (str(self.python), "-c", check)),
        ]

    def finish(self, device: str) -> None:
        """Marks the installation as whole: the last thing that happens."""
        draft = self.marker.with_suffix(".new")
        draft.write_text(json.dumps(self.stamp(device)), encoding="utf-8")
        os.replace(draft, self.marker)

    def command(self) -> list[str]:
        return [str(self.python), "-m", "storydiffusion.cli"]


def find_uv() -> str | None:
    home = Path.home()
    places = [home / ".local/bin/uv", home / ".cargo/bin/uv", Path("/opt/homebrew/bin/uv"), Path("/usr/local/bin/uv")]
    return shutil.which("uv") or next((str(path) for path in places if path.is_file()), None)


def find_python() -> list[str] | None:
    """A command for a Python that is new enough and can make environments; Krita's own cannot."""
    names = [["py", f"-3.{minor}"] for minor in (13, 12, 11, 10)] if sys.platform == "win32" else []
    names += [[f"python3.{minor}"] for minor in (13, 12, 11, 10)] + [["python3"], ["python"]]
    check = f"import sys, venv, ensurepip; sys.exit(not {PYTHON} <= sys.version_info[:2] <= (3, 13))"
    for name in names:
        found = shutil.which(name[0])
        if not found:
            continue
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = [found, *name[1:]]
            if subprocess.run([*command, "-c", check], env=child_environment(), timeout=20, capture_output=True,
                              creationflags=_flags()).returncode == 0:  # fmt: skip
                return command
    return None


def _flags() -> int:
    """No console window flashes up on Windows."""
    return getattr(subprocess, "CREATE_NO_WINDOW", 0)


class Installation:
    """Runs an environment's steps in a thread; a step that an earlier try finished is skipped.

    pip and uv keep what they fetched, so that an installation that broke goes on where it was.
    """

    def __init__(
        self,
        environment: Environment,
        device: str,
        post: Post,
        progress: Callable[[str, float], None],
        ended: Callable[[Failure | None], None],
        find: Callable[[], tuple[str | None, list[str] | None]] | None = None,
    ) -> None:
        self._environment, self._device, self._post = environment, device, post
        self._progress, self._ended = progress, ended
        self._find = find or (lambda: (uv, None) if (uv := find_uv()) else (None, find_python()))
        self._process: subprocess.Popen[str] | None = None
        self._stop = False
        threading.Thread(target=self._work, name="storydiffusion install", daemon=True).start()

    def stop(self) -> None:
        self._stop = True
        if self._process is not None:
            self._process.kill()

    def _work(self) -> None:
        failure: Failure | None = None
        try:
            self._run()
        except Failure as error:
            failure = error
        except OSError as error:
            failure = Failure(
                "install",
                tr("The backend could not be installed: {reason}.", reason=error.strerror or error),
                tr("Make room on the disk, check that you may write there, and press Install again."),
            )
        if not self._stop:
            self._post(lambda: self._ended(failure))

    def _run(self) -> None:
        environment = self._environment
        environment.folder.mkdir(parents=True, exist_ok=True)
        if environment.path.exists() and not environment.python.exists():
            shutil.rmtree(environment.path)  # an earlier try ended inside the very first step
        steps = environment.steps(self._device, *self._find())
        with environment.log.open("a", encoding="utf-8") as log:
            for number, step in enumerate(steps):
                if step.done:
                    continue
                self._say(step.title, number / len(steps))
                log.write(f"\n# {step.title}\n$ {shlex.join(step.command)}\n")
                log.flush()
                if self._command(step, log, number / len(steps)) != 0:
                    raise Failure(
                        "install",
                        tr("“{step}” did not work.", step=step.title),
                        tr("Check the network and the log, then press Install again: it goes on where it stopped."),
                    )
        environment.finish(self._device)

    def _command(self, step: Step, log: IO[str], fraction: float) -> int:
        if self._stop:
            return 1
        with subprocess.Popen(
            step.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=child_environment(),
            creationflags=_flags(),
        ) as process:
            self._process = process
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                log.flush()
                if found := re.match(r"\s*(?:Downloading|Collecting|Installing|Prepared|Building)\s+(\S+)", line):
                    name = found[1].split("/")[-1][:40]
                    self._say(f"{step.title}: {name}", fraction)
            return process.wait()

    def _say(self, text: str, fraction: float) -> None:
        if not self._stop:
            self._post(lambda: self._progress(text, fraction))


# --------------------------------------------------------------------------- a running process


class Process:
    """`storydiffusion serve`, as long as it lives. Its standard input is our sign of life: when Krita
    ends, however that happens, the pipe closes and the backend ends too."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        post: Post,
        ready: Callable[[Address], None],
        ended: Callable[[str], None],
        start_seconds: float = START_SECONDS,
    ) -> None:
        self._command, self._log, self._post = list(command), log, post
        self._ready, self._ended, self._start_seconds = ready, ended, start_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._stop = threading.Event()
        threading.Thread(target=self._work, name="storydiffusion backend", daemon=True).start()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def stop(self) -> None:
        """Ends it, without waiting: closing its input is enough, and a signal makes sure."""
        self._stop.set()
        process = self._process
        if process is not None:
            with contextlib.suppress(OSError):
                if process.stdin is not None:
                    process.stdin.close()
                process.terminate()

    def _work(self) -> None:
        token = secrets.token_urlsafe(32)
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("wb") as log:
                process = subprocess.Popen(
                    [*self._command, "serve"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env={**child_environment(), TOKEN_VARIABLE: token},
                    creationflags=_flags(),
                )
        except OSError as error:
            self._say_ended(tr("It cannot be started: {reason}.", reason=error.strerror or str(error)))
            return
        self._process = process
        if self._stop.is_set():  # asked to end before there was anything to end
            self.stop()
        late = threading.Timer(self._start_seconds, process.kill)
        late.daemon = True
        late.start()
        assert process.stdout is not None
        port = _ready_port(process.stdout.readline())
        late.cancel()
        if port is None:
            process.kill()
        elif not self._stop.is_set():
            address = Address("127.0.0.1", port, token)
            self._post(lambda: None if self._stop.is_set() else self._ready(address))
        process.wait()
        process.stdout.close()
        self._say_ended(self._last_words())

    def _say_ended(self, why: str) -> None:
        if not self._stop.is_set():
            self._post(lambda: None if self._stop.is_set() else self._ended(why))

    def _last_words(self) -> str:
        """The last line of the log: of a traceback, the one that names the mistake."""
        try:
            lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def _ready_port(line: bytes) -> int | None:
    try:
        told = json.loads(line)
        return int(told["port"])
    except (ValueError, KeyError, TypeError):
        return None


# --------------------------------------------------------------------------- the state machine


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
