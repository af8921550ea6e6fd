"""One document's story at work: edits, what to make, what the artist did in Krita. No Qt, no Krita: it is told
and it tells."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from . import orders, script, story_state
from .jobs import Desk, Told
from .layers import PICTURE_ANNOTATION, STORY_ANNOTATION, Layer, Rect, StoryDocument
from .making import PanelMaking
from .orders import Order
from .progress import PanelView, Progress, changed_text, working_text
from .story_state import Character, Panel, Story, Take
from .strips import SaveFrames, Strips
from .texts import tr

THUMBNAIL = 128


class Controller:
    """A story and its document.

    Args:
        document: where layers and the story live.
        desk: runs orders.
        defer: calls something in a later turn of the event loop.
        sheet: a picture as bytes that the document keeps for a character.
        background: calls something in another thread, then something with its result in this one.
        save_frames: writes pictures to a path as a file of Krita's, at a width and height, from a time on.
    """

    def __init__(
        self,
        document: StoryDocument,
        desk: Desk,
        defer: Callable[[Callable[[], None]], None],
        sheet: Callable[[Any], bytes] = lambda picture: b"",
        clock: Callable[[], float] = time.monotonic,
        background: Callable[[Callable[[], Any], Callable[[Any], None]], None] = lambda call, then: then(call()),
        save_frames: SaveFrames = lambda frames, path, width, height, start: None,
    ) -> None:
        self.document, self._desk, self.defer, self._sheet = document, desk, defer, sheet
        self.story, self.readonly = Story(), False
        self.model_size, self.model_longest = (256, 256), 0
        self.previews = True
        self.selected: list[str] = []
        self.notice = ""
        #: told of 'story' (panels came, went or moved), 'panel' with its id, 'characters', 'settings', 'progress'
        self.changed: Callable[[str, str], None] = lambda what, which: None
        self.layers: dict[str, Layer] = {}
        self._active = ""
        self._selection = False
        self._thumbnails: dict[str, Any] = {}
        self._turn = 0
        self._unsaved = False
        self.making = PanelMaking(self, desk, clock)
        self.strips = Strips(self, background, save_frames)
        self._load()

    # ----------------------------------------------------------------------- the document's memory

    def _load(self) -> None:
        data = self.document.load(STORY_ANNOTATION)
        try:
            self.story = story_state.load(data) if data else Story(seed=story_state.random_seed())
        except story_state.NewerStory:
            self.readonly = True
            self.notice = tr("This story was made with a newer version of StoryDiffusion. Update the plugin.")
        except ValueError:
            # the bytes stay in the document until the artist begins a new story in it
            self.notice = tr("The story in this document cannot be read. The layers are untouched.")
        self.document.remove_previews()
        self.look_at_layers()
        for panel in self.story.panels:
            panel.takes = [take for take in panel.takes if take.layer in self.layers]
            if panel.take is None and panel.takes:
                panel.chosen = panel.takes[-1].layer
        if self.story.panels:
            self.selected = [self.story.panels[0].id]

    def touch(self, what: str, which: str = "") -> None:
        """Something of the story changed: say it, and write it into the document in the next turn."""
        if not self._unsaved and not self.readonly:
            self._unsaved = True
            self.defer(self.flush)
        self.changed(what, which)

    def flush(self) -> None:
        """Writes the story into the document, where it is not there yet."""
        if self._unsaved and self.document.is_open():
            self.document.save(STORY_ANNOTATION, story_state.dump(self.story))
        self._unsaved = False

    # ----------------------------------------------------------------------- edits

    def set_script(self, text: str) -> None:
        if text == self.story.script or self.readonly:
            return
        self.story.set_script(text)
        self._forget_gone()
        self.touch("story")

    def set_words(self, panel_id: str, prompt: str | None = None, caption: str | None = None) -> None:
        panel = self.story.panel(panel_id)
        if panel is not None and not self.readonly:
            self.story.set_words(panel, prompt, caption)
            self.making.failures.pop(panel_id, None)
            self.touch("panel", panel_id)

    def set_seed(self, panel_id: str, seed: int | None) -> None:
        panel = self.story.panel(panel_id)
        if panel is not None and panel.seed != seed and not self.readonly:
            panel.seed, panel.variation = seed, 0
            self.touch("panel", panel_id)

    def keep_seed(self, panel_id: str) -> None:
        """Makes the seed of the take that is seen the panel's own."""
        panel = self.story.panel(panel_id)
        if panel is not None and panel.take is not None and panel.take.seed is not None:
            take = panel.take
            self.set_seed(panel_id, take.seed)
            take.made = {**take.made, "seed": self.story.made_from(panel)["seed"]}
            take.variation = 0
            self.touch("panel", panel_id)

    def set_locked(self, panel_id: str, locked: bool) -> None:
        panel = self.story.panel(panel_id)
        if panel is not None and not self.readonly:
            panel.locked = locked
            self.touch("panel", panel_id)

    def add_panel(self, after: str = "") -> str:
        """A panel with the character of its neighbour, so that it can be typed on at once."""
        if self.readonly:
            return ""
        names = [one.name for one in self.story.characters]
        panel = self.story.add_panel(f"[{names[0] if names else script.NOBODY}] ", after)
        self.selected = [panel.id]
        self.touch("story")
        return panel.id

    def remove_panel(self, panel_id: str) -> None:
        if not self.readonly:
            self.story.remove_panel(panel_id)
            self._forget_gone()
            self.touch("story")

    def move_panel(self, panel_id: str, to: int) -> None:
        if not self.readonly:
            self.story.move_panel(panel_id, to)
            self.touch("story")

    def _forget_gone(self) -> None:
        here = {panel.id for panel in self.story.panels}
        self.selected = [panel_id for panel_id in self.selected if panel_id in here]
        self.making.stop([panel_id for panel_id in self.making.work if panel_id not in here])

    def add_character(self, name: str = "", description: str = "") -> Character | None:
        if self.readonly:
            return None
        one = self.story.add_character(name, description)
        self.touch("characters")
        return one

    def set_character(self, character_id: str, name: str | None = None, description: str | None = None,
                      colour: str | None = None) -> str:  # fmt: skip
        """What is wrong with the new name, "" if all was done."""
        one = self.story.character(character_id)
        if one is None or self.readonly:
            return ""
        wrong = "" if name is None else self.story.rename_character(character_id, name)
        one.description = one.description if description is None else description
        one.colour = colour or one.colour
        self.touch("characters")
        return wrong

    def remove_character(self, character_id: str) -> None:
        if not self.readonly:
            self.story.remove_character(character_id)
            self.document.save(PICTURE_ANNOTATION + character_id, b"")
            self.touch("characters")

    def picture_from_layer(self, character_id: str) -> None:
        """Makes the active layer the character's picture: other panels are made from it too."""
        one = self.story.character(character_id)
        active = self.document.active_layer()
        if one is None or not active or self.readonly:
            return
        data = self._sheet(self.document.picture(active, (0, 0, *self.document.size())))
        self.document.save(PICTURE_ANNOTATION + character_id, data)
        one.picture = story_state.digest(data.hex())
        self.touch("characters")

    def remove_picture(self, character_id: str) -> None:
        one = self.story.character(character_id)
        if one is not None and not self.readonly:
            self.document.save(PICTURE_ANNOTATION + character_id, b"")
            one.picture = ""
            self.touch("characters")

    def picture_of(self, character_id: str) -> bytes:
        return self.document.load(PICTURE_ANNOTATION + character_id)

    def set_settings(self, **values: Any) -> None:
        """`style`, `model`, `layout`, `seed`, `negative_prompt`, `steps`, `guidance_scale`, `title`."""
        if self.readonly:
            return
        for name, value in values.items():
            setattr(self.story, name, value)
        if "layout" in values:
            self._show_layout()
        self.touch("settings")

    def load_example(self) -> None:
        """An example story, where there is none yet."""
        if not self.story.entries and not self.story.characters and not self.readonly:
            self.story = story_state.load(story_state.EXAMPLE)
            self.selected = [self.story.panels[0].id]
            self.touch("story")

    # ----------------------------------------------------------------------- what to make

    def has_art(self, panel: Panel) -> bool:
        group = self.layers.get(panel.group)
        if group is None or not group.group:  # one that was flattened is its own picture
            return group is not None
        return any(layer.parent == panel.group for layer in self.layers.values())

    def can_make(self, panel: Panel) -> bool:
        return not (panel.locked or panel.id in self.making.work or self.readonly or self.story.problem(panel))

    def missing(self) -> list[str]:
        return [p.id for p in self.story.panels if self.can_make(p) and not self.has_art(p)]

    def stale(self) -> list[str]:
        return [p.id for p in self.story.panels if self.can_make(p) and self.has_art(p) and self.story.changed(p)]

    def everything(self) -> list[str]:
        return [p.id for p in self.story.panels if self.can_make(p)]

    def generate(self, panel_ids: Sequence[str] | None = None, new_seeds: bool = False) -> None:
        """Makes panels: those that are missing or stale, or those named."""
        named = self.missing() + self.stale() if panel_ids is None else panel_ids
        wanted = [p.id for p in self.story.panels if p.id in named and self.can_make(p)]
        if wanted:
            panels = [p for p in self.story.panels if p.id in wanted]
            self.making.order(wanted, {p.id: self._next(p) if new_seeds else p.variation for p in panels})

    def again(self, panel_id: str) -> None:
        """Makes a panel once more, from what the others look like now; inside the selection if there is one.

        Where something changed since, with the same seed: the artist wants to see that change. Else with a
        new one: the same picture again is of no use.
        """
        panel = self.story.panel(panel_id)
        if panel is None or not self.can_make(panel):
            return
        mask = self.document.selection(self.rect(panel)) if self.has_art(panel) else None
        same = bool(panel.take is None or self.story.changed(panel) or self.painted_since(panel))
        variations = {panel_id: panel.variation if same and mask is None else self._next(panel)}
        self.select([panel_id])  # the artist wants to see it
        self.making.order([panel_id], variations, again=True, mask=mask, start=mask is not None)

    def refine(self, panel_id: str, strength: float) -> None:
        """Changes the panel's picture a little (0) or entirely (1)."""
        panel = self.story.panel(panel_id)
        if panel is not None and self.can_make(panel) and self.has_art(panel):
            self.select([panel_id])
            self.making.order([panel_id], {panel_id: self._next(panel)}, again=True, start=True, strength=strength)

    def _next(self, panel: Panel) -> int:
        return max([panel.variation, *(take.variation for take in panel.takes)]) + 1 if panel.takes else panel.variation

    def painted_since(self, panel: Panel) -> list[str]:
        """The panels that this one is made from and that look otherwise than when its take was made."""
        if panel.take is None:
            return []
        before = panel.take.looks
        sources = orders.references_for(self.story, [panel.id], self.with_art())
        return [one.id for one in sources if one.id in before and self.document.look(one.group) != before[one.id]]

    def with_art(self) -> list[str]:
        return [panel.id for panel in self.story.panels if self.has_art(panel)]

    def rect(self, panel: Panel) -> Rect:
        if panel.frame is not None and len(panel.frame) == 4:
            x, y, width, height = panel.frame
            return (x, y, width, height)
        return (0, 0, *self.document.size())

    def submit(self, order: Order[Any], tell: Callable[[Told], None]) -> None:
        self._desk.submit(order, tell)

    def withdraw(self, key: str) -> None:
        self._desk.cancel(key)

    def cancel(self, panel_id: str = "") -> None:
        """Stops the making of a panel, or of all and of films."""
        if not panel_id:
            self.strips.cancel()
        self.making.cancel(panel_id)

    def before_save(self) -> None:
        """Nothing of ours that is not the artist's goes into a file, and nothing of theirs is left out."""
        self.making.before_save()
        self.flush()

    def close(self) -> None:
        """The document is gone: what is being made for it has no place any more."""
        self.making.close()
        self.strips.cancel()

    # ----------------------------------------------------------------------- takes

    def look_at_layers(self) -> None:
        """What layers there are now."""
        self.layers = {layer.id: layer for layer in self.document.layers()}

    def show_result(self, panel: Panel, layer: str, earlier: Sequence[str]) -> None:
        """Shows a take that came, instead of the earlier ones, where the layout shows its panel."""
        if not self.selected:
            self.selected = [panel.id]
        shown, hidden = self._layout()
        self.strips.show(False)
        self.document.show([layer, *shown], [*earlier, *hidden])
        self._thumbnails[panel.id] = self.document.thumbnail(panel.group, THUMBNAIL)
        self.touch("panel", panel.id)

    def takes(self, panel: Panel) -> list[Take]:
        """Those whose layer is there; a layer that was deleted is a take that was deleted."""
        return [take for take in panel.takes if take.layer in self.layers]

    def choose_take(self, panel_id: str, step: int) -> None:
        """Shows the next (1) or the one before (-1)."""
        panel = self.story.panel(panel_id)
        takes = self.takes(panel) if panel is not None else []
        if panel is None or not takes:
            return
        at = next((i for i, take in enumerate(takes) if take.layer == panel.chosen), len(takes) - 1)
        self._choose(panel, takes[min(max(at + step, 0), len(takes) - 1)].layer)

    def _choose(self, panel: Panel, layer: str) -> None:
        panel.chosen = layer
        take = panel.take
        if take is not None:
            panel.variation = take.variation
        self.document.show([layer], [one.layer for one in self.takes(panel) if one.layer != layer])
        self._thumbnails[panel.id] = self.document.thumbnail(panel.group, THUMBNAIL)
        self.touch("panel", panel.id)

    def discard_take(self, panel_id: str) -> None:
        """Removes the layer of the take that is seen; undo brings it back."""
        panel = self.story.panel(panel_id)
        if panel is not None and panel.take is not None:
            self.document.remove(panel.take.layer)
            self.poll()

    # ----------------------------------------------------------------------- selecting

    def select(self, panel_ids: Sequence[str]) -> None:
        """Selected here is selected in Krita; in a stack it is also the one that is seen."""
        self.strips.show(False)  # the panel is what the artist wants to see
        if list(panel_ids) == self.selected:
            return
        before, self.selected = self.selected, list(panel_ids)
        for panel_id in {*before, *panel_ids}:
            self.changed("panel", panel_id)
        panel = self.story.panel(panel_ids[0]) if panel_ids else None
        if panel is not None and panel.group in self.layers and before[:1] != self.selected[:1]:
            if self._panel_of(self._active) is not panel:
                self.document.activate(panel.group)
                self._active = panel.group
            self._show_layout()

    def _show_layout(self) -> None:
        self.document.show(*self._layout())

    def _layout(self) -> tuple[list[str], list[str]]:
        """Groups to show and to hide: a stack shows one panel, a page all of them."""
        groups = [panel.group for panel in self.story.panels if panel.group in self.layers]
        chosen = self.story.panel(self.selected[0]) if self.selected else None
        if self.story.layout == "grid":
            return groups, []
        if chosen is not None and chosen.group in groups:
            return [chosen.group], [group for group in groups if group != chosen.group]
        return [], []

    def _panel_of(self, layer: str) -> Panel | None:
        """The panel that a layer is in."""
        groups = {panel.group: panel for panel in self.story.panels if panel.group}
        while layer:
            if layer in groups:
                return groups[layer]
            layer = self.layers[layer].parent if layer in self.layers else ""
        return None

    # ----------------------------------------------------------------------- what the artist did in Krita

    def poll(self) -> None:
        """Looks at the layers: Krita has no signal for them. A millisecond or two."""
        before = self.layers
        self.look_at_layers()
        if before.keys() != self.layers.keys():
            self._follow_merges(before)
        for panel in self.story.panels:
            self._follow_takes(panel, before)
        if before.keys() != self.layers.keys():
            self._thumbnails.clear()
            self.changed("story", "")
        selection = self.document.has_selection()
        if selection != self._selection:
            self._selection = selection
            for panel in self.story.panels:
                self.changed("panel", panel.id)
        self.strips.poll()
        self._follow_active_layer()
        self._refresh_thumbnail()

    def _follow_merges(self, before: dict[str, Layer]) -> None:
        """A group that went in the same moment as one layer came was flattened into it."""
        gone = [panel for panel in self.story.panels if panel.group in before and panel.group not in self.layers]
        roots = [layer for layer in self.layers.values() if layer.id not in before and not layer.group]
        if len(gone) == 1 and len(roots) == 1 and self._panel_of(roots[0].id) is None:
            panel, layer = gone[0], roots[0]
            panel.takes = [*panel.takes, Take(layer.id, made=dict(panel.take.made) if panel.take else {})]
            panel.group = panel.chosen = layer.id
            self.touch("panel", panel.id)

    def _follow_takes(self, panel: Panel, before: dict[str, Layer]) -> None:
        here = self.takes(panel)
        if not here:
            return
        returned = [take for take in here if take.layer not in before]
        seen = [take for take in here if self.layers[take.layer].visible]
        if returned and before and returned[-1].layer != panel.chosen:
            self._choose(panel, returned[-1].layer)  # redo
        elif panel.chosen not in self.layers:
            self._choose(panel, here[-1].layer)  # undo, or deleted
        elif len(seen) == 1 and seen[0].layer != panel.chosen:
            panel.chosen = seen[0].layer  # shown in Krita's own layer list
            self.touch("panel", panel.id)

    def _follow_active_layer(self) -> None:
        active = self.document.active_layer()
        if active != self._active:
            self._active = active
            panel = self._panel_of(active)
            if panel is not None and panel.id not in self.selected:
                self.select([panel.id])

    def _refresh_thumbnail(self) -> None:
        """One a call: the active panel every other time, the rest in turn."""
        panels = [panel for panel in self.story.panels if panel.group in self.layers]
        if not panels:
            return
        self._turn += 1
        active = self._panel_of(self._active)
        panel = active if active in panels and self._turn % 2 else panels[self._turn // 2 % len(panels)]
        assert panel is not None
        image = self.document.thumbnail(panel.group, THUMBNAIL)
        if image != self._thumbnails.get(panel.id):
            self._thumbnails[panel.id] = image
            self.changed("panel", panel.id)

    def thumbnail(self, panel_id: str) -> Any:
        """What the panel looks like: while it is made, as far as it is."""
        if panel_id in self.making.previews:
            return self.making.previews[panel_id]
        panel = self.story.panel(panel_id)
        if panel_id not in self._thumbnails and panel is not None and panel.group in self.layers:
            self._thumbnails[panel_id] = self.document.thumbnail(panel.group, THUMBNAIL)
        return self._thumbnails.get(panel_id)

    # ----------------------------------------------------------------------- what rows and lines show

    def view(self, panel: Panel) -> PanelView:
        problem = self.story.problem(panel)
        state, text, remedy, fraction = self._state(panel, problem)
        takes = self.takes(panel)
        at = next((i + 1 for i, take in enumerate(takes) if take.layer == panel.chosen), 0)
        return PanelView(
            id=panel.id,
            number=self.story.panels.index(panel) + 1,
            prompt=panel.prompt,
            caption=panel.caption,
            problem=problem,
            state=state,
            text=text,
            remedy=remedy,
            fraction=fraction,
            take=at,
            takes=len(takes),
            locked=panel.locked,
            seed=panel.seed,
            selected=panel.id in self.selected,
            inside_selection=self._selection and self.has_art(panel),
        )

    def _state(self, panel: Panel, problem: str) -> tuple[str, str, str, float | None]:
        work, failure = self.making.work.get(panel.id), self.making.failures.get(panel.id)
        if work is not None:
            return work.state, working_text(work), "", work.fraction
        if problem:
            return "problem", problem, "", None
        if failure is not None:
            return "failed", failure.sentence, failure.remedy, None
        if not self.has_art(panel):
            return "empty", tr("not made yet"), "", None
        changed = self.story.changed(panel)
        if changed:
            return "stale", changed_text(changed), "", None
        return "done", tr("done"), "", None

    def progress(self) -> Progress:
        if self.making.working:
            return self.making.progress()
        return Progress(self.strips.progress_text(), self.strips.fraction())

    def number(self, panel_id: str) -> int:
        return next((i + 1 for i, panel in enumerate(self.story.panels) if panel.id == panel_id), 0)

    @property
    def working(self) -> bool:
        return self.making.working or self.strips.working
