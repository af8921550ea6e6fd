"""The film as a file: what the canvas shows at every time, written by the backend. No Qt, no Krita."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .client import Failure
from .jobs import Told
from .orders import Order
from .progress import Work
from .texts import tr
from .turns import Steps, in_turns

if TYPE_CHECKING:
    from .controller import Controller
    from .strips import Strips

#: Formats that hold captions.
CAPTIONED = (".mp4", ".webm")


class FilmExport:
    """Reads the film off the canvas a frame a turn, has it written, and puts the file in its place when it is whole.

    Args:
        strips: what there is of the film.
        background: calls something in another thread, then something else with its result in this one.
    """

    def __init__(
        self,
        strips: Strips,
        controller: Controller,
        background: Callable[[Callable[[], Any], Callable[[Any], None]], None],
    ) -> None:
        self._strips, self._controller, self._background = strips, controller, background
        #: how far it is, None while no film is written
        self.work: Work | None = None
        #: why the last one did not come to be
        self.failure: Failure | None = None
        self._path = Path()

    def start(self, path: str) -> None:
        """Writes the film to a file, whose ending names the format; captions with it where that holds them."""
        if self.work is not None or not self._strips.layers():
            return
        work = self.work = Work(uuid.uuid4().hex)
        self._path, self.failure = Path(path), None
        self._controller.changed("progress", "")

        def failed() -> None:
            self._end(Failure("error", tr("The film could not be read from the document.")))

        in_turns(self._controller.defer, self._read(work.key), lambda: self.work is work, failed)

    def cancel(self) -> None:
        if self.work is not None:
            self._controller.withdraw(self.work.key)
            self._end()

    def _end(self, failure: Failure | None = None) -> None:
        self.work, self.failure = None, failure
        self._controller.changed("progress", "")

    def _read(self, key: str) -> Steps:
        document, strips = self._controller.document, self._strips
        before, was_shown, end = document.time(), strips.shown, strips.end()
        strips.shown = False
        strips.show(True)
        images: list[Any] = []
        frames: list[dict[str, int]] = []
        try:
            for time in range(end + 1):
                document.seek(time)
                yield
                picture = document.canvas()
                if images and images[-1] == picture:
                    frames[-1]["count"] += 1
                else:
                    images.append(picture)
                    frames.append({"image": len(images) - 1, "count": 1})
                yield
        finally:
            if document.is_open():
                document.seek(before)
                strips.show(was_shown)
        suffix = self._path.suffix.lower()
        request = {
            "kind": "film",
            "format": suffix,
            "rate": float(document.film_rate()),
            "frames": frames,
            "captions": self._captions() if suffix in CAPTIONED else [],
        }
        order: Order[Any] = Order(key, "film", ("film",), request, tuple((one, None) for one in images))
        self._controller.submit(order, self._told)

    def _captions(self) -> list[dict[str, Any]]:
        """Each panel's caption while it is held, and the first's while it begins to move."""
        found = []
        panels, strips = self._controller.story.panels, self._strips
        for number, panel in enumerate(panels):
            if not strips.made(panel):
                continue
            if panel.caption and (not number or not strips.made(panels[number - 1])):
                found.append({"text": panel.caption, "start": panel.strip.start, "length": len(panel.strip.placed) - 1})
            following = strips.next_of(panel)
            if following is not None and following.caption:
                start = panel.strip.start + len(panel.strip.placed) - 1
                found.append({"text": following.caption, "start": start, "length": panel.strip.hold})
        return found

    def _told(self, told: Told) -> None:
        work = self.work
        if work is None or work.key != told.key:
            return
        if told.kind == "results":
            work.state = "placing"
            self._write(work, told.results[0][1])
        elif told.kind == "failed":
            self._end(told.failure)
        elif told.kind in ("cancelled", "expired"):
            self._end()
        elif work.follow(told.kind, told.data):
            self._controller.changed("progress", "")

    def _write(self, work: Work, content: bytes) -> None:
        path = self._path

        def write() -> Failure | None:
            draft = path.with_name(f".{path.name}.part")
            try:
                draft.write_bytes(content)
                if self.work is work:
                    draft.replace(path)
                else:  # cancelled by now
                    draft.unlink()
            except OSError as error:
                draft.unlink(missing_ok=True)
                return Failure("disk_full", tr("The film could not be written: {reason}.", reason=str(error)))
            return None

        def done(failure: Failure | None) -> None:
            if self.work is not work:  # cancelled, or another film has been asked for
                return
            if failure is None:
                self._controller.notice = tr("The film was written to {path}.", path=str(path))
            self._end(failure)
            self._controller.changed("story", "")

        self._background(write, done)
