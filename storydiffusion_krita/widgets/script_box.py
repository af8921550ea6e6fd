"""The whole script as text: what is typed or pasted here becomes panels; bad lines say why."""

from __future__ import annotations

from ..controller import Controller
from ..qt import Qt, QtCore, QtGui, QtWidgets
from ..story_state import Panel
from ..texts import tr
from .basics import Label, TagHighlighter, tone_colour

TYPING_MS = 300
MAX_SHOWN = 4
HEIGHT = 120  # pixels: the panels below must not move when something else comes and goes


class ScriptBox(QtWidgets.QWidget):
    def __init__(self) -> None:
        super().__init__()
        self._controller: Controller | None = None
        self.edit = QtWidgets.QPlainTextEdit()
        self.edit.setAccessibleName(tr("Script"))
        self.edit.setPlaceholderText(
            tr("A line a panel, for example:\n[Mira] wakes up in a cold house # The morning was cold.\n[NC] the river")
        )
        self.edit.setTabChangesFocus(True)
        self.edit.setFixedHeight(HEIGHT)
        document = self.edit.document()
        assert document is not None
        self._highlighter = TagHighlighter(document, captions=True)
        self.problems = Label(tone="bad")
        self._text = ""
        self._typing = QtCore.QTimer(self)
        self._typing.setSingleShot(True)
        self._typing.setInterval(TYPING_MS)
        self._typing.timeout.connect(self.apply)
        self.edit.textChanged.connect(self._changed)
        layout = QtWidgets.QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(2)
        layout.addWidget(self.edit)
        layout.addWidget(self.problems)

    def show_story(self, controller: Controller) -> None:
        if controller is not self._controller:
            self.apply()  # what was typed belongs to the document it was typed for
        self._controller = controller
        from .. import script

        colours = {script.key(one.name): one.colour for one in controller.story.characters}
        self._highlighter.colours = lambda name: colours.get(name, "")
        if not self._typing.isActive() and self.edit.toPlainText() != controller.story.script:
            self._text = controller.story.script
            self.edit.setPlainText(self._text)
        self.edit.setReadOnly(controller.readonly)
        self._mark()

    def apply(self) -> None:
        """Makes the panels those of the text."""
        self._typing.stop()
        if self._controller is not None:
            self._controller.set_script(self.edit.toPlainText())
            self._mark()

    def _changed(self) -> None:
        text = self.edit.toPlainText()
        if text != self._text:  # colouring is a change of the text too, for Qt
            self._text = text
            self._typing.start()

    def _mark(self) -> None:
        """A wave under every line that is not a panel yet, and the first reasons in words."""
        controller, document = self._controller, self.edit.document()
        if controller is None or document is None or self._typing.isActive():
            return
        marks, reasons = [], []
        wave = QtGui.QTextCharFormat()
        wave.setUnderlineStyle(QtGui.QTextCharFormat.UnderlineStyle.WaveUnderline)
        wave.setUnderlineColor(tone_colour(self.palette(), "bad"))
        for number, entry in enumerate(controller.story.entries):
            problem = controller.story.problem(entry) if isinstance(entry, Panel) else ""
            if problem:
                mark = QtWidgets.QTextEdit.ExtraSelection()
                mark.format = wave
                mark.cursor = QtGui.QTextCursor(document.findBlockByNumber(number))
                mark.cursor.select(QtGui.QTextCursor.SelectionType.LineUnderCursor)
                marks.append(mark)
                reasons.append(tr("Line {number}: {problem}", number=number + 1, problem=problem))
        self.edit.setExtraSelections(marks)
        if len(reasons) > MAX_SHOWN:
            reasons[MAX_SHOWN:] = [tr("… and {count} more", count=len(reasons) - MAX_SHOWN)]
        self.problems.setText("\n".join(reasons))
        self.problems.setVisible(bool(reasons))

    def keyPressEvent(self, event: QtGui.QKeyEvent | None) -> None:  # noqa: N802
        if event is not None and event.key() == Qt.Key.Key_Escape:
            self.apply()
        super().keyPressEvent(event)
