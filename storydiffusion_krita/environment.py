"""The backend's private Python environment: made, kept up to date. No Qt, no Krita."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .client import Failure
from .texts import tr

PYTHON = (3, 10)
TOKEN_VARIABLE = "STORYDIFFUSION_TOKEN"
COMMAND_VARIABLE = "STORYDIFFUSION_COMMAND"

#: brings a call to the thread that owns the docker
Post = Callable[[Callable[[], None]], None]


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
                              creationflags=no_window()).returncode == 0:  # fmt: skip
                return command
    return None


def no_window() -> int:
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
            creationflags=no_window(),
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
