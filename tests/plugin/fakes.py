"""A document, a desk and a backend that do what a test says."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from storydiffusion_krita.client import Failure
from storydiffusion_krita.controller import Controller
from storydiffusion_krita.jobs import Told
from storydiffusion_krita.layers import Layer, Rect
from storydiffusion_krita.orders import Order


@dataclass
class FakeLayer:
    id: str
    parent: str
    name: str
    group: bool
    visible: bool = True
    picture: Any = None


class FakeDocument:
    """Layers in a list, bottom first; adding one can be undone and redone as Krita does it."""

    def __init__(self, size: tuple[int, int] = (400, 400)) -> None:
        self.nodes: list[FakeLayer] = []
        self.saved: dict[str, bytes] = {}
        self.active = ""
        self.mask: Any = None
        self.open = True
        self.modified = False
        self.undone: list[tuple[int, FakeLayer]] = []
        self.previews: list[Any] = []
        self.reads: list[str] = []
        self._size, self._ids = size, itertools.count(1)
        #: pictures by path and time; keyframes by layer and time
        self.files: dict[str, Any] = {}
        self.keyframes: dict[str, dict[int, Any]] = {}
        self.clip, self.now = (24, 100), 0

    def is_open(self) -> bool:
        return self.open

    def size(self) -> tuple[int, int]:
        return self._size

    def load(self, name: str) -> bytes:
        return self.saved.get(name, b"")

    def save(self, name: str, data: bytes) -> None:
        if data != self.saved.get(name, b""):
            self.saved[name] = data
            self.modified = True

    def layers(self) -> list[Layer]:
        return [Layer(n.id, n.parent, n.name, n.group, n.visible) for n in self.nodes if self._attached(n)]

    def _attached(self, node: FakeLayer) -> bool:
        return not node.parent or any(other.id == node.parent for other in self.nodes)

    def active_layer(self) -> str:
        return self.active

    def activate(self, layer: str) -> None:
        self.active = layer

    def node(self, layer: str) -> FakeLayer:
        return next(node for node in self.nodes if node.id == layer)

    def create_panel(self, title: str) -> str:
        return self.add(title, "", True)

    def add(self, name: str, parent: str = "", group: bool = False, picture: Any = None) -> str:
        node = FakeLayer(f"{{{next(self._ids)}}}", parent, name, group, True, picture)
        self.nodes.append(node)
        self.undone.clear()
        return node.id

    def move_into(self, layer: str, group: str) -> None:
        self.node(layer).parent = group

    def add_take(self, group: str, title: str, picture: Any, rect: Rect, above: str) -> str:
        layer = self.add(title, group, False, picture)
        if above:
            node = self.nodes.pop()
            self.nodes.insert(self.nodes.index(self.node(above)) + 1, node)
        self.modified = True
        return layer

    def remove(self, layer: str) -> None:
        self.nodes = [node for node in self.nodes if node.id != layer]

    def show(self, shown: Sequence[str], hidden: Sequence[str]) -> None:
        for node in self.nodes:
            node.visible = node.id in shown or (node.visible and node.id not in hidden)

    def picture(self, layer: str, rect: Rect) -> Any:
        self.reads.append(layer)
        return f"picture of {self.look(layer)}"

    def look(self, layer: str) -> str:
        """What is visible in it, from the bottom up."""
        return "+".join(str(n.picture) for n in self.nodes if layer in (n.parent, n.id) and n.visible and not n.group)

    def thumbnail(self, layer: str, size: int) -> Any:
        return self.look(layer)

    def selection(self, rect: Rect) -> Any:
        return self.mask

    def has_selection(self) -> bool:
        return self.mask is not None

    def show_preview(self, picture: Any, rect: Rect) -> None:
        self.previews.append(picture)

    def remove_previews(self) -> None:
        self.previews.clear()

    # the timeline

    def save_frames(self, frames: Sequence[Any], path: str, width: int, height: int, start: int) -> None:
        self.files[path] = {start + i: frame for i, frame in enumerate(frames)}

    def import_frames(self, title: str, file: str, under: Sequence[str]) -> str:
        layer = self.add(title)
        node = self.nodes.pop()
        at = min((i for i, one in enumerate(self.nodes) if one.id in under), default=len(self.nodes))
        self.nodes.insert(at, node)
        self.keyframes[layer] = self.files[file]
        return layer

    def frame(self, layer: str, time: int) -> tuple[Any, str] | None:
        picture = self.keyframes[layer].get(time)
        return None if picture is None else (picture, f"digest of {picture}")

    def film_rate(self) -> int:
        return self.clip[0]

    def set_film(self, rate: int, end: int) -> None:
        self.clip = (rate or self.clip[0], end)

    def time(self) -> int:
        return self.now

    def seek(self, time: int) -> None:
        self.now = time

    def canvas(self) -> Any:
        """The topmost layer that is seen and has something at this time."""
        for node in reversed(self.nodes):
            if node.visible and node.id in self.keyframes:
                shown = [time for time in self.keyframes[node.id] if time <= self.now]
                if shown:
                    return self.keyframes[node.id][max(shown)]
        return "panels"

    def undo(self) -> None:
        """Takes the layer away that was added last."""
        added = max(self.nodes, key=lambda node: int(node.id.strip("{}")))
        self.undone.append((self.nodes.index(added), added))
        self.nodes.remove(added)

    def redo(self) -> None:
        at, node = self.undone.pop()
        self.nodes.insert(at, node)


@dataclass
class FakeDesk:
    """Keeps the orders; a test says what becomes of them."""

    orders: list[Order[Any]] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    _tell: dict[str, Callable[[Told], None]] = field(default_factory=dict)

    def submit(self, order: Order[Any], tell: Callable[[Told], None]) -> None:
        self.orders.append(order)
        self._tell[order.key] = tell

    def cancel(self, key: str) -> None:
        self.cancelled.append(key)

    @property
    def last(self) -> Order[Any]:
        return self.orders[-1]

    def tell(self, kind: str, order: Order[Any] | None = None, **data: Any) -> None:
        order = order or self.last
        self._tell[order.key](Told(order.key, kind, data))

    def preview(self, panel: str, picture: Any) -> None:
        self._tell[self.last.key](Told(self.last.key, "preview", {"panel": panel}, preview=picture))

    def fail(self, kind: str, sentence: str, remedy: str = "") -> None:
        failure = Failure(kind, sentence, remedy)
        self._tell[self.last.key](Told(self.last.key, "failed", {}, failure=failure))

    def results(self, order: Order[Any], results: list[tuple[str, Any, int]]) -> None:
        self._tell[order.key](Told(order.key, "results", {}, results=results))

    def finish(self, order: Order[Any] | None = None, picture: Callable[[str], Any] | None = None) -> None:
        order = order or self.last
        draw = picture or (lambda panel: f"{panel}#{len(self.orders)}")
        results = [(panel, draw(panel), 7) for panel in order.panels]
        self._tell[order.key](Told(order.key, "results", {}, results=results))


class Turns:
    """An event loop of which a test makes the turns."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def defer(self, call: Callable[[], None]) -> None:
        self.waiting.append(call)

    def run(self, most: int = 10_000) -> int:
        made = 0
        while self.waiting and made < most:
            self.waiting.pop(0)()
            made += 1
        return made


@dataclass
class Scene:
    """A controller with everything around it."""

    document: Any = field(default_factory=FakeDocument)
    desk: FakeDesk = field(default_factory=FakeDesk)
    turns: Turns = field(default_factory=Turns)
    now: float = 0.0

    def __post_init__(self) -> None:
        self.reopen()

    def reopen(self) -> None:
        """As if the document had been closed and opened."""
        self.controller = Controller(
            self.document,
            self.desk,
            self.turns.defer,
            lambda picture: str(picture).encode(),
            lambda: self.now,
            background=lambda call, then: self.turns.defer(lambda: then(call())),
            save_frames=self.document.save_frames,
        )

    def film(self, picture: Callable[[int], Any] = lambda i: f"frame {i}") -> None:
        """What was asked for between panels comes back, to the end."""
        self.turns.run()
        order = self.desk.last
        given = {one["frame"] for one in order.request["keyframes"]}
        between = [frame for frame in range(order.request["frames"]) if frame not in given]
        self.desk.results(order, [(order.panels[0], picture(frame), 0) for frame in between])
        self.turns.run()

    def story(self, *lines: str, characters: Sequence[str] = ("Mira",)) -> Controller:
        for name in characters:
            self.controller.add_character(name, f"a fox called {name}")
        self.controller.set_script("\n".join(lines))
        self.turns.run()
        return self.controller

    def make(self) -> None:
        """Generate, to the end."""
        self.controller.generate()
        self.turns.run()
        self.desk.finish()
        self.turns.run()

    def finish(self, **more: Any) -> None:
        self.turns.run()
        self.desk.finish(**more)
        self.turns.run()

    def states(self) -> list[str]:
        return [self.controller.view(panel).state for panel in self.controller.story.panels]
