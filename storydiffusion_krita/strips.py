"""The ways between panels: frames on Krita's timeline. No Qt, no Krita.

Kept here: frames that the artist painted are never made again, and stay to the pixel; a strip that is made again is
a new layer, the earlier one is hidden and kept. Every slow thing is a step in a turn of the event loop of its own,
files are written by another thread.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import orders
from .client import Failure
from .film_export import FilmExport
from .jobs import Told
from .layers import panel_title
from .orders import Order
from .progress import Work, working_text
from .story_state import Panel, Story
from .texts import tr
from .turns import Steps, in_turns

if TYPE_CHECKING:
    from .controller import Controller

MAX_FRAMES, MAX_HOLD = 200, 500

SaveFrames = Callable[[Sequence[Any], str, int, int, int], None]


@dataclass(frozen=True)
class StripView:
    """What a strip's row shows. `state` is a panel's, or 'painted' where the artist painted in it."""

    id: str
    frames: int
    hold: int
    rate: int
    prompt: str
    state: str
    text: str
    remedy: str
    fraction: float | None
    made: bool
    can: bool


@dataclass
class _Making:
    """A strip on its way: the pictures that are given, by frame, until those between have come."""

    key: str
    panel: str
    at: int | None
    given: dict[int, Any] = field(default_factory=dict)
    ends: list[str] = field(default_factory=list)
    frames: int = 0
    variation: int = 0


def starts(story: Story) -> dict[str, int]:
    """At which time each way begins, by the panel it leads from: one after the other, made or not, so that one
    that is made later does not move the others."""
    found, at = {}, 0
    for panel in story.panels[:-1]:
        found[panel.id] = at
        at += panel.strip.frames - 1 + panel.strip.hold
    return found


class Strips:
    """The strips of one document's story.

    Args:
        controller: whose story and document they are.
        background: calls something in another thread, then something else with its result in this one.
        save_frames: writes pictures to a path as a file of Krita's, at a width and height, from a time on.
    """

    def __init__(
        self,
        controller: Controller,
        background: Callable[[Callable[[], Any], Callable[[Any], None]], None],
        save_frames: SaveFrames,
    ) -> None:
        self._controller, self._background, self._save_frames = controller, background, save_frames
        self._work: dict[str, Work] = {}
        self._making: dict[str, _Making] = {}
        self._failures: dict[str, Failure] = {}
        #: asked to play the film from here on; whoever knows Krita's actions does it
        self.play_asked: Callable[[], None] = lambda: None
        self.shown = False
        self.film = FilmExport(self, controller, background)
        # what the panels looked like when they were last looked at, by their group
        self._looks: dict[str, str] = {}
        self._turn = 0
        # a new one for every time that all are asked for, None when they have been
        self._all: object | None = None

    # ----------------------------------------------------------------------- what there is

    @property
    def working(self) -> bool:
        return bool(self._work) or self._all is not None or self.film.work is not None

    def next_of(self, panel: Panel) -> Panel | None:
        panels = self._controller.story.panels
        at = panels.index(panel) + 1
        return panels[at] if at < len(panels) else None

    def exists(self, panel: Panel) -> bool:
        """Whether there is a way to show: both panels have art, and fill the canvas."""
        following = self.next_of(panel)
        one = self._controller
        return following is not None and one.story.layout == "stack" and one.has_art(panel) and one.has_art(following)

    def made(self, panel: Panel) -> bool:
        return bool(panel.strip.layer) and panel.strip.layer in self._controller.layers

    def layers(self) -> list[str]:
        """Of all strips that are made, in the story's order."""
        return [panel.strip.layer for panel in self._controller.story.panels if self.made(panel)]

    def end(self) -> int:
        """The last frame of the film."""
        found = 0
        for panel in self._controller.story.panels:
            if self.made(panel):
                found = max(found, panel.strip.start + len(panel.strip.placed) - 1 + panel.strip.hold - 1)
        return found

    def _id(self, panel: Panel) -> str:
        following = self.next_of(panel)
        return f"{panel.id}-{following.id if following is not None else ''}"

    def _stale(self, panel: Panel) -> str:
        """What changed since the strip was made, in words."""
        strip, following = panel.strip, self.next_of(panel)
        if following is None:
            return ""
        # one that was not looked at yet counts as unchanged
        looks = [self._looks.get(one.group, end) for one, end in zip((panel, following), strip.ends, strict=False)]
        if strip.to != following.id or len(looks) != 2 or strip.ends != looks:
            return tr("a panel has changed since this was made")
        if len(strip.placed) != strip.frames:
            return tr("made with {count} frames", count=len(strip.placed))
        return ""

    def view(self, panel: Panel) -> StripView:
        strip, work, failure = panel.strip, self._work.get(panel.id), self._failures.get(panel.id)
        made, fraction, remedy = self.made(panel), None, ""
        if work is not None:
            state, text = work.state, working_text(work)
            fraction = work.fraction
        elif failure is not None:
            state, text, remedy = "failed", failure.sentence, failure.remedy
        elif made and (stale := self._stale(panel)):
            state, text = "stale", stale
        else:
            state, text = ("done" if made else "empty"), ""
        can = work is None and not self._controller.readonly
        return StripView(
            panel.id, strip.frames, strip.hold, self._controller.story.rate, strip.prompt, state, text, remedy,
            fraction, made, can,
        )  # fmt: skip

    def poll(self) -> None:
        """The artist may have shown or hidden the film in Krita's own layer list, or painted in a panel: one of
        them is looked at in a call, which takes Krita a millisecond or two."""
        layers = self.layers()
        self.shown = any(self._controller.layers[layer].visible for layer in layers)
        panels = self._controller.story.panels
        ends = {one.id: one for pair in itertools.pairwise(panels) if self.made(pair[0]) for one in pair}
        if ends:  # the one the artist is on every other time, the rest in turn
            self._turn += 1
            selected = ends.get(next(iter(self._controller.selected), ""))
            self._look(selected if selected and self._turn % 2 else list(ends.values())[self._turn // 2 % len(ends)])

    def _look(self, panel: Panel) -> str:
        """What a panel looks like now; the ways that it ends are shown anew where that has changed."""
        look = self._controller.document.look(panel.group)
        panels = self._controller.story.panels
        if self._looks.get(panel.group) != look and panel in panels:
            self._looks[panel.group] = look
            at = panels.index(panel)
            for one in panels[max(0, at - 1) : at + 1]:
                self._controller.changed("panel", one.id)
        return look

    # ----------------------------------------------------------------------- edits

    def set(self, panel_id: str, **values: Any) -> None:
        """`frames`, `hold`, `prompt`."""
        panel = self._controller.story.panel(panel_id)
        if panel is None or self._controller.readonly:
            return
        if "frames" in values:
            values["frames"] = min(max(int(values["frames"]), 2), MAX_FRAMES)
        if "hold" in values:
            values["hold"] = min(max(int(values["hold"]), 1), MAX_HOLD)
        if any(getattr(panel.strip, name) != value for name, value in values.items()):
            for name, value in values.items():
                setattr(panel.strip, name, value)
            self._failures.pop(panel_id, None)
            self._controller.touch("panel", panel_id)

    # ----------------------------------------------------------------------- making

    def make(self, panel_id: str, at: int | None = None, new_seed: bool = False) -> None:
        """Makes the frames between a panel and the next; those that the artist painted stay.

        Args:
            at: the time they begin at; None for their place in the story.
        """
        panel = self._controller.story.panel(panel_id)
        if panel is None or panel_id in self._work or not self.exists(panel) or self._controller.readonly:
            return
        making = _Making(uuid.uuid4().hex, panel_id, at, frames=panel.strip.frames)
        making.variation = panel.strip.variation + (1 if new_seed else 0)
        self._making[making.key] = making
        self._work[panel_id] = Work(making.key)
        self._failures.pop(panel_id, None)
        self._controller.changed("panel", panel_id)
        self._controller.changed("progress", "")
        self._run(making, self._send(making, panel))

    def make_all(self) -> None:
        """Every way that is not made, or not any more what its panels are."""

        if self._all is not None:
            return
        token = self._all = object()

        def steps() -> Steps:
            for panel in list(self._controller.story.panels):
                if self._controller.story.panel(panel.id) is not panel:
                    continue
                following = self.next_of(panel)
                if following is not None and self.made(panel):
                    self._look(panel)
                    self._look(following)
                if self.exists(panel) and (not self.made(panel) or self._stale(panel)):
                    self.make(panel.id)
                yield
            done()

        def done() -> None:
            if self._all is token:
                self._all = None
                self._controller.changed("progress", "")

        def wanted() -> bool:
            return self._all is token and self._controller.document.is_open()

        in_turns(self._controller.defer, steps(), wanted, done)

    def _run(self, making: _Making, steps: Steps) -> None:
        """One step a turn of the event loop, as long as nobody has cancelled."""

        def failed() -> None:
            self._fail(making, Failure("error", tr("The frames could not be put into the document.")))

        in_turns(self._controller.defer, steps, lambda: making.key in self._making, failed)

    def _send(self, making: _Making, panel: Panel) -> Steps:
        controller, document = self._controller, self._controller.document
        following = self.next_of(panel)
        assert following is not None
        for frame, one in ((0, panel), (making.frames - 1, following)):
            making.given[frame] = document.picture(one.group, controller.rect(one))
            making.ends.append(self._look(one))
            yield
        for frame, picture in self._painted(panel):
            if picture is not None:
                last = max(1, len(panel.strip.placed) - 1)
                making.given[round(frame * (making.frames - 1) / last)] = picture
            yield
        order = self._order(making, panel)
        if len(making.given) == making.frames:  # nothing between
            self._run(making, self._place(making, {}))
        else:
            controller.submit(order, self.told)

    def _painted(self, panel: Panel) -> Iterator[tuple[int, Any]]:
        """Every frame of a strip that is made, with its picture where the artist painted in it."""
        if self.made(panel):
            for frame, before in enumerate(panel.strip.placed):
                found = self._controller.document.frame(panel.strip.layer, panel.strip.start + frame)
                yield frame, found[0] if found is not None and found[1] != before else None

    def _order(self, making: _Making, panel: Panel) -> Order[Any]:
        controller, strip = self._controller, panel.strip
        width, height = controller.document.size()
        size = orders.size_for((width, height), controller.model_size, controller.model_longest)
        given = sorted(making.given.items())
        story = orders.wire_story(controller.story, size, {})
        story["seed"] = (story["seed"] + making.variation) % 2**63
        request = {
            "kind": "transition",
            "id": self._id(panel),
            "story": story,
            "frames": making.frames,
            "keyframes": [{"frame": frame, "image": i} for i, (frame, _) in enumerate(given)],
            "prompt": " ".join(strip.prompt.split()),
            "previews": controller.previews,
        }
        images = tuple((picture, size) for _, picture in given)
        return Order(making.key, "transition", (self._id(panel),), request, images)

    # ----------------------------------------------------------------------- what is told

    def told(self, told: Told) -> None:
        making = self._making.get(told.key)
        work = self._work.get(making.panel) if making is not None else None
        if making is None or work is None:
            return
        if told.kind == "results":
            work.state = "placing"
            between = [frame for frame in range(making.frames) if frame not in making.given]
            made = {frame: picture for frame, (_, picture, _) in zip(between, told.results, strict=True)}
            self._run(making, self._place(making, made))
        elif told.kind == "failed":
            assert told.failure is not None
            self._fail(making, told.failure)
        elif told.kind in ("cancelled", "expired"):
            self._end(making)
        elif work.follow(told.kind, told.data):
            self._controller.changed("panel", making.panel)
            self._controller.changed("progress", "")

    def _fail(self, making: _Making, failure: Failure) -> None:
        self._failures[making.panel] = failure
        self._end(making)

    def _end(self, making: _Making) -> None:
        self._making.pop(making.key, None)
        self._work.pop(making.panel, None)
        self._controller.changed("panel", making.panel)
        self._controller.changed("progress", "")

    def cancel(self, panel_id: str = "") -> None:
        """Stops the making of a strip, or of all and of a film."""
        if not panel_id:
            self._all = None
            self.film.cancel()
        for making in list(self._making.values()):
            if panel_id in ("", making.panel):
                self._controller.withdraw(making.key)
                self._end(making)

    # ----------------------------------------------------------------------- onto the timeline

    def _place(self, making: _Making, made: Mapping[int, Any]) -> Steps:
        """All frames as one layer of keyframes at their time."""
        controller, document = self._controller, self._controller.document
        panel = controller.story.panel(making.panel)
        if panel is None or not document.is_open():
            self._end(making)
            return
        pictures = {**made, **making.given}
        start = starts(controller.story).get(panel.id, 0) if making.at is None else making.at
        title = f"{panel_title(controller.number(panel.id))} → {controller.number(panel.id) + 1}"
        first = not self.layers()
        box: list[Any] = []

        def written(result: Any) -> None:
            if making.key in self._making:
                box.append(result)
            elif isinstance(result, Path):  # cancelled meanwhile
                shutil.rmtree(result.parent, ignore_errors=True)

        self._write([pictures[frame] for frame in range(making.frames)], start, written)
        while not box:
            yield
        if isinstance(box[0], Failure):
            self._fail(making, box[0])
            return
        file = box[0]
        try:
            later = [one.strip.layer for one in controller.story.panels
                     if one is not panel and self.made(one) and one.strip.start > start]  # fmt: skip
            layer = document.import_frames(title, str(file), later)
        finally:
            shutil.rmtree(file.parent, ignore_errors=True)
        if not layer:
            self._fail(making, Failure("error", tr("Krita could not import the frames.")))
            return
        controller.poll()
        yield
        placed = []
        for frame in range(making.frames):
            found = document.frame(layer, start + frame)
            placed.append(found[1] if found is not None else "")
            yield
        strip, earlier = panel.strip, panel.strip.layer
        strip.layer, strip.start, strip.placed, strip.ends = layer, start, placed, making.ends
        strip.variation, strip.to = making.variation, self._id(panel).partition("-")[2]
        document.set_film(controller.story.rate if first else 0, self.end())
        self.shown = True
        document.show(self.layers(), [earlier] if earlier in controller.layers else [])
        document.seek(start)
        self._end(making)
        controller.touch("panel", panel.id)

    def _write(self, pictures: Sequence[Any], start: int, then: Callable[[Any], None]) -> None:
        """Pictures as one file in a folder of its own, by another thread: its path, or a failure."""
        width, height = self._controller.document.size()

        def work() -> Any:
            folder = None
            try:
                folder = Path(tempfile.mkdtemp(prefix="storydiffusion-"))
                self._save_frames(pictures, str(folder / "film.kra"), width, height, start)
            except Exception as error:  # whatever it is, whoever waits for the file has to hear of it
                if folder is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                kind = "disk_full" if isinstance(error, OSError) else "error"
                return Failure(kind, tr("The frames could not be written: {reason}.", reason=str(error)))
            return folder / "film.kra"

        self._background(work, then)

    # ----------------------------------------------------------------------- looking at them

    def show(self, shown: bool) -> None:
        """The film over the panels, or the panels."""
        layers = self.layers()
        if shown != self.shown and layers:
            self.shown = shown
            self._controller.document.show(*((layers, []) if shown else ([], layers)))

    def play(self, panel_id: str) -> None:
        """The film from this way on."""
        panel = self._controller.story.panel(panel_id)
        if panel is not None and self.made(panel):
            self.shown = False
            self.show(True)
            self._controller.document.seek(panel.strip.start)
            self.play_asked()

    def discard(self, panel_id: str) -> None:
        """Removes the strip's layer; undo brings it back."""
        panel = self._controller.story.panel(panel_id)
        if panel is not None and self.made(panel):
            self._controller.document.remove(panel.strip.layer)
            self._controller.poll()
            self._controller.changed("panel", panel_id)

    # ----------------------------------------------------------------------- the docker's last line

    def progress_text(self) -> str:
        """The docker's last line while a strip or a film is made, "" when none is."""
        if self._work:
            panel_id, work = next(iter(self._work.items()))
            number = self._controller.number(panel_id)
            return f"{panel_title(number)} → {number + 1} · {working_text(work)}"
        return f"{tr('Film')} · {working_text(self.film.work)}" if self.film.work is not None else ""

    def fraction(self) -> float | None:
        work = next(iter(self._work.values()), self.film.work)
        return work.fraction if work is not None else None
