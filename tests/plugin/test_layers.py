"""The adapter over a small krita: nodes with pixels, undo-free adding, colour spaces."""

from __future__ import annotations

import time
import uuid
from typing import Any

import pytest
from PyQt6.QtCore import QCoreApplication
from PyQt6.QtGui import QColor, QImage

from storydiffusion_krita import pictures
from storydiffusion_krita.layers import PREVIEW_NAME, STAY_SECONDS, KritaDocument

SIZE = 8


class Uid:
    def __init__(self) -> None:
        self.text = "{" + str(uuid.uuid4()) + "}"

    def toString(self) -> str:  # noqa: N802
        return self.text


class Node:
    def __init__(self, name: str, kind: str, depth: int = 1) -> None:
        self._name, self._kind, self._uid, self._visible, self.locked = name, kind, Uid(), True, False
        self.children: list[Node] = []
        self.parent: Node | None = None
        self.depth = depth
        self.pixels: dict[tuple[int, int], bytes] = {}

    def uniqueId(self) -> Uid:  # noqa: N802
        return self._uid

    def name(self) -> str:
        return self._name

    def type(self) -> str:
        return self._kind

    def visible(self) -> bool:
        return self._visible

    def setVisible(self, visible: bool) -> None:  # noqa: N802
        self._visible = visible

    def setLocked(self, locked: bool) -> None:  # noqa: N802
        self.locked = locked

    def childNodes(self) -> list[Node]:  # noqa: N802
        return list(self.children)

    def parentNode(self) -> Node | None:  # noqa: N802
        return self.parent

    def addChildNode(self, child: Node, above: Node | None) -> bool:  # noqa: N802
        self.children.insert(self.children.index(above) + 1 if above else len(self.children), child)
        child.parent = self
        return True

    def clone(self) -> Node:
        return Node(self._name, self._kind, self.depth)

    def setName(self, name: str) -> None:  # noqa: N802
        self._name = name

    def removeChildNode(self, child: Node) -> bool:  # noqa: N802
        self.children.remove(child)
        child.parent = None
        return True

    def remove(self) -> bool:
        assert self.parent is not None
        assert not self.locked
        return self.parent.removeChildNode(self)

    def setPixelData(self, data: bytes, x: int, y: int, w: int, h: int) -> bool:  # noqa: N802
        pixel = 4 * self.depth
        assert len(data) == w * h * pixel
        for row in range(h):
            for column in range(w):
                at = (row * w + column) * pixel
                self.pixels[x + column, y + row] = data[at : at + pixel]
        return True

    def pixelData(self, x: int, y: int, w: int, h: int) -> bytes:  # noqa: N802
        blank = b"\0" * 4 * self.depth
        return b"".join(self.pixels.get((x + i, y + j), blank) for j in range(h) for i in range(w))

    def projectionPixelData(self, x: int, y: int, w: int, h: int) -> bytes:  # noqa: N802
        for child in reversed(self.children):
            if child._visible and child.pixels:
                return child.pixelData(x, y, w, h)
        return self.pixelData(x, y, w, h)

    def thumbnail(self, w: int, h: int) -> QImage:
        return pictures.from_pixels(self.projectionPixelData(0, 0, SIZE, SIZE), SIZE, SIZE)


class Document:
    def __init__(self, application: Any, depth: str = "U8", size: int = SIZE) -> None:
        self.application, self.depth, self.side = application, depth, size
        self.root = Node("root", "grouplayer")
        self.annotations: dict[str, bytes] = {}
        self.is_modified = False
        self.active: Node | None = None
        self.closed = False

    def width(self) -> int:
        return self.side

    height = width

    def colorModel(self) -> str:  # noqa: N802
        return "RGBA"

    def colorDepth(self) -> str:  # noqa: N802
        return self.depth

    def colorProfile(self) -> str:  # noqa: N802
        return "sRGB-elle-V2-srgbtrc.icc"

    def rootNode(self) -> Node:  # noqa: N802
        return self.root

    def topLevelNodes(self) -> list[Node]:  # noqa: N802
        return self.root.childNodes()

    def activeNode(self) -> Node | None:  # noqa: N802
        return self.active

    def modified(self) -> bool:
        return self.is_modified

    def refreshProjection(self) -> None: ...  # noqa: N802
    def waitForDone(self) -> None: ...  # noqa: N802

    def setColorSpace(self, model: str, depth: str, profile: str) -> bool:  # noqa: N802
        for node in self.root.children:
            for at, pixel in node.pixels.items():
                if (self.depth, depth) == ("U8", "U16"):
                    node.pixels[at] = bytes(byte for value in pixel for byte in (value, value))
                if (self.depth, depth) == ("U16", "U8"):
                    node.pixels[at] = pixel[1::2]
            node.depth = 2 if depth == "U16" else 1
        self.depth = depth
        return True

    def _all(self, node: Node) -> list[Node]:
        return [node, *(found for child in node.children for found in self._all(child))]

    def nodeByUniqueID(self, uid: Any) -> Node | None:  # noqa: N802
        return next((n for n in self._all(self.root) if n.uniqueId().toString() == uid.toString()), None)

    def setActiveNode(self, node: Node) -> None:  # noqa: N802
        self.active = node

    def createGroupLayer(self, name: str) -> Node:  # noqa: N802
        return Node(name, "grouplayer")

    def createNode(self, name: str, kind: str) -> Node:  # noqa: N802
        return Node(name, kind, 2 if self.depth == "U16" else 1)

    def selection(self) -> None:
        return None

    def annotation(self, name: str) -> bytes:
        return self.annotations.get(name, b"")

    def setAnnotation(self, name: str, description: str, data: bytes) -> None:  # noqa: N802
        self.annotations[name] = data

    def removeAnnotation(self, name: str) -> None:  # noqa: N802
        self.annotations.pop(name, None)

    def setModified(self, modified: bool) -> None:  # noqa: N802
        self.is_modified = modified

    def close(self) -> bool:
        self.closed = True
        return True


class Application:
    def __init__(self) -> None:
        self.opened: list[Document] = []
        self.made: list[Document] = []
        #: what is in files, and whether Krita was told to ask nothing when each was opened
        self.files: dict[str, Document] = {}
        self.quiet, self.quiet_at = False, list[bool]()

    def batchmode(self) -> bool:
        return self.quiet

    def setBatchmode(self, quiet: bool) -> None:  # noqa: N802
        self.quiet = quiet

    def openDocument(self, path: str) -> Document | None:  # noqa: N802
        self.quiet_at.append(self.quiet)
        return self.files.get(path)

    def documents(self) -> list[Document]:
        return self.opened

    def activeDocument(self) -> Document:  # noqa: N802
        return self.opened[0]

    def createDocument(self, w: int, h: int, name: str, model: str, depth: str, *more: Any) -> Document:  # noqa: N802
        self.made.append(Document(self, depth, w))
        return self.made[-1]


def painted(colour: str = "#ff8000", side: int = SIZE) -> QImage:
    image = QImage(side, side, QImage.Format.Format_ARGB32)
    image.fill(QColor(colour))
    return image


@pytest.fixture(params=["U8", "U16"])
def document(request: Any, application: object) -> tuple[KritaDocument, Document]:
    krita = Application()
    krita.opened.append(Document(krita, request.param))
    return KritaDocument(krita, krita.opened[0]), krita.opened[0]  # type: ignore[arg-type]


RECT = (0, 0, SIZE, SIZE)


def test_a_result_comes_back_as_the_pixels_it_was(document: Any) -> None:
    adapter, krita = document
    group = adapter.create_panel("Panel 1")
    adapter.add_take(group, "Take 1", painted(), RECT, "")
    image = adapter.picture(group, RECT)
    assert QColor(image.pixel(3, 3)).name() == "#ff8000"
    assert krita.is_modified
    assert all(one.closed for one in krita.application.made)


def test_a_later_take_lies_between_the_earlier_one_and_what_was_painted(document: Any) -> None:
    adapter, krita = document
    group = adapter.create_panel("Panel 1")
    first = adapter.add_take(group, "Take 1", painted(), RECT, "")
    krita.root.children[0].addChildNode(Node("scarf", "paintlayer"), None)
    adapter.add_take(group, "Take 2", painted("#000000"), RECT, first)
    assert [node.name() for node in krita.root.children[0].children] == ["Take 1", "Take 2", "scarf"]


def test_a_result_is_put_into_its_frame_alone(document: Any) -> None:
    adapter, krita = document
    group = adapter.create_panel("Panel 1")
    adapter.add_take(group, "Take 1", painted(side=64), (2, 3, 4, 2), "")
    assert set(krita.root.children[0].children[0].pixels) == {(x, y) for x in range(2, 6) for y in (3, 4)}


def test_previews_are_locked_replaced_and_gone_without_a_trace(document: Any) -> None:
    adapter, krita = document
    group = adapter.create_panel("Panel 1")
    krita.is_modified = False
    adapter.show_preview(painted("#111111"), RECT)
    adapter.show_preview(painted("#222222"), RECT)
    assert [(node.name(), node.locked) for node in krita.root.children[1:]] == [(PREVIEW_NAME, True)]
    preview = krita.root.children[1]
    assert not any(layer.name == PREVIEW_NAME for layer in adapter.layers())
    adapter.remove_previews()
    assert [node.uniqueId().toString() for node in krita.root.children] == [group]
    assert not preview.visible()
    assert not any(any(pixel) for pixel in preview.pixels.values()), "an undo would bring half a picture back"
    assert not krita.is_modified, "a preview is no change of the artist's document"


def test_a_preview_that_a_crash_left_behind_is_removed(document: Any) -> None:
    adapter, krita = document
    krita.root.addChildNode(Node(PREVIEW_NAME, "paintlayer"), None)
    adapter.remove_previews()
    assert krita.root.children == []


def test_layers_are_listed_with_their_parents_without_masks(document: Any) -> None:
    adapter, krita = document
    group = adapter.create_panel("Panel 1")
    take = adapter.add_take(group, "Take 1", painted(), RECT, "")
    krita.root.children[0].addChildNode(Node("mask", "transparencymask"), None)
    assert {(layer.id, layer.parent, layer.group) for layer in adapter.layers()} == {(group, "", True),
                                                                                     (take, group, False)}  # fmt: skip


class Bare:
    """A paint layer as Krita 5.1 finds it by its id: PyQt5 lets its slots be called, but it is no node."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)


def test_a_layer_found_by_its_id_is_one_that_krita_takes_back(document: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, krita = document
    found = krita.nodeByUniqueID

    def bare(uid: Any) -> Any:
        node = found(uid)
        return Bare(node) if node is not None and node.type() == "paintlayer" else node

    monkeypatch.setattr(krita, "nodeByUniqueID", bare)
    group = adapter.create_panel("Panel 1")
    first = adapter.add_take(group, "Take 1", painted(), RECT, "")
    krita.root.children[0].addChildNode(Node("paint", "paintlayer"), None)
    adapter.add_take(group, "Take 2", painted(), RECT, first)
    assert [node.name() for node in krita.root.children[0].children] == ["Take 1", "Take 2", "paint"]


def turns(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        QCoreApplication.processEvents()


def test_the_artist_stays_on_their_layer_when_others_are_added(document: Any) -> None:
    adapter, krita = document
    krita.application.opened = [krita]
    mine, other = Node("mine", "paintlayer"), Node("other", "paintlayer")
    for node in (mine, other):
        krita.root.addChildNode(node, None)
    krita.active = mine
    group = adapter.create_panel("Panel 1")
    adapter.add_take(group, "Take 1", painted(), RECT, "")
    turns(0.05)
    krita.active = krita.root.children[-1].children[0]  # Krita does this some turns later
    turns(0.1)
    assert krita.active is mine
    krita.active = other  # what the artist does holds
    turns(0.1)
    assert krita.active is other


def test_a_preview_that_goes_does_not_move_the_artist(document: Any) -> None:
    adapter, krita = document
    mine = Node("mine", "paintlayer")
    krita.root.addChildNode(mine, None)
    krita.active = mine
    adapter.show_preview(painted(), RECT)
    krita.active = krita.root.children[-1]
    adapter.remove_previews()
    assert krita.active is mine


def test_a_preview_that_krita_activated_late_goes_without_moving_the_artist(document: Any) -> None:
    adapter, krita = document
    krita.application.opened = [krita]
    mine, top = Node("mine", "paintlayer"), Node("top", "paintlayer")
    krita.root.addChildNode(mine, None)
    krita.root.addChildNode(top, None)
    krita.active = mine
    adapter.show_preview(painted(), RECT)
    turns(STAY_SECONDS + 0.1)
    krita.active = krita.root.children[-1]  # a busy Krita does this when nobody watches any more
    adapter.remove_previews()
    krita.active = top
    turns(0.1)
    assert krita.active is mine


def test_saving_the_same_again_does_not_modify(document: Any) -> None:
    adapter, krita = document
    adapter.save("storydiffusion/story", b"{}")
    assert krita.is_modified
    krita.is_modified = False
    adapter.save("storydiffusion/story", b"{}")
    assert not krita.is_modified
    adapter.save("storydiffusion/story", b"")
    assert krita.annotations == {}


@pytest.mark.parametrize(("canvas", "size"), [((80, 80), (64, 64)), ((160, 100), (320, 192)), ((100, 160), (192, 320)),
                                              ((400, 100), (512, 128))])  # fmt: skip
def test_what_is_sent_and_what_comes_back_lie_on_each_other(
    canvas: tuple[int, int], size: tuple[int, int], application: object
) -> None:
    image = QImage(*canvas, QImage.Format.Format_ARGB32)
    image.fill(QColor("#ffffff"))
    for x in range(canvas[0] // 2, canvas[0]):
        for y in range(canvas[1]):
            image.setPixelColor(x, y, QColor("#000000"))
    sent = pictures.padded(image, size)
    assert (sent.width(), sent.height()) == size
    back = pictures.cropped(sent, *canvas)
    assert (back.width(), back.height()) == canvas
    middle, y = canvas[0] // 2, canvas[1] // 2
    assert back.pixelColor(middle - 4, y).lightness() > 200
    assert back.pixelColor(middle + 4, y).lightness() < 55


def test_a_mask_keeps_its_lines_and_nothing_outside_is_chosen(application: object) -> None:
    data = bytearray(100 * 60)
    data[30 * 100 + 50] = 255
    mask = pictures.padded(pictures.from_mask(bytes(data), 100, 60), (64, 64), fill=False)
    assert mask.width() == mask.height() == 100
    chosen = [(x, y) for x in range(100) for y in range(100) if mask.pixelColor(x, y).lightness()]
    assert chosen == [(50, 50)]


def test_outside_a_selection_not_a_bit_changes(application: object) -> None:
    base = QImage(64, 32, QImage.Format.Format_ARGB32)
    for x in range(64):
        for y in range(32):
            base.setPixelColor(x, y, QColor(x * 4, y * 8, (x * y) % 256))
    chosen = bytes(255 if x < 20 else 0 for _ in range(32) for x in range(64))
    result = pictures.inside(base, painted("#ff0000", 16), pictures.from_mask(chosen, 64, 32))
    for x in range(64):
        for y in range(32):
            expected = "#ff0000" if x < 20 else base.pixelColor(x, y).name()
            assert result.pixelColor(x, y).name() == expected, (x, y)


def test_alpha_survives_the_way_there_and_lies_on_white_in_a_sheet(application: object) -> None:
    clear = QImage(4, 4, QImage.Format.Format_ARGB32)
    clear.fill(0)
    assert pictures.decode(pictures.encode(clear)).pixelColor(0, 0).alpha() == 0
    assert pictures.on_white(clear).pixelColor(0, 0).name() == "#ffffff"
    with pytest.raises(ValueError):
        pictures.decode(b"no picture")


def test_krita_moving_to_another_layer_when_one_is_removed_does_not_move_the_artist(document: Any) -> None:
    """Krita 6 activates the topmost layer some turns after a removal."""
    adapter, krita = document
    krita.application.opened = [krita]
    mine, top, third = (Node(name, "paintlayer") for name in ("mine", "top", "third"))
    for node in (mine, top, third):
        krita.root.addChildNode(node, None)
    krita.active = mine
    adapter.show_preview(painted("#111111"), RECT)
    adapter.remove_previews()
    turns(0.03)
    krita.active = top
    assert adapter.active_layer() == mine.uniqueId().toString(), "the docker would follow Krita there"
    turns(0.1)
    assert krita.active is mine
    krita.active = third  # what the artist does next holds
    turns(0.1)
    assert krita.active is third
    assert adapter.active_layer() == third.uniqueId().toString()


# --------------------------------------------------------------------------- the timeline


def with_film(application: Application) -> tuple[KritaDocument, Document, Document]:
    """A document of two panels, and a file with one animated layer."""
    document, source = Document(application), Document(application)
    application.opened.append(document)
    for name in ("Panel 1", "Panel 2"):
        document.root.addChildNode(Node(name, "grouplayer"), None)
    source.root.addChildNode(Node("film", "paintlayer"), None)
    application.files["film.kra"] = source
    return KritaDocument(application, document), document, source


def test_frames_come_as_a_copy_of_the_files_layer_on_top_of_everything(application: Any) -> None:
    krita = Application()
    one, document, source = with_film(krita)
    layer = one.import_frames("Panel 1 → 2", "film.kra", [])
    names = [node.name() for node in document.topLevelNodes()]
    assert names == ["Panel 1", "Panel 2", "Panel 1 → 2"]
    assert layer == document.topLevelNodes()[-1].uniqueId().toString()
    assert source.topLevelNodes()[0].name() == "film", "the file's own layer was taken away"
    assert source.closed
    assert document.modified()
    assert (krita.quiet_at, krita.batchmode()) == ([True], False), "Krita would have asked, or never asks again"


def test_frames_that_come_earlier_lie_under_those_that_come_later(application: Any) -> None:
    one, document, _ = with_film(Application())
    later = one.import_frames("Panel 2 → 3", "film.kra", [])
    one.import_frames("Panel 1 → 2", "film.kra", [later])
    names = [node.name() for node in document.topLevelNodes()]
    assert names == ["Panel 1", "Panel 2", "Panel 1 → 2", "Panel 2 → 3"]


def test_a_file_without_a_layer_or_none_at_all_changes_nothing(application: Any) -> None:
    krita = Application()
    one, document, source = with_film(krita)
    source.root.children.clear()
    assert one.import_frames("film", "film.kra", []) == ""
    assert one.import_frames("film", "nowhere.kra", []) == ""
    assert source.closed
    assert len(document.topLevelNodes()) == 2
    assert not document.modified()


def test_the_file_is_closed_whatever_krita_says(application: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one, document, source = with_film(Application())

    def refuse(child: Node, above: Node | None) -> bool:
        raise RuntimeError("no")

    monkeypatch.setattr(document.root, "addChildNode", refuse)
    with pytest.raises(RuntimeError):
        one.import_frames("film", "film.kra", [])
    assert source.closed
