"""Krita's documents: the only code that touches nodes, pixels, undo and annotations.

Kept here: nothing of the artist's is overwritten. A result is a new layer (`addChildNode`: one undo step);
existing layers are only shown or hidden. All of it runs on the GUI thread.

A panel is a group layer, known by its id, which survives saving, renaming and moving.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from . import pictures
from .kra import SRGB
from .qt import QtCore, QtGui, owned
from .texts import tr

#: by name, because a layer that was saved by an autosave and recovered has no other mark
PREVIEW_NAME = "StoryDiffusion preview"
STORY_ANNOTATION = "storydiffusion/story"
PICTURE_ANNOTATION = "storydiffusion/picture/"

#: how often, and for how long, Krita is watched for activating another layer when one was added or removed
STAY_MS, STAY_SECONDS = 20, 0.6

Rect = tuple[int, int, int, int]


@dataclass(frozen=True)
class Layer:
    """A layer as it is now; `parent` is "" for those at the root."""

    id: str
    parent: str
    name: str
    group: bool
    visible: bool


class StoryDocument(Protocol):
    """What a controller needs of a document. Pictures are opaque to it."""

    def is_open(self) -> bool: ...
    def size(self) -> tuple[int, int]: ...
    def load(self, name: str) -> bytes: ...
    def save(self, name: str, data: bytes) -> None: ...
    def layers(self) -> list[Layer]: ...
    def active_layer(self) -> str: ...
    def activate(self, layer: str) -> None: ...
    def create_panel(self, title: str) -> str: ...
    def move_into(self, layer: str, group: str) -> None: ...
    def add_take(self, group: str, title: str, picture: Any, rect: Rect, above: str) -> str: ...
    def remove(self, layer: str) -> None: ...
    def show(self, shown: Sequence[str], hidden: Sequence[str]) -> None: ...
    def picture(self, layer: str, rect: Rect) -> Any: ...
    def thumbnail(self, layer: str, size: int) -> Any: ...
    def look(self, layer: str) -> str: ...
    def selection(self, rect: Rect) -> Any | None: ...
    def has_selection(self) -> bool: ...
    def show_preview(self, picture: Any, rect: Rect) -> None: ...
    def remove_previews(self) -> None: ...
    def import_frames(self, title: str, file: str, under: Sequence[str]) -> str: ...
    def frame(self, layer: str, time: int) -> tuple[Any, str] | None: ...
    def film_rate(self) -> int: ...
    def set_film(self, rate: int, end: int) -> None: ...
    def time(self) -> int: ...
    def seek(self, time: int) -> None: ...
    def canvas(self) -> Any: ...


class Node(Protocol):
    """The part of krita.Node that is used (5.1 and later)."""

    def uniqueId(self) -> Any: ...  # noqa: N802
    def name(self) -> str: ...
    def type(self) -> str: ...
    def visible(self) -> bool: ...
    def setVisible(self, visible: bool) -> None: ...  # noqa: N802
    def setLocked(self, locked: bool) -> None: ...  # noqa: N802
    def childNodes(self) -> list[Node]: ...  # noqa: N802
    def parentNode(self) -> Node | None: ...  # noqa: N802
    def addChildNode(self, child: Node, above: Node | None) -> bool: ...  # noqa: N802
    def removeChildNode(self, child: Node) -> bool: ...  # noqa: N802
    def remove(self) -> bool: ...
    def clone(self) -> Node: ...
    def setPixelData(self, data: bytes, x: int, y: int, w: int, h: int) -> bool: ...  # noqa: N802
    def pixelData(self, x: int, y: int, w: int, h: int) -> Any: ...  # noqa: N802
    def projectionPixelData(self, x: int, y: int, w: int, h: int) -> Any: ...  # noqa: N802
    def thumbnail(self, w: int, h: int) -> QtGui.QImage: ...
    def setName(self, name: str) -> None: ...  # noqa: N802
    def hasKeyframeAtTime(self, time: int) -> bool: ...  # noqa: N802
    def pixelDataAtTime(self, x: int, y: int, w: int, h: int, time: int) -> Any: ...  # noqa: N802


class Selection(Protocol):
    def pixelData(self, x: int, y: int, w: int, h: int) -> Any: ...  # noqa: N802


class Document(Protocol):
    """The part of krita.Document that is used."""

    def width(self) -> int: ...
    def height(self) -> int: ...
    def resolution(self) -> int: ...
    def colorModel(self) -> str: ...  # noqa: N802
    def colorDepth(self) -> str: ...  # noqa: N802
    def colorProfile(self) -> str: ...  # noqa: N802
    def setColorSpace(self, model: str, depth: str, profile: str) -> bool: ...  # noqa: N802
    def rootNode(self) -> Node: ...  # noqa: N802
    def topLevelNodes(self) -> list[Node]: ...  # noqa: N802
    def nodeByUniqueID(self, node_id: QtCore.QUuid) -> Node | None: ...  # noqa: N802
    def activeNode(self) -> Node | None: ...  # noqa: N802
    def setActiveNode(self, node: Node) -> None: ...  # noqa: N802
    def createGroupLayer(self, name: str) -> Node: ...  # noqa: N802
    def createNode(self, name: str, kind: str) -> Node: ...  # noqa: N802
    def selection(self) -> Selection | None: ...
    def annotation(self, name: str) -> Any: ...
    def setAnnotation(self, name: str, description: str, data: bytes) -> None: ...  # noqa: N802
    def removeAnnotation(self, name: str) -> None: ...  # noqa: N802
    def setModified(self, modified: bool) -> None: ...  # noqa: N802
    def modified(self) -> bool: ...
    def refreshProjection(self) -> None: ...  # noqa: N802
    def pixelData(self, x: int, y: int, w: int, h: int) -> Any: ...  # noqa: N802
    def framesPerSecond(self) -> int: ...  # noqa: N802
    def setFramesPerSecond(self, rate: int) -> None: ...  # noqa: N802
    def setFullClipRangeStartTime(self, time: int) -> None: ...  # noqa: N802
    def setFullClipRangeEndTime(self, time: int) -> None: ...  # noqa: N802
    def fullClipRangeEndTime(self) -> int: ...  # noqa: N802
    def setPlayBackRange(self, start: int, end: int) -> None: ...  # noqa: N802
    def playBackEndTime(self) -> int: ...  # noqa: N802
    def currentTime(self) -> int: ...  # noqa: N802
    def setCurrentTime(self, time: int) -> None: ...  # noqa: N802
    def waitForDone(self) -> None: ...  # noqa: N802
    def close(self) -> bool: ...


class Application(Protocol):
    """The part of krita.Krita that is used."""

    def documents(self) -> list[Document]: ...
    def openDocument(self, path: str) -> Document | None: ...  # noqa: N802
    def batchmode(self) -> bool: ...
    def setBatchmode(self, quiet: bool) -> None: ...  # noqa: N802
    def activeDocument(self) -> Document | None: ...  # noqa: N802
    def action(self, name: str) -> Any: ...
    def createDocument(  # noqa: N802
        self, w: int, h: int, name: str, model: str, depth: str, profile: str, resolution: float
    ) -> Document: ...


class KritaDocument:
    """A `StoryDocument` in Krita."""

    def __init__(self, application: Application, document: Document) -> None:
        self._application, self._document = application, document
        self._preview: Node | None = None
        self._before_preview = ""
        self._previewed: set[Rect] = set()
        self._staying, self._ours, self._gone, self._stay_until = "", set[str](), False, 0.0

    def is_of(self, document: Document) -> bool:
        """Krita hands out a new wrapper every time; they are equal where the document is the same."""
        return self._document == document

    def is_open(self) -> bool:
        return any(self._document == one for one in self._application.documents())

    def size(self) -> tuple[int, int]:
        return self._document.width(), self._document.height()

    # ----------------------------------------------------------------------- the document's memory

    def load(self, name: str) -> bytes:
        return _bytes(self._document.annotation(name))

    def save(self, name: str, data: bytes) -> None:
        if data == self.load(name):
            return
        if data:
            self._document.setAnnotation(name, "StoryDiffusion", data)
        else:
            self._document.removeAnnotation(name)
        self._document.setModified(True)  # Krita asks before closing only if this says so

    # ----------------------------------------------------------------------- layers

    def layers(self) -> list[Layer]:
        """All layers, without masks and previews."""
        found: list[Layer] = []
        for node, parent in self._nodes():
            kind, name = node.type(), node.name()
            if kind.endswith("layer") and name != PREVIEW_NAME:
                found.append(Layer(_id(node), parent, name, kind == "grouplayer", node.visible()))
        return found

    def _nodes(self) -> Iterator[tuple[Node, str]]:
        """Every layer with its parent's id, those in groups too."""
        waiting = [(owned(node), "") for node in self._document.topLevelNodes()]
        while waiting:
            node, parent = waiting.pop()
            yield node, parent
            if node.type() == "grouplayer":
                waiting += [(owned(child), _id(node)) for child in node.childNodes()]

    def active_layer(self) -> str:
        """The one the artist is on, also while Krita has wandered off from it because of us."""
        active = self._active()
        return self._staying if self._wandered(active) else active

    def _active(self) -> str:
        node = owned(self._document.activeNode())
        return _id(node) if node is not None else ""

    def activate(self, layer: str) -> None:
        self._forget_stay()
        node = self._node(layer)
        if node is not None:
            self._document.setActiveNode(node)

    def _stay(self, added: Node | None = None) -> None:
        """Krita activates a layer that was added, or (6) any other when one is removed, some turns later:
        the artist goes on where they were. Called before a removal, after an addition."""
        if not (self._ours or self._gone):
            self._staying = self._active()
            QtCore.QTimer.singleShot(STAY_MS, self._return)
        if added is not None:
            self._ours.add(_id(added))
        else:
            self._gone = True
        self._stay_until = time.monotonic() + STAY_SECONDS

    def _wandered(self, active: str) -> bool:
        return active != self._staying and (active in self._ours or self._gone)

    def _return(self) -> None:
        if self.is_open() and self._wandered(self._active()):
            node = self._node(self._staying)
            if node is not None:
                self._document.setActiveNode(node)
            self._gone = False  # once: the next one that is active is the artist's
        if time.monotonic() > self._stay_until:
            self._forget_stay()
        elif self._ours or self._gone:
            QtCore.QTimer.singleShot(STAY_MS, self._return)

    def _forget_stay(self) -> None:
        self._ours.clear()
        self._gone = False

    def create_panel(self, title: str) -> str:
        group = self._document.createGroupLayer(title)
        self._document.rootNode().addChildNode(group, None)
        self._stay(group)
        return _id(group)

    def move_into(self, layer: str, group: str) -> None:
        node, into = self._node(layer), self._node(group)
        parent = node.parentNode() if node is not None else None
        if node is not None and into is not None and parent is not None:
            parent.removeChildNode(node)
            into.addChildNode(node, None)

    def add_take(self, group: str, title: str, picture: QtGui.QImage, rect: Rect, above: str) -> str:
        """A new layer with a picture in it, above another one or on top of the group.

        Pixels go in before the layer joins the document, so that undo and redo take it away and
        bring it back whole.
        """
        x, y, width, height = rect
        layer = self._document.createNode(title, "paintlayer")
        layer.setPixelData(self._native(pictures.cropped(picture, width, height)), x, y, width, height)
        into = self._node(group)
        assert into is not None
        below = self._node(above) if above else None
        into.addChildNode(layer, below)
        self._stay(layer)
        self._document.setModified(True)
        return _id(layer)

    def remove(self, layer: str) -> None:
        node = self._node(layer)
        if node is not None:
            node.setLocked(False)
            node.remove()

    def show(self, shown: Sequence[str], hidden: Sequence[str]) -> None:
        changed = False
        for layers, visible in ((shown, True), (hidden, False)):
            for layer in layers:
                node = self._node(layer)
                if node is not None and node.visible() != visible:
                    node.setVisible(visible)
                    changed = True
        if changed:
            self._document.setModified(True)
            self._document.refreshProjection()

    def _node(self, layer: str) -> Node | None:
        """Ids of layers that undo has taken out are not found: they are not in the document."""
        found = owned(self._document.nodeByUniqueID(QtCore.QUuid(layer))) if layer else None
        if found is None or hasattr(type(found), "addChildNode"):
            return found
        # Krita 5.1 hands out a paint layer as a bare QObject here, which it does not take back as a node
        return next((node for node, _ in self._nodes() if _id(node) == layer), None)

    # ----------------------------------------------------------------------- pixels

    def picture(self, layer: str, rect: Rect) -> QtGui.QImage:
        """What the artist sees of it, also of what they painted in its group just now."""
        node = self._node(layer)
        assert node is not None
        self._document.waitForDone()
        x, y, width, height = rect
        return self._eight_bit(_bytes(node.projectionPixelData(x, y, width, height)), width, height)

    def thumbnail(self, layer: str, size: int) -> QtGui.QImage | None:
        node = self._node(layer)
        return node.thumbnail(size, size) if node is not None else None

    def look(self, layer: str) -> str:
        image = self.thumbnail(layer, 64)
        return pictures.look(image) if image is not None else ""

    def selection(self, rect: Rect) -> QtGui.QImage | None:
        """The selection inside a panel's frame, or None if it leaves it out."""
        selection = self._document.selection()
        if selection is None:
            return None
        data = _bytes(selection.pixelData(*rect))
        return pictures.from_mask(data, rect[2], rect[3]) if any(data) else None

    def has_selection(self) -> bool:
        return self._document.selection() is not None

    def _plain(self) -> bool:
        """Whether the document's pixels are 8-bit sRGB, which needs no conversion."""
        document = self._document
        return (
            document.colorModel() == "RGBA"
            and document.colorDepth() == "U8"
            and "srgb" in document.colorProfile().lower()
        )

    def _native(self, image: QtGui.QImage) -> bytes:
        """A picture as pixels of this document's colour space."""
        data = pictures.to_pixels(image)
        if self._plain():
            return data
        document = self._document
        source = ("RGBA", "U8", SRGB)
        target = (document.colorModel(), document.colorDepth(), document.colorProfile())
        return self._converted(data, image.width(), image.height(), source, target)

    def _eight_bit(self, data: bytes, width: int, height: int) -> QtGui.QImage:
        """Pixels of this document's colour space as a picture."""
        if not self._plain():
            document = self._document
            source = (document.colorModel(), document.colorDepth(), document.colorProfile())
            data = self._converted(data, width, height, source, ("RGBA", "U8", SRGB))
        return pictures.from_pixels(data, width, height)

    def _converted(
        self, data: bytes, width: int, height: int, source: tuple[str, str, str], target: tuple[str, str, str]
    ) -> bytes:
        """Pixels in another colour space, by Krita's own colour management: through a document nobody sees."""
        scratch = self._application.createDocument(width, height, "scratch", *source, 72.0)
        try:
            layer = scratch.createNode("pixels", "paintlayer")
            layer.setPixelData(data, 0, 0, width, height)
            scratch.rootNode().addChildNode(layer, None)
            scratch.setColorSpace(*target)
            scratch.waitForDone()
            return _bytes(layer.pixelData(0, 0, width, height))
        finally:
            scratch.setModified(False)
            scratch.close()

    # ----------------------------------------------------------------------- previews

    def show_preview(self, picture: QtGui.QImage, rect: Rect) -> None:
        """On one locked layer over everything; neither its pixels nor its going mark the document modified.

        Adding and removing it are steps of Krita's undo history all the same. So it leaves empty and hidden:
        an undo that brings it back shows nothing.
        """
        modified = self._document.modified()
        node = self._preview
        if node is None or node.parentNode() is None:
            self._before_preview = self.active_layer()
            node = self._preview = self._document.createNode(PREVIEW_NAME, "paintlayer")
            node.setLocked(True)
            self._document.rootNode().addChildNode(node, None)
            self._stay(node)
        x, y, width, height = rect
        node.setPixelData(self._native(pictures.cropped(picture, width, height)), x, y, width, height)
        self._previewed.add(rect)
        self._document.refreshProjection()
        self._document.setModified(modified)

    def remove_previews(self) -> None:
        """All of them, also those that a crash or an undo left behind."""
        found = [node for node in map(owned, self._document.topLevelNodes()) if node.name() == PREVIEW_NAME]
        if not found:
            return
        if self._active() in [_id(node) for node in found]:  # removing it would activate any other
            self.activate(self._before_preview)
        self._stay()
        modified = self._document.modified()
        for node in found:
            node.setVisible(False)
            for x, y, width, height in self._previewed:
                length = len(_bytes(node.pixelData(x, y, 1, 1)))  # bytes of a pixel in this colour space
                node.setPixelData(bytes(width * height * length), x, y, width, height)
            node.setLocked(False)
            node.remove()
        self._preview = None
        self._previewed.clear()
        self._document.refreshProjection()
        self._document.setModified(modified)

    # ----------------------------------------------------------------------- the timeline

    def import_frames(self, title: str, file: str, under: Sequence[str]) -> str:
        """The animated layer of a file (`kra.write_animation`) as a new layer; its id, "" where Krita cannot read it.

        It lies over everything but the layers `under` which it has to be: its last keyframe stays to the end of
        time, and what comes later has to be seen. One step of undo.
        """
        source = self._opened(file)
        if source is None:
            return ""
        try:
            source.waitForDone()
            found = [owned(node) for node in source.topLevelNodes()]
            if not found:
                return ""
            made = owned(found[0].clone())
            made.setName(title)
            nodes = [owned(node) for node in self._document.topLevelNodes()]
            over = [i for i, node in enumerate(nodes) if _id(node) in under]
            added = self._document.rootNode().addChildNode(made, nodes[over[0] - 1] if over and over[0] else None)
        finally:
            source.close()
        if not added:
            return ""
        self._stay(made)
        self._document.setModified(True)
        return _id(made)

    def _opened(self, file: str) -> Document | None:
        """A document without a window, about which Krita asks nothing."""
        quiet = self._application.batchmode()
        self._application.setBatchmode(True)
        try:
            return self._application.openDocument(file)
        finally:
            self._application.setBatchmode(quiet)

    def frame(self, layer: str, time: int) -> tuple[QtGui.QImage, str] | None:
        """The keyframe at a time and a digest of its pixels, None where there is none."""
        node = self._node(layer)
        if node is None or not node.hasKeyframeAtTime(time):
            return None
        width, height = self.size()
        data = _bytes(node.pixelDataAtTime(0, 0, width, height, time))
        if not data:
            return None
        return self._eight_bit(data, width, height), pictures.digest(data)

    def film_rate(self) -> int:
        return self._document.framesPerSecond()

    def set_film(self, rate: int, end: int) -> None:
        """Frames a second (0: as they are), and the last frame that is played."""
        document = self._document
        if rate:
            document.setFramesPerSecond(rate)
        document.setFullClipRangeStartTime(0)
        document.setFullClipRangeEndTime(end)
        document.setPlayBackRange(0, end)
        if document.playBackEndTime() < end:  # Krita 5.1 counts it without the last
            document.setPlayBackRange(0, end + 1)

    def time(self) -> int:
        return self._document.currentTime()

    def seek(self, time: int) -> None:
        self._document.setCurrentTime(time)

    def canvas(self) -> QtGui.QImage:
        """All that is seen at the current time."""
        self._document.waitForDone()
        width, height = self.size()
        return self._eight_bit(_bytes(self._document.pixelData(0, 0, width, height)), width, height)


def _id(node: Node) -> str:
    return str(node.uniqueId().toString())


def _bytes(data: Any) -> bytes:
    """Krita's QByteArray as bytes, in PyQt5 and PyQt6."""
    return data.data() if hasattr(data, "data") else bytes(data or b"")


def panel_title(number: int) -> str:
    return tr("Panel {number}", number=number)


def take_title(number: int) -> str:
    return tr("Take {number}", number=number)
