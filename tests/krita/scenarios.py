"""What an artist does in Krita. Each function is one life of Krita; `runner.Stage` is what it has at hand."""

from __future__ import annotations

import colorsys
import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from storydiffusion_scenario.qt import QtCore, QtGui, QtWidgets
from storydiffusion_scenario.runner import Stage, Until

PLUGIN = "storydiffusion_krita"
SCRIPT = """\
[Mira] walks in the forest during the day # The day began as it always did.
[Mira] is waving at the beach at sunset # She said goodbye to the sea.
[Mira] jumps in the meadow in the snow # And then, snow!
[Mira] is reading in the library at night # Nobody will believe me."""

DESCRIPTION = "a cat in a plain coat"
#: Some of the colours that the embedded model knows, as it draws them.
PALETTE = ("#d9342b", "#f8d53c", "#3fa045", "#2d6bd2", "#8a45b8", "#f79ac0")
SEED = 3
HUES = 24


def top_level(kind: type) -> Any:
    shown = [one for one in QtWidgets.QApplication.topLevelWidgets() if isinstance(one, kind) and one.isVisible()]
    return shown[0] if shown else None


def import_plugin(stage: Stage) -> Generator[Any, Any, Any]:
    """Tools > Scripts > Import Python Plugin from File, and yes to everything."""
    yield 2
    stage.action("plugin_importer_file")
    yield Until("the file dialog", lambda: top_level(QtWidgets.QFileDialog))
    dialog = top_level(QtWidgets.QFileDialog)
    dialog.findChild(QtWidgets.QLineEdit, "fileNameEdit").setText(os.environ["STORYDIFFUSION_ZIP"])
    yield 0.3
    stage.screenshot("import")
    stage.click(dialog.findChild(QtWidgets.QDialogButtonBox).button(QtWidgets.QDialogButtonBox.StandardButton.Open))
    yield Until("the question whether to enable it", lambda: top_level(QtWidgets.QMessageBox), 60)
    box = top_level(QtWidgets.QMessageBox)
    stage.saw["question"] = box.text()
    stage.screenshot("enable")
    stage.click(box.button(QtWidgets.QMessageBox.StandardButton.Yes))
    yield Until("the dialog's end", lambda: not top_level(QtWidgets.QMessageBox))
    yield 0.5
    stage.saw["enabled"] = stage.krita.readSetting("python", f"enable_{PLUGIN}", "")


# --------------------------------------------------------------------------- looking


def docker() -> Any:
    from storydiffusion_krita import plugin

    return plugin.studio().docker


def controller(stage: Stage) -> Any:
    from storydiffusion_krita import plugin

    return plugin.studio().controller_of(stage.krita.activeDocument())


def digest(node: Any, size: tuple[int, int]) -> str:
    return hashlib.blake2b(bytes(node.projectionPixelData(0, 0, *size)), digest_size=8).hexdigest()


def layers(document: Any) -> list[dict[str, Any]]:
    """All layers, bottom first, with their pixels' digest."""
    document.waitForDone()
    found: list[dict[str, Any]] = []

    def look(node: Any, parent: str) -> None:
        one = {"id": node.uniqueId().toString(), "name": node.name(), "type": node.type(), "parent": parent}
        found.append({**one, "visible": node.visible(), "pixels": digest(node, (document.width(), document.height()))})
        for child in node.childNodes():
            look(child, one["id"])

    for node in document.topLevelNodes():
        look(node, "")
    return found


def groups(document: Any) -> list[Any]:
    return [node for node in document.topLevelNodes() if node.type() == "grouplayer"]


def picture(node: Any, document: Any) -> QtGui.QImage:
    width, height = document.width(), document.height()
    data = bytes(node.projectionPixelData(0, 0, width, height))
    return QtGui.QImage(data, width, height, QtGui.QImage.Format.Format_ARGB32).copy()


def shown() -> dict[str, Any]:
    """What the docker says, in words."""
    one = docker()
    rows = [one.panels.rows[name] for name in one.panels.order]
    return {
        "panels": [
            {
                "prompt": row.prompt.toPlainText(),
                "caption": row.caption.toPlainText(),
                "state": (row.state.text() if row.state.isVisible() else row.short.text()),
                "take": row.take.text(),
                "picture": row.thumbnail._image is not None and not row.thumbnail._image.isNull(),
            }
            for row in rows
        ],
        "characters": [(r.name.text(), r.description.toPlainText()) for r in one.characters.rows.values()],
        "style": one.style_box.currentText(),
        "model": one.model_box.currentText(),
        "button": one.generate.text(),
    }


def colours(image: QtGui.QImage) -> dict[tuple[int, int], tuple[float, float, float]]:
    """Hue, saturation and value of every second pixel."""
    found = {}
    for y in range(0, image.height(), 2):
        for x in range(0, image.width(), 2):
            pixel = image.pixel(x, y)
            found[x, y] = colorsys.rgb_to_hsv((pixel >> 16 & 255) / 255, (pixel >> 8 & 255) / 255, (pixel & 255) / 255)
    return found


# --------------------------------------------------------------------------- doing


def arrange(stage: Stage) -> Generator[Any, Any, Any]:
    """The window as large as the screen, the docker as high as it can be."""
    main = stage.window.qwindow()
    main.setGeometry(0, 0, 1600, 1000)
    for one in main.findChildren(QtWidgets.QDockWidget):
        if one.objectName() in ("ColorSelectorNg", "PresetDocker", "sharedtooldocker"):
            one.setVisible(False)
    found = main.findChild(QtWidgets.QDockWidget, "storydiffusion_docker")
    stage.saw["docker"] = found is not None
    if not found.isVisible():  # from 5.2 on Krita hides what is new
        stage.action("storydiffusion_show")
        yield Until("the docker", found.isVisible, 5)
    layer_box = main.findChild(QtWidgets.QDockWidget, "KisLayerBox")
    yield 0.3
    main.resizeDocks([layer_box, found], [240, 700], QtCore.Qt.Orientation.Vertical)
    main.resizeDocks([found], [360], QtCore.Qt.Orientation.Horizontal)
    yield 0.3


def ready(stage: Stage) -> Until:
    from storydiffusion_krita import plugin

    return Until("the backend", lambda: plugin.studio().backend.status.state == "ready", 60)


def made(stage: Stage, seconds: float = 240) -> Until:
    return Until("the panels", lambda: not controller(stage).working, seconds)


def type_into(stage: Stage, edit: QtWidgets.QWidget, text: str) -> Generator[Any, Any, Any]:
    """Pasted, as a writer does; clicked again where the docker was still settling under the first click."""
    for patience in (3, 5, 15):
        stage.click(edit)
        try:
            yield Until("the keyboard in the field", edit.hasFocus, patience)
        except TimeoutError:
            if patience == 15:
                raise
        else:
            break
    stage.press("ctrl+a")
    QtWidgets.QApplication.clipboard().setText(text)
    stage.press("ctrl+v")
    yield 0.4


def write_story(stage: Stage) -> Generator[Any, Any, Any]:
    one = docker()
    controller(stage).set_settings(seed=SEED)  # so that every run sees the same pictures
    stage.click(one.characters.add)
    yield Until("a character's row", lambda: one.characters.rows, 5)
    row = next(iter(one.characters.rows.values()))
    yield from type_into(stage, row.name, "Mira")
    yield from type_into(stage, row.description, DESCRIPTION)
    stage.click(one.script_button)
    yield Until("the script box", one.script.edit.isVisible, 5)
    yield from type_into(stage, one.script.edit, SCRIPT)
    yield Until("four panels", lambda: len(one.panels.rows) == 4, 5)
    stage.saw["problems"] = one.script.problems.text()


def begin_work(stage: Stage, button: QtWidgets.QWidget) -> Generator[Any, Any, Any]:
    """A click, and another one where the list moved under it: it follows the layer that Krita made active."""
    for patience in (6, 6, 20):
        stage.click(button)
        try:
            yield Until("work to begin", lambda: controller(stage).working, patience)
        except TimeoutError:
            if patience == 20:
                raise
        else:
            return


def generate(stage: Stage) -> Generator[Any, Any, Any]:
    yield from begin_work(stage, docker().generate)


def undo_and_redo(stage: Stage, document: Any) -> Generator[Any, Any, Any]:
    """Undo until no panel is left, redo until all are back: a busy Krita passes over a step that comes too soon."""
    before, steps = layers(document), 0
    while groups(document) and steps < 40:
        stage.action("edit_undo")
        steps += 1
        yield 0.25
        document.waitForDone()
    stage.saw["undone"] = {"steps": steps, "groups": len(groups(document))}
    yield Until("the docker to see it", lambda: not any(p["picture"] for p in shown()["panels"]), 10)
    stage.screenshot("undone")
    names = [one["name"] for one in before]
    while [one["name"] for one in layers(document)] != names and steps > -20:
        stage.action("edit_redo")
        steps -= 1
        yield 0.25
    yield 1.5
    stage.saw["redone"] = {"before": before, "after": layers(document), "shown": shown()}


def where_clothes_are(image: QtGui.QImage) -> dict[tuple[int, int], tuple[float, float, float]]:
    """`colours` of the lower middle, where a figure's body is."""
    width, height = image.width(), image.height()
    inside = lambda x, y: 0.15 * width < x < 0.85 * width and 0.5 * height < y < 0.92 * height  # noqa: E731
    return {at: colour for at, colour in colours(image).items() if inside(*at)}


def hue_of_clothes(images: list[QtGui.QImage]) -> float:
    """Of the hues that are on the body wherever the story goes (most is what the poorest panel has most of) the
    one that is not the fur's, which is most on the head."""
    common, head = [HUES * HUES] * HUES, [0] * HUES
    for image in images:
        bins = [0] * HUES
        for (_, y), (hue, saturation, value) in colours(image).items():
            if saturation > 0.3 and value > 0.2:
                body = 0.5 < y / image.height() < 0.92
                (bins if body else head)[int(hue * HUES) % HUES] += 1
        common = [min(pair) for pair in zip(common, bins)]  # noqa: B905
    fur = max(range(HUES), key=lambda i: min(head[i], common[i] * 4))
    apart = [i for i in range(HUES) if min((i - fur) % HUES, (fur - i) % HUES) > 1]
    return (max(apart, key=lambda i: common[i]) + 0.5) / HUES


def share_of(image: QtGui.QImage, colour: QtGui.QColor, spots: list[tuple[int, int]] | None = None) -> float:
    """At how many of these pixels, or of all, a picture has nearly this colour."""
    spots = spots or [(x, y) for y in range(0, image.height(), 4) for x in range(0, image.width(), 4)]
    wanted = colour.getRgb()[:3]
    near = [all(abs(a - b) < 60 for a, b in zip(image.pixelColor(*at).getRgb()[:3], wanted)) for at in spots]  # noqa: B905
    return sum(near) / len(near)


@dataclass
class Paint:
    colour: QtGui.QColor
    spots: list[tuple[int, int]]


def paint_clothes(stage: Stage, document: Any, group: Any) -> Generator[Any, Any, Any]:
    """Flat paint on a new layer in a panel's group, where its clothes are: the colour of the model's that the
    story has least of."""
    pictures = [picture(one, document) for one in groups(document)]
    hue, image = hue_of_clothes(pictures), picture(group, document)
    width, height = image.width(), image.height()
    near = {
        at for at, (h, s, _) in where_clothes_are(image).items() if abs((h - hue + 0.5) % 1 - 0.5) < 0.06 and s > 0.2
    }
    # single pixels are noise; what lies between two of the same line is a stripe, a fold, an outline
    rows: dict[int, list[int]] = {}
    for x, y in near:
        if sum((x + i, y + j) in near for i in (-2, 0, 2) for j in (-2, 0, 2)) > 5:
            rows.setdefault(y, []).append(x)
    spots = [(x, y) for y, xs in rows.items() for x in range(min(xs), max(xs) + 1, 2)]
    palette = [QtGui.QColor(one) for one in PALETTE]
    paint = Paint(min(palette, key=lambda one: max(share_of(seen, one) for seen in pictures)), spots)
    clothes = QtGui.QImage(width, height, QtGui.QImage.Format.Format_ARGB32)
    clothes.fill(0)
    for x, y in spots:
        for at in ((x, y), (x + 1, y), (x, y + 1), (x + 1, y + 1)):
            if clothes.valid(*at):
                clothes.setPixelColor(*at, paint.colour)
    layer = document.createNode("paint", "paintlayer")
    group.addChildNode(layer, None)
    layer.setPixelData(bytes(clothes.constBits().asstring(clothes.sizeInBytes())), 0, 0, width, height)
    document.setModified(True)
    document.refreshProjection()
    yield 1.5
    document.waitForDone()
    stage.screenshot("painted")
    stage.saw["painted"] = {
        "hue": hue,
        "colour": paint.colour.name(),
        "spots": len(spots),
        "seen": share_of(picture(group, document), paint.colour, spots),
        "order": [node.name() for node in group.childNodes()],
    }
    return paint


def regenerate(stage: Stage, document: Any, painted: int, number: int, paint: Paint) -> Generator[Any, Any, Any]:
    """Another panel again, by its button; what its request says and carries."""
    from storydiffusion_krita.client import Client

    sent: list[Any] = []
    submit = Client.submit

    def listening(self: Any, request: Any, images: Any, key: str) -> str:
        sent.append((request, [bytes(image) for image in images]))
        return str(submit(self, request, images, key))

    one = docker()
    ids = list(one.panels.order)
    before = picture(groups(document)[number], document)
    Client.submit = listening  # type: ignore[method-assign]
    try:
        yield from begin_work(stage, one.panels.rows[ids[number]].again)
        yield made(stage)
    finally:
        Client.submit = submit  # type: ignore[method-assign]
    yield 1
    request, images = sent[0]
    sent_pictures = {one["panel"]: QtGui.QImage.fromData(images[one["image"]]) for one in request["pictures"]}
    group = groups(document)[number]
    stage.saw["regenerated"] = {
        "kind": request["kind"],
        "panels": request["panels"],
        "wanted": ids[number],
        "painted": ids[painted],
        "carried": {name: share_of(image, paint.colour, paint.spots) for name, image in sent_pictures.items()},
        "takes": [node.name() for node in group.childNodes()],
        "follows": {
            "before": share_of(before, paint.colour),
            "after": share_of(picture(group, document), paint.colour),
            "painted": share_of(sent_pictures[ids[painted]], paint.colour),
        },
        "shown": shown(),
    }


def cancel(stage: Stage, document: Any) -> Generator[Any, Any, Any]:
    """Everything again, and then not."""
    before, story = layers(document), bytes(document.annotation("storydiffusion/story"))
    yield from generate(stage)
    yield Until("the sampling", lambda: docker().progress_bar._fraction, 60)
    yield 0.2
    stage.screenshot("working")
    stage.click(docker().cancel)
    yield Until("the end of work", lambda: not controller(stage).working, 3)
    yield 1.5
    stage.saw["cancelled"] = {
        "before": before,
        "after": layers(document),
        "story": bytes(document.annotation("storydiffusion/story")) == story,
        "shown": shown(),
    }


def open_file(stage: Stage) -> Generator[Any, Any, Any]:
    document = stage.krita.openDocument(os.environ["STORYDIFFUSION_FILE"])
    document.setBatchmode(True)
    stage.window.addView(document)
    yield Until("the story in the docker", lambda: docker().panels.rows and docker().isVisible(), 10)
    yield Until("the models by their titles", lambda: docker().model_box.count() > 1, 60)
    yield 2


def tell_story(stage: Stage) -> Generator[Any, Any, Any]:
    """From an empty page to a file that is opened again."""
    yield from arrange(stage)
    yield ready(stage)
    document = stage.krita.createDocument(256, 256, "story", "RGBA", "U8", "", 72.0)
    document.setBatchmode(True)
    stage.window.addView(document)
    yield Until("the docker to see the document", lambda: docker().characters.isVisible(), 5)
    yield from write_story(stage)
    began = time.monotonic()
    yield from generate(stage)
    yield made(stage)
    stage.saw["seconds"] = time.monotonic() - began
    yield 1
    stage.screenshot("made")
    stage.saw["made"] = {"layers": layers(document), "shown": shown()}
    yield from undo_and_redo(stage, document)
    paint = yield from paint_clothes(stage, document, groups(document)[1])
    yield from regenerate(stage, document, 1, 2, paint)
    stage.screenshot("regenerated")
    yield from cancel(stage, document)
    document.saveAs(os.environ["STORYDIFFUSION_FILE"])
    stage.saw["saved"] = {"layers": layers(document), "shown": shown(), "modified": document.modified()}
    document.close()
    yield Until("the docker without a document", lambda: not docker().characters.isVisible(), 5)
    yield from open_file(stage)
    stage.saw["reopened"] = {"layers": layers(stage.krita.activeDocument()), "shown": shown()}


def go_on(stage: Stage) -> Generator[Any, Any, Any]:
    """Another day: the file is opened in a new Krita, and a panel is made again."""
    yield from arrange(stage)
    yield ready(stage)
    yield from open_file(stage)
    document = stage.krita.activeDocument()
    stage.saw["reopened"] = {"layers": layers(document), "shown": shown()}
    stage.screenshot("reopened")
    one = docker()
    yield from begin_work(stage, one.panels.rows[one.panels.order[0]].again)
    yield made(stage)
    yield 1
    stage.saw["again"] = {"layers": layers(document), "shown": shown()}
    yield from save_and_kill(stage, document)


def takes(document: Any) -> list[int]:
    return [sum(node.name().startswith("Take") for node in group.childNodes()) for group in groups(document)]


def save_and_kill(stage: Stage, document: Any) -> Generator[Any, Any, Any]:
    """Everything again: saved by its shortcut in the middle of it; then the backend is killed."""
    from storydiffusion_krita import plugin

    before, backend, written = takes(document), plugin.studio().backend, os.path.getmtime(document.fileName())
    yield from generate(stage)
    names = lambda: [node.name() for node in document.topLevelNodes()]  # noqa: E731
    yield Until("a preview", lambda: "StoryDiffusion preview" in names(), 60)
    stage.screenshot("previewed")
    stage.saw["previewed"] = True
    stage.press("ctrl+s")
    yield Until("the file", lambda: os.path.getmtime(document.fileName()) > written, 10)
    pid, began = backend._process.pid, time.monotonic()
    stage.saw["working"] = controller(stage).working
    os.kill(pid, signal.SIGKILL)
    yield Until("the docker to say so", lambda: backend.status.state != "ready", 5)
    said = time.monotonic() - began
    stage.screenshot("killed")
    yield Until("another backend", lambda: backend.status.state == "ready", 30)
    back = time.monotonic() - began
    yield made(stage)
    yield 1
    stage.saw["killed"] = {"said": said, "back": back, "before": before, "takes": takes(document)}
    stage.screenshot("after")


def wait_for_backend(stage: Stage) -> Generator[Any, Any, Any]:
    from storydiffusion_krita import plugin

    yield ready(stage)
    stage.saw["backend"] = plugin.studio().backend._process.pid
    stage.stay = True


# --------------------------------------------------------------------------- films


def strip_of(stage: Stage, number: int) -> Any:
    """The way from a panel to the next: its row, and the story's part of it."""
    story = controller(stage).story.panels[number]
    return docker().panels.strips[story.id], story.strip


def raw(node: Any, document: Any, time: int) -> bytes:
    data = node.pixelDataAtTime(0, 0, document.width(), document.height(), time)
    return bytes(data.data() if hasattr(data, "data") else data)


def keyframes(stage: Stage, document: Any, number: int) -> dict[str, Any]:
    """What lies on the timeline for a way between panels, and what the canvas shows at its times."""
    strip = strip_of(stage, number)[1]
    node = next(one for one in document.topLevelNodes() if one.uniqueId().toString() == strip.layer)
    times = [time for time in range(document.fullClipRangeEndTime() + 1) if node.hasKeyframeAtTime(time)]
    return {
        "times": times,
        "pixels": {time: hashlib.blake2b(raw(node, document, time), digest_size=8).hexdigest() for time in times},
        "rate": document.framesPerSecond(),
        "end": document.fullClipRangeEndTime(),
        "played": document.playBackEndTime(),
        "visible": node.visible(),
        "name": node.name(),
    }


def canvas_at(document: Any, times: list[int]) -> Generator[Any, Any, dict[int, str]]:
    found = {}
    for at in times:
        document.setCurrentTime(at)
        document.waitForDone()
        yield 0.1
        data = document.pixelData(0, 0, document.width(), document.height())
        pixels = bytes(data.data() if hasattr(data, "data") else data)
        found[at] = hashlib.blake2b(pixels, digest_size=8).hexdigest()
    return found


def make_film(stage: Stage) -> Generator[Any, Any, Any]:
    """Frames between two panels by a click; one painted, the others made again; saved, opened, exported."""
    yield from arrange(stage)
    yield ready(stage)
    yield from open_file(stage)
    document = stage.krita.activeDocument()
    before = layers(document)
    panels = [digest(group, (document.width(), document.height())) for group in groups(document)]
    yield from begin_work(stage, strip_of(stage, 0)[0].make)
    yield made(stage)
    yield 1
    stage.screenshot("film")
    stage.saw["film"] = {"before": before, "panels": panels, **keyframes(stage, document, 0)}
    stage.saw["film"]["after"] = layers(document)
    stage.saw["film"]["canvas"] = yield from canvas_at(document, list(range(16)))
    if stage.krita.version().startswith("5"):  # 6.0.4 that has played on Xvfb dies when it closes the document
        yield from play(stage, document)
    yield from paint_a_frame(stage, document, 6)
    stage.action("edit_undo")
    yield 1
    stage.saw["film_undone"] = {"state": strip_of(stage, 0)[0].play.isEnabled()}
    stage.action("edit_redo")
    yield 1
    yield from begin_work(stage, strip_of(stage, 1)[0].make)
    yield made(stage)
    yield 1
    stage.saw["second"] = keyframes(stage, document, 1)
    yield from export_film(stage)
    document.saveAs(os.environ["STORYDIFFUSION_FILM_FILE"])
    yield 1
    stage.saw["saved_film"] = [keyframes(stage, document, number) for number in (0, 1)]


@contextmanager
def busy(processes: int) -> Generator[None, None, None]:
    """Others take the cores meanwhile: what Krita does in threads of its own comes late."""
    others = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(processes)]
    try:
        yield
    finally:
        for one in others:
            one.kill()
            one.wait(10)


def make_all_ways(stage: Stage) -> Generator[Any, Any, Any]:
    """The frames between all panels by one entry of the menu, on a machine that has no core to spare: while one
    way comes onto the timeline the backend makes the next."""
    yield from arrange(stage)
    yield ready(stage)
    yield from open_file(stage)
    document = stage.krita.activeDocument()
    size = (document.width(), document.height())
    stage.saw["panels"] = [digest(group, size) for group in groups(document)]
    with busy(os.cpu_count() or 2):
        docker().film_all.trigger()
        yield Until("work to begin", lambda: controller(stage).working, 10)
        yield made(stage, 400)
    yield 1
    stage.screenshot("all-ways")
    stage.saw["ways"] = [keyframes(stage, document, number) for number in range(3)]
    stage.saw["order"] = [node.name() for node in document.topLevelNodes() if node.type() == "paintlayer"]


def open_film(stage: Stage) -> Generator[Any, Any, Any]:
    """Another day: the film's file in a new Krita."""
    yield from arrange(stage)
    yield ready(stage)
    document = stage.krita.openDocument(os.environ["STORYDIFFUSION_FILM_FILE"])
    document.setBatchmode(True)
    stage.window.addView(document)
    yield Until("the story in the docker", lambda: docker().panels.rows and docker().isVisible(), 10)
    yield 2
    document = stage.krita.activeDocument()
    stage.saw["opened_film"] = [keyframes(stage, document, number) for number in (0, 1)]
    stage.saw["opened_canvas"] = yield from canvas_at(document, [0, 6, 15, 30])
    stage.screenshot("film-opened")


def play(stage: Stage, document: Any) -> Generator[Any, Any, Any]:
    """By the strip's own button; stopped by Krita's."""
    seen = set()
    stage.click(strip_of(stage, 0)[0].play)
    for _ in range(30):
        yield 0.1
        seen.add(document.currentTime())
    stage.action("toggle_playback")
    yield 1
    stage.saw["played"] = sorted(seen)
    document.setCurrentTime(0)
    document.waitForDone()
    yield 0.3


def paint_a_frame(stage: Stage, document: Any, time: int) -> Generator[Any, Any, Any]:
    """A red square on one frame; then the way is made again."""
    strip = strip_of(stage, 0)[1]
    node = next(one for one in document.topLevelNodes() if one.uniqueId().toString() == strip.layer)
    document.setCurrentTime(time)
    document.waitForDone()
    yield 0.3
    node.setPixelData(bytes([20, 20, 230, 255]) * 40 * 40, 30, 30, 40, 40)
    document.setModified(True)
    document.refreshProjection()
    document.waitForDone()
    yield 0.5
    painted = keyframes(stage, document, 0)
    controller(stage).strips.set(controller(stage).story.panels[0].id, prompt="she jumps")
    yield from begin_work(stage, strip_of(stage, 0)[0].make)
    yield made(stage)
    yield 1
    stage.saw["painted_frame"] = {"before": painted, "after": keyframes(stage, document, 0), "layers": layers(document)}
    stage.screenshot("film-painted")


def export_film(stage: Stage) -> Generator[Any, Any, Any]:
    """By the docker's own menu entry and Qt's file dialog."""
    QtCore.QTimer.singleShot(0, docker().film_export.trigger)
    yield Until("the file dialog", lambda: top_level(QtWidgets.QFileDialog))
    dialog = top_level(QtWidgets.QFileDialog)
    dialog.findChild(QtWidgets.QLineEdit, "fileNameEdit").setText(os.environ["STORYDIFFUSION_MP4"])
    yield 0.3
    stage.click(dialog.findChild(QtWidgets.QDialogButtonBox).button(QtWidgets.QDialogButtonBox.StandardButton.Save))
    yield Until("the film", lambda: os.path.exists(os.environ["STORYDIFFUSION_MP4"]), 120)
    yield Until("the end of work", lambda: not controller(stage).working, 10)
    stage.saw["notice"] = docker().notice.text()
