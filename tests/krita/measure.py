"""What our callbacks cost Krita's GUI thread: scenarios for `tests/benchmarks/krita.py`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator
from types import FrameType
from typing import Any

import scenarios
from storydiffusion_scenario.runner import Stage, Until

#: Krita's own work on pixels, counted by itself
PIXELS = {
    "setPixelData",
    "pixelData",
    "projectionPixelData",
    "refreshProjection",
    "waitForDone",
    "addChildNode",
    "thumbnail",
    "setVisible",
}


class Watch:
    """Times every call from Qt or Krita into the plugin, on this thread.

    `calls` are (name, seconds in all, seconds of it in Krita's work on pixels). The profiler that measures
    makes them slower than they are.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, float, float]] = []
        self._depth, self._ours, self._began = 0, "", 0.0
        self._pixels, self._called = 0.0, 0.0

    def __enter__(self) -> Watch:
        self.began = time.perf_counter()
        sys.setprofile(self._see)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)
        self.seconds = time.perf_counter() - self.began

    def _see(self, frame: FrameType, event: str, what: Any) -> None:
        if event == "call":
            if self._depth == 0:
                code = frame.f_code
                self._ours = (
                    getattr(code, "co_qualname", code.co_name) if "storydiffusion_krita/" in code.co_filename else ""
                )
                self._began, self._pixels = time.perf_counter(), 0.0
            self._depth += 1
        elif event == "return":
            self._depth = max(0, self._depth - 1)
            if self._depth == 0 and self._ours:
                self.calls.append((self._ours, time.perf_counter() - self._began, self._pixels))
        elif self._ours and getattr(what, "__name__", "") in PIXELS:
            if event == "c_call":
                self._called = time.perf_counter()
            else:
                self._pixels += time.perf_counter() - self._called


def _write(stage: Stage, size: int) -> Generator[Any, Any, Any]:
    yield from scenarios.arrange(stage)
    yield scenarios.ready(stage)
    document = stage.krita.createDocument(size, size, "story", "RGBA", "U8", "", 72.0)
    document.setBatchmode(True)
    stage.window.addView(document)
    yield Until("the docker to see the document", lambda: scenarios.docker().characters.isVisible(), 5)
    yield from scenarios.write_story(stage)


def arrivals(stage: Stage) -> Generator[Any, Any, Any]:
    """Four panels of 1024 x 1024 arrive; then nothing happens for a while."""
    yield from _write(stage, 1024)
    with Watch() as watch:
        yield from scenarios.generate(stage)
        yield scenarios.made(stage)
        yield 2
    stage.saw["arriving"] = watch.calls
    stage.saw["groups"] = len(scenarios.groups(stage.krita.activeDocument()))
    yield 3
    with Watch() as watch:
        yield 20
    stage.saw["idle"] = {"calls": watch.calls, "seconds": watch.seconds}


def overhead(stage: Stage) -> Generator[Any, Any, Any]:
    """The story made again and again: seconds from the click to the layers."""
    yield from _write(stage, 256)
    seconds = []
    for i in range(int(os.environ["STORYDIFFUSION_ROUNDS"]) + 1):
        began = time.monotonic()
        if i == 0:  # loads the model
            yield from scenarios.generate(stage)
        else:
            one = scenarios.controller(stage)
            one.generate(one.everything())
        yield scenarios.made(stage)
        seconds.append(time.monotonic() - began)
        yield 1
    stage.saw["seconds"] = seconds[1:]
    stage.saw["story"] = scenarios.controller(stage).story.seed


def resident() -> float:
    """Megabytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def soak(stage: Stage) -> Generator[Any, Any, Any]:
    """The first panel again and again, the take before it thrown away each time."""
    yield from _write(stage, 256)
    one, jobs = scenarios.controller(stage), int(os.environ["STORYDIFFUSION_ROUNDS"])
    panel, memory = one.story.panels[0], []
    for i in range(jobs):
        one.generate([panel.id], new_seeds=True)
        yield scenarios.made(stage)
        if len(panel.takes) > 1:
            one.choose_take(panel.id, -1)
            one.discard_take(panel.id)
        if (i + 1) % 10 == 0:
            yield 1
            memory.append(resident())
    stage.saw["memory"], stage.saw["takes"] = memory, len(panel.takes)


def layers_come_and_go(stage: Stage) -> Generator[Any, Any, Any]:
    """What Krita keeps of as many layers without us: of each job a take and a preview that are removed again."""
    document = stage.krita.createDocument(256, 256, "layers", "RGBA", "U8", "", 72.0)
    document.setBatchmode(True)
    stage.window.addView(document)
    yield 2
    pixels, memory = bytes(range(256)) * 1024, []
    for i in range(int(os.environ["STORYDIFFUSION_ROUNDS"])):
        for name in ("preview", "take"):
            layer = document.createNode(name, "paintlayer")
            layer.setPixelData(pixels, 0, 0, 256, 256)
            document.rootNode().addChildNode(layer, None)
            document.refreshProjection()
            yield 0.2
            layer.remove()
            document.refreshProjection()
            yield 0.1
        if (i + 1) % 10 == 0:
            yield 1
            memory.append(resident())
    stage.saw["memory"] = memory
