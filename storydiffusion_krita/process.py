"""The backend's process: started, told apart from one that does not start, ended. No Qt, no Krita."""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from .client import Address
from .environment import TOKEN_VARIABLE, Post, child_environment, no_window
from .texts import tr

#: seconds that a start may take: the first one after an install compiles every module
START_SECONDS = 180.0


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
                    creationflags=no_window(),
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
