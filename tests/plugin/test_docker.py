"""The docker as an artist uses it: with mouse and keyboard, narrow, dark and light."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PyQt6.QtCore import QEvent, QPoint, QPointF, Qt
from PyQt6.QtGui import QColor, QImage, QMouseEvent, QPalette
from PyQt6.QtTest import QTest
from PyQt6.QtWidgets import QAbstractButton, QApplication, QComboBox, QLabel, QLineEdit, QPlainTextEdit, QWidget

from fakes import FakeDocument, Scene
from storydiffusion_krita.backend_process import Backend, Status
from storydiffusion_krita.docker import StoryDocker
from storydiffusion_krita.environment import Environment
from storydiffusion_krita.save_guard import SaveGuard
from storydiffusion_krita.settings import Settings
from storydiffusion_krita.texts import use_language
from storydiffusion_krita.widgets import basics

LINES = (
    "[Mira] wakes up in a cold house # The morning was cold.",
    "[Mira] meets [Bo]",
    "[Tom] walks",
    "[NC] the river",
)


class PicturesDocument(FakeDocument):
    def thumbnail(self, layer: str, size: int) -> Any:
        image = QImage(16, 16, QImage.Format.Format_ARGB32)
        image.fill(QColor("#c08040"))
        return image if self.look(layer) else None


class Stage:
    def __init__(self, folder: Path, width: int = 250) -> None:
        self.scene = Scene(document=PicturesDocument())
        self.backend = Backend(Environment(folder, folder), lambda call: call(), command=["x"])
        self.docker = StoryDocker(Settings(), self.backend)
        self.docker.show_controller(self.scene.controller)
        self.docker.resize(width, 900)
        self.docker.show()
        settle()

    def story(self) -> None:
        self.scene.story(*LINES, characters=("Mira", "Bo"))
        settle()

    def row(self, number: int) -> Any:
        return self.docker.panels.rows[self.scene.controller.story.panels[number].id]


def settle() -> None:
    for _ in range(6):
        QApplication.processEvents()


@pytest.fixture
def stage(tmp_path: Path, application: object) -> Iterator[Stage]:
    one = Stage(tmp_path)
    yield one
    one.docker.close()
    one.docker.deleteLater()
    settle()


def palette(dark: bool) -> QPalette:
    role, result = QPalette.ColorRole, QPalette()
    window, text, base = ("#31363b", "#eff0f1", "#232629") if dark else ("#efefef", "#1e1e1e", "#ffffff")
    for one, colour in ((role.Window, window), (role.Base, base), (role.Button, window), (role.WindowText, text),
                        (role.Text, text), (role.ButtonText, text), (role.Highlight, "#3daee9")):  # fmt: skip
        result.setColor(one, QColor(colour))
    return result


def test_from_nothing_to_pictures_in_two_clicks(stage: Stage) -> None:
    docker = stage.docker
    QTest.mouseClick(docker.example, Qt.MouseButton.LeftButton)
    stage.scene.turns.run()
    assert len(docker.panels.rows) == 4
    assert docker.generate.text() == "Generate"
    QTest.mouseClick(docker.generate, Qt.MouseButton.LeftButton)
    stage.scene.finish()
    assert stage.scene.states() == ["done"] * 4
    assert docker.generate.text() == "Everything again, new seeds"
    assert not docker.example.isVisible()


def test_a_script_typed_becomes_rows_and_its_bad_line_says_why(stage: Stage) -> None:
    docker = stage.docker
    docker.characters.add.click()
    docker.script_button.click()
    name = stage.scene.controller.story.characters[0].name
    QTest.keyClicks(docker.script.edit, f"[{name}] walks")
    QTest.keyClick(docker.script.edit, Qt.Key.Key_Return)
    QTest.keyClicks(docker.script.edit, "nobody here")
    docker.script.apply()
    stage.scene.controller.story.characters[0].description = "a fox"
    docker.script.show_story(stage.scene.controller)
    assert len(docker.panels.rows) == 2
    assert docker.script.problems.text().startswith("Line 2: Nobody is named")
    assert len(docker.script.edit.extraSelections()) == 1
    assert docker.script.edit.toPlainText() == f"[{name}] walks\nnobody here"


def test_typing_in_a_row_edits_the_script_and_keeps_the_cursor(stage: Stage) -> None:
    stage.story()
    prompt = stage.row(0).prompt
    prompt.setFocus()
    prompt.moveCursor(prompt.textCursor().MoveOperation.Start)
    QTest.keyClicks(prompt, "At dawn ")
    assert stage.scene.controller.story.script.startswith("At dawn [Mira] wakes up")
    assert prompt.textCursor().position() == len("At dawn ")


def test_text_that_arrives_while_somebody_types_in_the_script_does_not_take_it_away(stage: Stage) -> None:
    stage.story()
    stage.docker.script_button.click()
    edit = stage.docker.script.edit
    edit.moveCursor(edit.textCursor().MoveOperation.End)
    QTest.keyClicks(edit, " under stars")
    stage.scene.controller.changed("panel", stage.scene.controller.story.panels[0].id)
    assert edit.toPlainText().endswith("the river under stars")
    stage.docker.generate_now()
    assert stage.scene.controller.story.panels[3].prompt == "[NC] the river under stars"


def test_what_was_typed_stays_with_its_document_when_another_is_shown(stage: Stage) -> None:
    stage.story()
    stage.docker.script_button.click()
    edit = stage.docker.script.edit
    edit.moveCursor(edit.textCursor().MoveOperation.End)
    QTest.keyClicks(edit, "!!")
    other = Scene()
    other.story("[Mira] elsewhere")
    stage.docker.show_controller(other.controller)
    assert stage.scene.controller.story.script.endswith("the river!!")
    assert other.controller.story.script == "[Mira] elsewhere"
    assert edit.toPlainText() == "[Mira] elsewhere"


@pytest.mark.parametrize("language", ["en", "ja"])
@pytest.mark.parametrize("width", [250, 500])
def test_nothing_is_cut_off_at_any_width(tmp_path: Path, application: object, width: int, language: str) -> None:
    use_language(language)
    stage = Stage(tmp_path, width)
    stage.story()
    stage.scene.controller.generate()
    stage.scene.finish()
    stage.scene.controller.again(stage.scene.controller.story.panels[0].id)
    stage.scene.finish()
    stage.docker.status.gear.setChecked(True)
    stage.docker.script_button.setChecked(True)
    status = Status("failed", "RuntimeError: " + "long " * 20, "do this", "install")
    stage.docker.show_status(status)
    settle()
    assert stage.docker.width() == width
    inside = stage.docker.area.widget()
    viewport = stage.docker.area.viewport()
    assert inside is not None
    assert viewport is not None
    assert inside.width() <= viewport.width()
    for widget in stage.docker.findChildren(QWidget):
        if widget.isVisible() and isinstance(widget, QAbstractButton | QLineEdit | QComboBox | QPlainTextEdit):
            right = widget.mapTo(stage.docker, QPoint(widget.width(), 0)).x()
            assert right <= width, f"{widget} {widget.accessibleName()} ends at {right}"
    for number in range(4):
        prompt = stage.row(number).prompt
        last = prompt.document().lastBlock()
        bottom = prompt.blockBoundingGeometry(last).translated(prompt.contentOffset()).bottom()
        assert bottom <= prompt.viewport().height() + 2, f"the prompt of row {number} is cut off"
        assert prompt.height() <= bottom + 12, f"the prompt of row {number} takes more room than its words"


@pytest.mark.parametrize("dark", [False, True])
def test_every_tone_can_be_read_on_the_theme(dark: bool) -> None:
    colours = palette(dark)
    window = colours.color(QPalette.ColorRole.Window)
    for tone in ("good", "busy", "warn", "bad", "quiet"):
        assert contrast(basics.tone_colour(colours, tone), window) >= 4.5 if tone != "quiet" else 3, tone


def contrast(one: QColor, other: QColor) -> float:
    """As WCAG 2 counts it."""

    def luminance(colour: QColor) -> float:
        rgb = [value or 0.0 for value in colour.getRgbF()[:3]]
        parts = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in rgb]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    a, b = sorted((luminance(one), luminance(other)))
    return (b + 0.05) / (a + 0.05)


def test_a_change_of_theme_repaints_what_is_there(stage: Stage) -> None:
    stage.story()
    try:
        seen = []
        for dark in (False, True):
            QApplication.setPalette(palette(dark))
            settle()
            image = stage.docker.grab().toImage()
            seen.append(image.pixelColor(3, stage.docker.height() // 2).lightness())
        assert seen[0] > 200
        assert seen[1] < 80
    finally:
        QApplication.setPalette(palette(False))


def test_everything_can_be_reached_and_is_named(stage: Stage) -> None:
    stage.story()
    stage.docker.status.gear.setChecked(True)
    stage.docker.script_button.setChecked(True)
    settle()
    for widget in stage.docker.findChildren(QWidget):
        if not widget.isVisible() or not isinstance(widget, QAbstractButton | QComboBox | QPlainTextEdit):
            continue
        if widget.parent().__class__.__name__ in ("QScrollBar", "QSpinBox") or widget.objectName().startswith("qt_"):
            continue
        named = widget.accessibleName() or (widget.text() if isinstance(widget, QAbstractButton) else "")
        buddies = [label for label in stage.docker.findChildren(QLabel) if label.buddy() is widget]
        assert named or buddies, f"{widget} has no name"
        assert widget.focusPolicy() & Qt.FocusPolicy.TabFocus, f"{named} cannot be reached with Tab"


def test_rows_are_walked_reordered_and_edited_with_the_keyboard(stage: Stage) -> None:
    stage.story()
    a, b, c, d = [panel.id for panel in stage.scene.controller.story.panels]
    stage.row(0).setFocus(Qt.FocusReason.TabFocusReason)
    QTest.keyClick(stage.row(0), Qt.Key.Key_Down)
    assert stage.scene.controller.selected == [b]
    QTest.keyClick(stage.row(1), Qt.Key.Key_Up, Qt.KeyboardModifier.AltModifier)
    assert [panel.id for panel in stage.scene.controller.story.panels] == [b, a, c, d]
    assert stage.docker.panels.order == [b, a, c, d]
    QTest.keyClick(stage.row(0), Qt.Key.Key_Return)
    assert stage.row(0).prompt.hasFocus()


def test_shift_and_control_select_several(stage: Stage) -> None:
    stage.story()
    names = [panel.id for panel in stage.scene.controller.story.panels]
    QTest.mouseClick(stage.row(1), Qt.MouseButton.LeftButton, pos=QPoint(5, 50))
    QTest.mouseClick(stage.row(3), Qt.MouseButton.LeftButton, Qt.KeyboardModifier.ShiftModifier, QPoint(40, 5))
    assert stage.scene.controller.selected == names[1:]
    QTest.mouseClick(stage.row(2), Qt.MouseButton.LeftButton, Qt.KeyboardModifier.ControlModifier, QPoint(40, 5))
    assert stage.scene.controller.selected == [names[1], names[3]]


def test_a_row_is_dragged_by_its_number_to_another_place(stage: Stage) -> None:
    stage.story()
    a, b, c, d = [panel.id for panel in stage.scene.controller.story.panels]
    grip, target = stage.row(0).grip, stage.row(2)
    to = grip.mapFromGlobal(target.mapToGlobal(QPoint(5, target.height() - 2)))
    QTest.mousePress(grip, Qt.MouseButton.LeftButton, pos=QPoint(5, 5))
    move = QMouseEvent(QEvent.Type.MouseMove, QPointF(to), QPointF(grip.mapToGlobal(to)), Qt.MouseButton.NoButton,
                       Qt.MouseButton.LeftButton, Qt.KeyboardModifier.NoModifier)  # fmt: skip
    QApplication.sendEvent(grip, move)
    QTest.mouseRelease(grip, Qt.MouseButton.LeftButton, pos=to)
    assert [panel.id for panel in stage.scene.controller.story.panels] == [b, c, a, d]
    assert stage.docker.panels.order == [b, c, a, d]


def test_a_row_shows_its_state_and_offers_only_what_can_be_done(stage: Stage) -> None:
    stage.story()
    row = stage.row(2)
    assert "Nobody called Tom" in row.state.text()
    assert not row.again.isEnabled()
    stage.scene.controller.generate()
    stage.scene.turns.run()
    name = stage.scene.controller.story.panels[0].id
    stage.scene.desk.tell("step", panels=[name], step=3, steps=8)
    assert stage.row(0).state.text() == "step 3 of 8"
    assert stage.row(0).bar.isVisible()
    assert not stage.row(0).again.isEnabled()
    QTest.mouseClick(stage.docker.cancel, Qt.MouseButton.LeftButton)
    assert not stage.row(0).bar.isVisible()
    assert not stage.docker.cancel.isVisible()


def test_takes_lock_and_again_work_from_the_row(stage: Stage) -> None:
    stage.story()
    stage.scene.make()
    row = stage.row(0)
    QTest.mouseClick(row.again, Qt.MouseButton.LeftButton)
    stage.scene.finish()
    assert row.take.text() == "2/2"
    QTest.mouseClick(row.previous, Qt.MouseButton.LeftButton)
    assert row.take.text() == "1/2"
    QTest.mouseClick(row.lock, Qt.MouseButton.LeftButton)
    assert stage.scene.controller.story.panels[0].locked
    assert not row.again.isEnabled()


def test_with_a_selection_again_says_inside_the_selection(stage: Stage) -> None:
    stage.story()
    stage.scene.make()
    stage.scene.document.mask = "mask"
    stage.scene.controller.poll()
    assert stage.row(0).again.accessibleName() == "Again inside the selection"


def test_a_name_in_use_is_refused_in_place_and_put_back(stage: Stage) -> None:
    stage.story()
    row = stage.docker.characters.rows[stage.scene.controller.story.characters[1].id]
    row.name.setFocus()
    row.name.selectAll()
    QTest.keyClicks(row.name, "mira")
    QTest.keyClick(row.name, Qt.Key.Key_Return)
    assert row.wrong.isVisible()
    assert row.name.text() == "Bo"


def test_a_seed_is_typed_kept_and_taken_back(stage: Stage) -> None:
    stage.story()
    row = stage.row(0)
    row._show_seed()
    QTest.keyClicks(row.seed, "12x34")
    QTest.keyClick(row.seed, Qt.Key.Key_Return)
    assert stage.scene.controller.story.panels[0].seed == 1234
    row.seed.clear()
    QTest.keyClick(row.seed, Qt.Key.Key_Return)
    assert stage.scene.controller.story.panels[0].seed is None


def test_the_status_line_says_what_to_do_and_its_button_does_it(stage: Stage) -> None:
    asked: list[str] = []
    stage.docker.status.acted.connect(asked.append)
    stage.docker.show_status(Status("absent", "The backend is not installed yet.", "", "install"))
    QTest.mouseClick(stage.docker.status.button, Qt.MouseButton.LeftButton)
    assert asked == ["install"]
    stage.docker.show_status(Status("ready", "CPU · ready"))
    assert not stage.docker.status.button.isVisible()
    assert stage.docker.status.text.text() == "storyworld · CPU · ready"


def test_models_say_what_stops_them(stage: Stage) -> None:
    failure = {"kind": "out_of_memory", "sentence": "12 GB are needed, 4 GB are there.", "remedy": "Use a smaller one."}
    stage.docker.show_models(
        [{"id": "storyworld", "title": "Storyworld", "installed": True},
         {"id": "sdxl", "title": "SDXL", "installed": False, "failure": failure}])  # fmt: skip
    box = stage.docker.model_box
    assert box.itemText(1) == "SDXL (not installed)"
    box.setCurrentIndex(1)
    box.activated.emit(1)
    assert stage.scene.controller.story.model == "sdxl"
    assert "4 GB are there" in stage.docker.model_note.text()


def test_without_a_document_there_is_nothing_to_press_but_a_new_one(stage: Stage) -> None:
    stage.docker.show_controller(None)
    assert not stage.docker.generate.isVisible()
    assert stage.docker.new_document.isVisible()


def test_a_save_is_seen_coming_by_shortcut_menu_and_button(application: object) -> None:
    from PyQt6.QtGui import QShortcutEvent
    from PyQt6.QtWidgets import QMainWindow

    window, saves = QMainWindow(), []
    menu, bar = window.menuBar().addMenu("File"), window.addToolBar("File")  # type: ignore[union-attr]
    assert menu is not None
    assert bar is not None
    save = menu.addAction("Save")
    assert save is not None
    bar.addAction(save)
    guard = SaveGuard(lambda: saves.append("cleared"))
    guard.watch([save], window)
    save.triggered.connect(lambda: saves.append("saved"))
    save.setShortcut("Ctrl+S")
    QApplication.sendEvent(save, QShortcutEvent(save.shortcut(), 0))
    assert saves[0] == "cleared"
    saves.clear()
    menu.aboutToShow.emit()
    assert saves == ["cleared"]
    saves.clear()
    button = bar.widgetForAction(save)
    QTest.mouseClick(button, Qt.MouseButton.LeftButton)
    assert saves == ["cleared", "saved"]
