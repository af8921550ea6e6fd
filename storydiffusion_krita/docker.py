"""The Story docker's contents. Knows Qt and the controller, not Krita."""

from __future__ import annotations

from typing import Any

from .backend_process import Backend, Status
from .controller import Controller
from .qt import Qt, QtCore, QtGui, QtWidgets
from .settings import Settings
from .styles import STYLES
from .texts import tr
from .widgets.backend_page import SettingsPage, StatusLine, narrow_combo
from .widgets.basics import GlyphButton, Label, Signal, ThinBar
from .widgets.characters import Characters
from .widgets.panels import PanelList
from .widgets.script_box import ScriptBox


class StoryDocker(QtWidgets.QWidget):
    """Shows one controller at a time, or says that there is no document."""

    document_asked = Signal()
    shown = Signal()

    def __init__(self, settings: Settings, backend: Backend) -> None:
        super().__init__()
        self._controller: Controller | None = None
        self._models: dict[str, dict[str, Any]] = {}
        self._status = backend.status
        self.status = StatusLine()
        self.settings = SettingsPage(settings, backend)
        self.settings.hide()
        self.status.gear.toggled.connect(self.settings.setVisible)
        self.notice = Label(tone="warn")
        self.notice.hide()
        self._nothing = self._make_nothing()
        self._story = self._make_story()
        self._bar = self._make_bar()
        inside = QtWidgets.QWidget()
        column = QtWidgets.QVBoxLayout(inside)
        column.setContentsMargins(0, 0, 3, 0)
        column.setSpacing(6)
        for widget in (self.settings, self.notice, self._nothing, self._story):
            column.addWidget(widget)
        column.addStretch(1)
        self.area = QtWidgets.QScrollArea()
        self.area.setWidgetResizable(True)
        self.area.setFrameShape(QtWidgets.QFrame.Shape.NoFrame)
        self.area.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.area.setWidget(inside)
        self.area.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        layout = QtWidgets.QVBoxLayout(self)
        layout.setContentsMargins(6, 4, 3, 4)
        layout.setSpacing(5)
        layout.addWidget(self.status)
        layout.addWidget(self.area, 1)
        layout.addWidget(self._bar)
        self.setMinimumWidth(240)
        self.show_controller(None)

    # ----------------------------------------------------------------------- parts

    def _make_nothing(self) -> QtWidgets.QWidget:
        """Before there is a document."""
        box = QtWidgets.QWidget()
        layout = QtWidgets.QVBoxLayout(box)
        layout.setContentsMargins(0, 16, 0, 0)
        text = Label(tr("A story lives in a document. Open one, or create one."), "quiet")
        text.setAlignment(Qt.AlignmentFlag.AlignCenter)
        self.new_document = QtWidgets.QPushButton(tr("New document"))
        self.new_document.clicked.connect(self.document_asked.emit)
        layout.addWidget(text)
        layout.addWidget(self.new_document)
        return box

    def _make_story(self) -> QtWidgets.QWidget:
        box = QtWidgets.QWidget()
        self.characters = Characters()
        self.style_box = narrow_combo(tr("Style"), lambda box: self._set(style=box.currentData()))
        for style, title in STYLES.items():
            self.style_box.addItem(tr(title), style)
        self.model_box = narrow_combo(tr("Model"), lambda box: self._set(model=box.currentData()))
        self.layout_box = narrow_combo(tr("Layout"), lambda box: self._set(layout=box.currentData()))
        for name, title, meaning in (
            ("stack", tr("Stack"), tr("Every panel fills the canvas; one is seen at a time")),
            ("grid", tr("Page"), tr("Panels side by side on one page")),
        ):
            self.layout_box.addItem(title, name)
            self.layout_box.setItemData(self.layout_box.count() - 1, meaning, Qt.ItemDataRole.ToolTipRole)
        choices = QtWidgets.QGridLayout()
        choices.setHorizontalSpacing(4)
        choices.setVerticalSpacing(2)
        for at, (words, widget) in enumerate(
            ((tr("Style"), self.style_box), (tr("Layout"), self.layout_box), (tr("Model"), self.model_box))
        ):
            label = QtWidgets.QLabel(words)
            label.setBuddy(widget)
            choices.addWidget(label, at, 0)
            choices.addWidget(widget, at, 1)
        choices.setColumnStretch(1, 1)
        self.model_note = Label(tone="bad")
        self.model_note.hide()
        heading = QtWidgets.QLabel(tr("Panels"))
        font = heading.font()
        font.setBold(True)
        heading.setFont(font)
        self.script_button = GlyphButton("script", tr("Write or paste the script"))
        self.script_button.setCheckable(True)
        self.add_panel = GlyphButton("plus", tr("Add a panel"))
        self.add_panel.clicked.connect(self._add_panel)
        head = QtWidgets.QHBoxLayout()
        head.addWidget(heading, 1)
        head.addWidget(self.script_button)
        head.addWidget(self.add_panel)
        self.script = ScriptBox()
        self.script.hide()
        self.script_button.toggled.connect(self._show_script)
        self.panels = PanelList()
        self._first = self._make_first()
        layout = QtWidgets.QVBoxLayout(box)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(5)
        layout.addWidget(self._first)
        layout.addWidget(self.characters)
        layout.addLayout(choices)
        layout.addWidget(self.model_note)
        layout.addWidget(_rule())
        layout.addLayout(head)
        layout.addWidget(self.script)
        layout.addWidget(self.panels)
        return box

    def _make_first(self) -> QtWidgets.QWidget:
        """Before there is a story in the document."""
        box = QtWidgets.QWidget()
        layout = QtWidgets.QVBoxLayout(box)
        layout.setContentsMargins(0, 4, 0, 4)
        words = tr("Name who is in your story, write a line for every panel, and press Generate: "
                   "everyone stays themselves from panel to panel.")  # fmt: skip
        layout.addWidget(Label(words))
        self.example = QtWidgets.QPushButton(tr("Load an example story"))
        self.example.clicked.connect(lambda: self._controller.load_example() if self._controller else None)
        layout.addWidget(self.example)
        return box

    def _make_bar(self) -> QtWidgets.QWidget:
        """What always stays in sight: progress, and the button that starts it."""
        bar = QtWidgets.QWidget()
        self.progress_text = Label(tone="busy", wrap=False)
        self.progress_bar = ThinBar()
        self.cancel = QtWidgets.QPushButton(tr("Cancel"))
        self.cancel.clicked.connect(lambda: self._controller.cancel() if self._controller else None)
        running = QtWidgets.QHBoxLayout()
        running.addWidget(self.progress_text, 1)
        running.addWidget(self.cancel)
        self.generate = QtWidgets.QToolButton()
        self.generate.setPopupMode(QtWidgets.QToolButton.ToolButtonPopupMode.MenuButtonPopup)
        self.generate.setSizePolicy(QtWidgets.QSizePolicy.Policy.Ignored, QtWidgets.QSizePolicy.Policy.Fixed)
        self.generate.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.generate.setMinimumHeight(28)
        self.generate.clicked.connect(self.generate_now)
        menu = QtWidgets.QMenu(self)
        self.generate_selected = menu.addAction(tr("Generate the selected panels"))
        self.generate_all = menu.addAction(tr("Everything again, same seeds"))
        self.generate_new = menu.addAction(tr("Everything again, new seeds"))
        for action, call in (
            (self.generate_selected, lambda c: c.generate(c.selected)),
            (self.generate_all, lambda c: c.generate(c.everything())),
            (self.generate_new, lambda c: c.generate(c.everything(), new_seeds=True)),
        ):
            assert action is not None
            action.triggered.connect(lambda _=False, call=call: call(self._controller) if self._controller else None)
        menu.addSeparator()
        self.film_all = menu.addAction(tr("Make the frames between all panels"))
        self.film_export = menu.addAction(tr("Export the film…"))
        assert self.film_all is not None
        assert self.film_export is not None
        self.film_all.triggered.connect(lambda: self._controller.strips.make_all() if self._controller else None)
        self.film_export.triggered.connect(self.export_film)
        self.generate.setMenu(menu)
        self._running = QtWidgets.QWidget()
        self._running.setLayout(running)
        running.setContentsMargins(0, 0, 0, 0)
        layout = QtWidgets.QVBoxLayout(bar)
        layout.setContentsMargins(0, 0, 3, 0)
        layout.setSpacing(4)
        layout.addWidget(self._running)
        layout.addWidget(self.progress_bar)
        layout.addWidget(self.generate)
        return bar

    # ----------------------------------------------------------------------- showing

    def show_controller(self, controller: Controller | None) -> None:
        if self._controller is not None and self._controller is not controller:
            self._controller.changed = lambda what, which: None
        self._controller = controller
        there = controller is not None
        self._nothing.setVisible(not there)
        self._story.setVisible(there)
        self._bar.setVisible(there)
        self.settings.show_story(controller)
        if controller is not None:
            controller.changed = self._changed
            self._show_all()

    def show_status(self, status: Status) -> None:
        self._status = status
        story = self._controller.story if self._controller is not None else None
        model = self._models.get(story.model, {}).get("title", story.model) if story is not None else ""
        self.status.show_status(status, model)

    def show_models(self, models: list[dict[str, Any]]) -> None:
        self._models = {one["id"]: one for one in models}
        self._show_settings()

    def _changed(self, what: str, which: str) -> None:
        if what == "panel":
            self.panels.show_panel(which)
            if self.script.isVisible() and self._controller is not None:
                self.script.show_story(self._controller)
        elif what != "progress":
            self._show_all()
            return
        self._show_bar()

    def _show_all(self) -> None:
        controller = self._controller
        if controller is None:
            return
        empty = not controller.story.entries and not controller.story.characters
        self._first.setVisible(empty and not controller.readonly)
        self.notice.setText(controller.notice)
        self.notice.setVisible(bool(controller.notice))
        self.characters.show_story(controller)
        self.panels.show_story(controller)
        if self.script.isVisible():
            self.script.show_story(controller)
        self._show_settings()
        self._show_bar()

    def _show_settings(self) -> None:
        controller = self._controller
        if controller is None:
            return
        story = controller.story
        known = [(name, one.get("title", name)) for name, one in self._models.items()]
        if story.model not in self._models:
            known.insert(0, (story.model, story.model))
        if [self.model_box.itemData(i) for i in range(self.model_box.count())] != [name for name, _ in known]:
            self.model_box.clear()
            for name, title in known:
                here = self._models.get(name, {}).get("installed", True)
                self.model_box.addItem(title if here else tr("{title} (not installed)", title=title), name)
        choices = ((self.style_box, story.style), (self.layout_box, story.layout), (self.model_box, story.model))
        for box, value in choices:
            box.setCurrentIndex(box.findData(value))
            box.setEnabled(not controller.readonly)
        failure = self._models.get(story.model, {}).get("failure") or {}
        self.model_note.setText(" ".join(filter(None, (failure.get("sentence"), failure.get("remedy")))))
        self.model_note.setVisible(bool(failure))
        self.add_panel.setEnabled(not controller.readonly)
        self.settings.show_story(controller)
        self.show_status(self._status)  # it names the model

    def _show_bar(self) -> None:
        controller = self._controller
        if controller is None:
            return
        progress = controller.progress()
        self._running.setVisible(bool(progress.text))
        self.progress_bar.setVisible(bool(progress.text))
        self.progress_text.setText(progress.text)
        self.progress_text.setToolTip(progress.text)
        self.progress_bar.set_fraction(progress.fraction)
        missing, stale = len(controller.missing()), len(controller.stale())
        made = sum(controller.has_art(panel) for panel in controller.story.panels)
        if missing and not made:
            text = tr("Generate")
        elif missing and stale:
            text = tr("Generate {missing} missing and {stale} changed", missing=missing, stale=stale)
        elif missing:
            text = tr("Generate {count} missing", count=missing)
        elif stale:
            text = tr("Generate {count} changed", count=stale)
        else:
            text = tr("Everything again, new seeds") if made and not controller.working else tr("Generate")
        self.generate.setText(text)
        able = bool(controller.everything())
        self.generate.setEnabled(able and (bool(missing or stale) or not controller.working))
        assert self.generate_selected is not None
        self.generate_selected.setEnabled(bool(controller.selected))
        strips = controller.strips
        assert self.film_all is not None
        assert self.film_export is not None
        self.film_all.setEnabled(any(strips.exists(panel) for panel in controller.story.panels))
        self.film_export.setEnabled(bool(strips.layers()) and not strips.working)
        if (failure := strips.film.failure) is not None:
            self.notice.setText(f"{failure.sentence} {failure.remedy}".strip())
            self.notice.show()

    # ----------------------------------------------------------------------- doing

    def generate_now(self) -> None:
        """What the large button says."""
        controller = self._controller
        if controller is None:
            return
        self.script.apply()
        if controller.missing() or controller.stale():
            controller.generate()
        elif not controller.working:
            controller.generate(controller.everything(), new_seeds=True)

    def export_film(self) -> None:
        """Asks for a file, and writes the film into it."""
        if self._controller is None:
            return
        kinds = "MP4 (*.mp4);;WebM (*.webm);;GIF (*.gif);;APNG (*.apng)"
        path, kind = QtWidgets.QFileDialog.getSaveFileName(self, tr("Export the film"), "", kinds)
        if path:
            if "." not in path.replace("\\", "/").rsplit("/", 1)[-1]:
                path += kind[kind.index("*") + 1 : -1]
            self._controller.strips.film.start(path)

    def again_selected(self) -> None:
        if self._controller is not None and self._controller.selected:
            self._controller.again(self._controller.selected[0])

    def cancel_all(self) -> None:
        if self._controller is not None:
            self._controller.cancel()

    def show_script(self) -> None:
        self.script_button.setChecked(True)
        self.script.edit.setFocus()

    def step_take(self, step: int) -> None:
        if self._controller is not None and self._controller.selected:
            self._controller.choose_take(self._controller.selected[0], step)

    def _show_script(self, shown: bool) -> None:
        self.script.setVisible(shown)
        if self._controller is not None:
            if shown:
                self.script.show_story(self._controller)
            else:
                self.script.apply()

    def _set(self, **values: Any) -> None:
        if self._controller is not None:
            self._controller.set_settings(**values)

    def _add_panel(self) -> None:
        controller = self._controller
        if controller is None:
            return
        after = controller.selected[-1] if controller.selected else ""
        panel_id = controller.add_panel(after)
        if panel_id in self.panels.rows:
            prompt = self.panels.rows[panel_id].prompt
            prompt.setFocus()
            prompt.moveCursor(QtGui.QTextCursor.MoveOperation.End)

    def showEvent(self, event: QtGui.QShowEvent | None) -> None:  # noqa: N802
        super().showEvent(event)
        self.shown.emit()

    def sizeHint(self) -> QtCore.QSize:  # noqa: N802
        return QtCore.QSize(320, 640)


def _rule() -> QtWidgets.QFrame:
    line = QtWidgets.QFrame()
    line.setFrameShape(QtWidgets.QFrame.Shape.HLine)
    line.setFrameShadow(QtWidgets.QFrame.Shadow.Sunken)
    return line
