"""Panels on their way: orders, what is told of them, results into the document. No Qt, no Krita.

Kept here: what is slow is never done in one go. Reading the panels' pictures and placing results take one turn of the
event loop each, so painting goes on between them. Nothing of the artist's is overwritten: a result is a new layer.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from . import orders
from .client import Failure
from .jobs import Desk, Told
from .layers import panel_title, take_title
from .orders import Order
from .page import frame_of
from .progress import STATES, Progress, Running, Work, duration_text, working_text
from .story_state import Panel, Take
from .texts import tr
from .turns import Steps, in_turns

if TYPE_CHECKING:
    from .controller import Controller

#: No preview goes into the document for this long after a save began: Krita 6 turns its event loop before it
#: takes what it writes, and one that arrives then would be in the file.
SAVING_SECONDS = 3.0


class PanelMaking:
    """The panels of one story that are being made.

    Args:
        controller: whose story and document they are.
        desk: runs orders.
        clock: seconds.
    """

    def __init__(self, controller: Controller, desk: Desk, clock: Callable[[], float] = time.monotonic) -> None:
        self._controller, self._desk, self._clock = controller, desk, clock
        #: panels that are being made, and why others did not come to be
        self.work: dict[str, Work] = {}
        self.failures: dict[str, Failure] = {}
        #: as far as they are
        self.previews: dict[str, Any] = {}
        self._running: dict[str, Running] = {}
        self._saving_until = -1.0

    @property
    def working(self) -> bool:
        return bool(self._running)

    # ----------------------------------------------------------------------- orders

    def order(
        self,
        wanted: Sequence[str],
        variations: dict[str, int],
        again: bool = False,
        mask: Any = None,
        start: bool = False,
        strength: float = 1.0,
    ) -> None:
        """Reads one picture a turn, then hands the order in."""
        controller = self._controller
        story, key = controller.story, uuid.uuid4().hex
        panels = [panel for panel in story.panels if panel.id in wanted]
        self._place_frames(panels)
        self._running[key] = Running(None, tuple(wanted))
        for panel in panels:
            self.work[panel.id] = Work(key)
            self.failures.pop(panel.id, None)
            controller.changed("panel", panel.id)
        controller.changed("progress", "")
        sources = orders.references_for(story, wanted, controller.with_art())
        if again:  # what the artist painted is what they want to see in the others
            painted = {one for panel in panels for one in controller.painted_since(panel)}
            sources = orders.painted_first(story, wanted, sources, painted)

        def steps() -> Steps:
            read: dict[str, Any] = {}
            for panel in [*sources, *(panels if start else [])]:
                if panel.group in controller.layers:
                    read[panel.id] = controller.document.picture(panel.group, controller.rect(panel))
                yield
            here = [panel_id for panel_id in wanted if story.panel(panel_id) is not None]
            sheets = {one.id: controller.picture_of(one.id) for one in story.characters if one.picture}
            rect = controller.rect(panels[0])
            made: Order[Any] = orders.order(
                story,
                here,
                key=key,
                size=orders.size_for((rect[2], rect[3]), controller.model_size, controller.model_longest),
                pictures={panel.id: read[panel.id] for panel in sources if panel.id in read},
                sheets={name: data for name, data in sheets.items() if data},
                variations=variations,
                again=again,
                start=read.get(wanted[0]) if start else None,
                mask=mask,
                strength=strength,
                previews=controller.previews,
            )
            self._running[key] = Running(made, tuple(here))
            self._desk.submit(made, self.told)

        def failed() -> None:  # a mistake, to be seen; but the docker does not wait for what will not come
            for panel_id in wanted:
                self.failures[panel_id] = Failure("error", tr("The request could not be put together."))
            self._end(key)

        in_turns(controller.defer, steps(), lambda: key in self._running, failed)

    def _place_frames(self, panels: Sequence[Panel]) -> None:
        """Frames for panels that have no layer yet, in the layout of now."""
        controller = self._controller
        count = len(controller.story.panels)
        for panel in panels:
            if panel.group not in controller.layers:
                number = controller.story.panels.index(panel)
                grid = controller.story.layout == "grid"
                panel.frame = list(frame_of(number, count, controller.document.size())) if grid else None

    def cancel(self, panel_id: str = "") -> None:
        """Stops the job of a panel, or all of them."""
        keys = {self.work[panel_id].key} if panel_id in self.work else set(self._running) if not panel_id else set()
        for key in keys:
            self._desk.cancel(key)
            self._end(key)

    def stop(self, panel_ids: Sequence[str]) -> None:
        """Of panels that left the story; their job goes on while it has others to make."""
        for panel_id in panel_ids:
            work = self.work.pop(panel_id, None)
            if work is not None and not any(other.key == work.key for other in self.work.values()):
                self._desk.cancel(work.key)
                self._end(work.key)

    def close(self) -> None:
        """The document is gone: what is being made for it has no place any more."""
        for key in list(self._running):
            self._running.pop(key)
            self._desk.cancel(key)
        self.work.clear()

    def before_save(self) -> None:
        self._saving_until = self._clock() + SAVING_SECONDS
        self._controller.document.remove_previews()

    # ----------------------------------------------------------------------- what is told

    def told(self, told: Told) -> None:
        """What the desk says of an order."""
        running = self._running.get(told.key)
        if running is None:
            return
        if told.kind == "results":
            self._arrived(running, told)
        elif told.kind == "failed":
            assert told.failure is not None
            for panel_id in running.panels:
                self.failures[panel_id] = told.failure
            self._end(told.key)
        elif told.kind in ("cancelled", "expired"):
            self._end(told.key)
        elif told.kind == "preview":
            self._show_preview(told)
        else:
            self._progressed(running, told)

    def _progressed(self, running: Running, told: Told) -> None:
        panels: Sequence[str] = running.panels
        if told.kind == "step":
            panels = told.data.get("panels", ())
            self._measure(running, panels, told.data.get("step", 0), told.data.get("steps", 1))
            self._let_wait(running, panels)
        elif told.kind == "panel":
            panel_id = told.data.get("panel", "")
            running.made.add(panel_id)
            if panel_id in self.work:
                self.work[panel_id].state = "placing"
                self._controller.changed("panel", panel_id)
            return
        elif told.kind not in STATES:
            return
        if told.kind == "waiting":
            running.began, running.steps_done, running.tail = None, 0, 0
        for panel_id in panels:
            work = self.work.get(panel_id)
            if work is not None and work.key == told.key:
                work.follow(told.kind, told.data)
                self._controller.changed("panel", panel_id)
        self._controller.changed("progress", "")

    def _let_wait(self, running: Running, sampled: Sequence[str]) -> None:
        """The panels of a job whose turn has not come yet."""
        for panel_id in running.panels:
            work = self.work.get(panel_id)
            if work is not None and panel_id not in sampled and work.state in ("waiting", "loading"):
                work.state, work.position = "queued", 0
                self._controller.changed("panel", panel_id)

    def _measure(self, running: Running, panels: Sequence[str], step: int, steps: int) -> None:
        if step <= 1 or running.began is None:
            running.began, running.steps_done = self._clock(), 0  # the first step holds what happens once
        else:
            running.steps_done += len(panels)
        others = len(running.panels) - len(running.made | set(panels))
        running.tail = (steps - step) * len(panels) + others * steps

    def _show_preview(self, told: Told) -> None:
        controller = self._controller
        panel = controller.story.panel(told.data.get("panel", ""))
        if panel is None or panel.id not in self.work:
            return
        self.previews[panel.id] = told.preview
        seen = controller.story.layout == "grid" or panel.id in controller.selected[:1]
        saving = self._clock() < self._saving_until
        if controller.previews and seen and not saving and controller.document.is_open():
            controller.document.show_preview(told.preview, controller.rect(panel))
        controller.changed("panel", panel.id)

    # ----------------------------------------------------------------------- results

    def _arrived(self, running: Running, told: Told) -> None:
        order = running.order
        assert order is not None
        for panel_id, _, _ in told.results:
            if panel_id in self.work:
                self.work[panel_id].state = "placing"
        placing = ""

        def steps() -> Steps:
            nonlocal placing
            for placing, picture, seed in told.results:
                self._place(order, placing, picture, seed)
                yield
            self._end(told.key)
            self._remember_looks(order.panels)

        def failed() -> None:
            if told.key in self._running:  # not where only what comes after the last picture went wrong
                self.failures[placing] = Failure("error", tr("The picture could not be put into the document."))
                self._end(told.key)

        self._controller.document.remove_previews()
        in_turns(self._controller.defer, steps(), lambda: told.key in self._running, failed)

    def _place(self, order: Order[Any], panel_id: str, picture: Any, seed: int) -> None:
        """One result into the document: a new layer over the earlier takes, under what was painted over them.

        What was made from the panel's own picture has the paint in it already, and lies over it.
        """
        controller = self._controller
        document, panel = controller.document, controller.story.panel(panel_id)
        self.work.pop(panel_id, None)
        if panel is None or not document.is_open():
            return
        controller.look_at_layers()
        self._ensure_group(panel)
        earlier = [take.layer for take in panel.takes if take.layer in controller.layers]
        number = len(panel.takes) + 1
        over = order.kind in ("refine", "inpaint")
        under_paint = [take.layer for take in panel.takes if take.layer in earlier and not take.over]
        above = under_paint[-1] if under_paint and not over else ""
        layer = document.add_take(panel.group, take_title(number), picture, controller.rect(panel), above)
        variation = order.variations.get(panel_id, panel.variation)
        panel.takes.append(Take(layer, seed, variation, dict(order.made.get(panel_id, {})), over=over))
        panel.variation, panel.chosen = variation, layer
        controller.look_at_layers()
        controller.show_result(panel, layer, earlier)

    def _ensure_group(self, panel: Panel) -> None:
        """The panel's group; one that the artist flattened becomes a take in a new one."""
        controller = self._controller
        old = controller.layers.get(panel.group)
        if old is not None and old.group:
            return
        panel.group = controller.document.create_panel(panel_title(controller.number(panel.id)))
        if old is not None:
            controller.document.move_into(old.id, panel.group)

    def _remember_looks(self, panel_ids: Sequence[str]) -> None:
        """What the others looked like when these were made, to know later whether somebody painted in them."""
        controller = self._controller
        for panel in controller.story.panels:
            take = panel.take
            if panel.id in panel_ids and take is not None:
                sources = orders.references_for(controller.story, [panel.id], controller.with_art())
                take.looks = {other.id: controller.document.look(other.group) for other in sources}
        controller.touch("progress")

    def _end(self, key: str) -> None:
        running = self._running.pop(key, None)
        if running is None:
            return
        for panel_id in [panel_id for panel_id, work in self.work.items() if work.key == key]:
            del self.work[panel_id]
        for panel_id in running.panels:
            self.previews.pop(panel_id, None)
            self._controller.changed("panel", panel_id)
        if not self._running and self._controller.document.is_open():
            self._controller.document.remove_previews()
        self._controller.changed("progress", "")

    # ----------------------------------------------------------------------- the docker's last line

    def progress(self) -> Progress:
        """Of the job that is first; there is one."""
        key, running = next(iter(self._running.items()))
        works = [work for work in self.work.values() if work.key == key]
        sampling = [work for work in works if work.state == "sampling"]
        rest = len(self._running) - 1
        more = tr(" · {count} more waiting", count=rest) if rest else ""
        if not sampling:
            return Progress((working_text(works[0]) if works else tr("placing")).capitalize() + more)
        steps = max(1, sampling[0].steps) * len(running.panels)
        fraction = max(0.0, 1 - running.tail / steps)
        count = len(running.panels)
        one = panel_title(self._controller.number(running.panels[0]))
        text = tr("{count} panels", count=count) if count > 1 else one
        if running.steps_done and running.began is not None:
            left = (self._clock() - running.began) / running.steps_done * running.tail
            text += " · " + duration_text(left)
        return Progress(text + more, fraction)
