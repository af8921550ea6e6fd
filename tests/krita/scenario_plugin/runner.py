"""Runs one scenario inside Krita: a step a turn of the event loop, then writes what was seen, and quits.

A scenario is a generator. It yields seconds to wait, or an `Until`; everything it puts into `stage.saw`
is in the result. Which one it is says the environment: STORYDIFFUSION_SCENARIO is `file.py:function`.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from krita import Krita

from .qt import QtCore, QtWidgets

TICK_MS = 40


@dataclass
class Until:
    """Waits until `true` says so; `what` is what did not happen, if it does not."""

    what: str
    true: Callable[[], Any]
    seconds: float = 20.0


Scenario = Generator[Any, Any, None]


@dataclass
class Stage:
    """What a scenario has at hand; with `stay`, Krita is not closed at its end."""

    folder: Path
    saw: dict[str, Any] = field(default_factory=dict)
    stay: bool = False

    @property
    def krita(self) -> Any:
        return Krita.instance()

    @property
    def window(self) -> Any:
        return self.krita.activeWindow()

    def action(self, name: str) -> None:
        """In a later turn: a dialog that it opens must not hold up the scenario."""
        QtCore.QTimer.singleShot(0, self.krita.action(name).trigger)

    def click(self, widget: QtWidgets.QWidget, *more: str) -> None:
        """With the real mouse."""
        if not widget.isVisible() or not widget.isEnabled():
            raise AssertionError(f"{widget} cannot be clicked: visible {widget.isVisible()}, on {widget.isEnabled()}")
        area = widget.parentWidget()
        while area is not None and not isinstance(area, QtWidgets.QScrollArea):
            area = area.parentWidget()
        if area is not None:
            area.ensureWidgetVisible(widget)
        at = widget.mapToGlobal(widget.rect().center())
        xdotool("mousemove", str(at.x()), str(at.y()), "click", "1", *more)

    def press(self, keys: str) -> None:
        """With the real keyboard; no window manager gives the window its focus."""
        xdotool("windowfocus", str(int(self.window.qwindow().winId())), "key", keys)

    def screenshot(self, name: str) -> None:
        QtWidgets.QApplication.primaryScreen().grabWindow(0).save(str(self.folder / f"{name}.png"))


def xdotool(*words: str) -> None:
    subprocess.run(["xdotool", *words], check=True, timeout=10, capture_output=True)


class Runner(QtCore.QObject):
    def __init__(self) -> None:
        super().__init__()
        self._stage = Stage(Path(os.environ["STORYDIFFUSION_STAGE"]))
        self._mistakes: list[str] = []
        self._told = 0
        self._steps: Scenario | None = None
        self._wait: Until | None = None
        self._until, self._ended = 0.0, False
        sys.excepthook = self._mistake  # else Krita opens a dialog
        self._timer = QtCore.QTimer(self)
        self._timer.setInterval(TICK_MS)
        self._timer.timeout.connect(self._tick)
        self._notifier = Krita.instance().notifier()
        self._notifier.setActive(True)
        self._notifier.windowCreated.connect(self._begin)

    def _begin(self) -> None:
        if self._steps is None and "STORYDIFFUSION_SCENARIO" in os.environ:
            file, _, name = os.environ["STORYDIFFUSION_SCENARIO"].rpartition(":")
            sys.path.insert(0, str(Path(file).parent))
            Krita.instance().setBatchmode(True)
            self._steps = runpy.run_path(file)[name](self._stage)
            self._timer.start()

    def _mistake(self, *error: Any) -> None:
        self._mistakes.append("".join(traceback.format_exception(*error)))

    def _tick(self) -> None:
        """A nested event loop of a dialog comes here too."""
        wait, steps = self._wait, self._steps
        if self._ended or steps is None:
            return
        try:
            late, happened = time.monotonic() > self._until, wait is not None and wait.true()
            if not late and not happened and len(self._mistakes) == self._told:
                return
            if len(self._mistakes) > self._told:
                self._told = len(self._mistakes)
                asked = steps.throw(AssertionError(self._mistakes[-1]))
            elif wait is None or happened:
                asked = next(steps)
            else:
                asked = steps.throw(TimeoutError(f"{wait.what}: not within {wait.seconds:g} s"))
            self._wait = asked if isinstance(asked, Until) else None
            self._until = time.monotonic() + (asked.seconds if isinstance(asked, Until) else float(asked))
        except StopIteration:
            self._end("")
        except BaseException:
            self._end(traceback.format_exc())

    def _end(self, failure: str) -> None:
        self._ended = True
        self._timer.stop()
        if failure:
            self._stage.screenshot("failure")
        result = {"failure": failure, "mistakes": self._mistakes, "saw": self._stage.saw}
        draft = self._stage.folder / "result.new"
        draft.write_text(json.dumps(result, indent=1, default=str), encoding="utf-8")
        os.replace(draft, self._stage.folder / "result.json")
        if self._stage.stay:
            return
        for document in Krita.instance().documents():
            document.waitForDone()
            document.setModified(False)
        QtCore.QTimer.singleShot(100, Krita.instance().action("file_quit").trigger)


_runner: Runner | None = None


def begin() -> None:
    global _runner
    _runner = Runner()
