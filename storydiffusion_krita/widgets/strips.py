"""The way from one panel to the next: how long it takes, what happens on it, and the buttons that make and play it."""

from __future__ import annotations

from collections.abc import Callable

from ..controller import Controller
from ..qt import Qt, QtCore, QtGui, QtWidgets
from ..strips import MAX_FRAMES, MAX_HOLD, StripView
from ..texts import tr
from .basics import GlyphButton, Label, Signal, ThinBar, quiet_colour

TONES = {"stale": "warn", "failed": "bad"}


class Count(QtWidgets.QSpinBox):
    """A small number, told when the artist has finished typing it; the wheel scrolls the list, not the number."""

    counted = Signal(int)

    def __init__(self, least: int, most: int, name: str, suffix: str = "") -> None:
        super().__init__()
        self.setRange(least, most)
        self.setAccessibleName(name)
        self.setToolTip(name)
        self.setSuffix(suffix)
        self.setKeyboardTracking(False)
        self.setButtonSymbols(QtWidgets.QAbstractSpinBox.ButtonSymbols.NoButtons)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.valueChanged.connect(self.counted.emit)

    def show_value(self, value: int) -> None:
        if not self.hasFocus() and value != self.value():
            self.blockSignals(True)
            self.setValue(value)
            self.blockSignals(False)

    def wheelEvent(self, event: QtGui.QWheelEvent | None) -> None:  # noqa: N802
        if event is not None:
            event.ignore()


class StripRow(QtWidgets.QWidget):
    """Between two panels' rows."""

    def __init__(self, controller: Controller, panel_id: str) -> None:
        super().__init__()
        strips = controller.strips
        self._controller, self.panel_id = controller, panel_id
        self.frames = Count(2, MAX_FRAMES, tr("Frames from this panel to the next, both included"))
        self.frames.counted.connect(lambda count: strips.set(panel_id, frames=count))
        self.frames.setFixedWidth(38)
        self.length = Label(tone="quiet", wrap=False)
        self.length.setSizePolicy(QtWidgets.QSizePolicy.Policy.Fixed, QtWidgets.QSizePolicy.Policy.Preferred)
        self.prompt = QtWidgets.QLineEdit()
        self.prompt.setPlaceholderText(tr("what happens in between"))
        self.prompt.setAccessibleName(tr("What happens in between"))
        self.prompt.setFrame(False)
        self.prompt.setMinimumWidth(30)
        self.prompt.editingFinished.connect(lambda: strips.set(panel_id, prompt=self.prompt.text()))
        self.make = GlyphButton("film", tr("Make the frames in between"), 22)
        self.make.clicked.connect(lambda: strips.make(panel_id))
        self.play = GlyphButton("play", tr("Play the film from here"), 22)
        self.play.clicked.connect(lambda: strips.play(panel_id))
        self.more = GlyphButton("more", tr("More for these frames"), 22)
        self.more.setPopupMode(QtWidgets.QToolButton.ToolButtonPopupMode.InstantPopup)
        self.more.setMenu(self._menu())
        line = QtWidgets.QHBoxLayout()
        line.setSpacing(3)
        for widget in (self.frames, self.length):
            line.addWidget(widget)
        line.addWidget(self.prompt, 1)
        for button in (self.make, self.play, self.more):
            line.addWidget(button)
        self.state = Label(tone="quiet")
        self.state.hide()
        self.bar = ThinBar()
        self.bar.hide()
        layout = QtWidgets.QVBoxLayout(self)
        layout.setContentsMargins(24, 0, 2, 0)
        layout.setSpacing(1)
        layout.addLayout(line)
        layout.addWidget(self.state)
        layout.addWidget(self.bar)

    def _menu(self) -> QtWidgets.QMenu:
        strips, panel_id = self._controller.strips, self.panel_id
        menu = QtWidgets.QMenu(self)

        def add(text: str, call: Callable[[], object]) -> QtGui.QAction:
            action = menu.addAction(text)
            assert action is not None
            action.triggered.connect(lambda: call())
            return action

        self._new_seed = add(tr("Make them again with a new seed"), lambda: strips.make(panel_id, new_seed=True))
        self._insert = add(
            tr("Make them at the current time"),
            lambda: strips.make(panel_id, at=self._controller.document.time()),
        )
        self.hold = Count(1, MAX_HOLD, tr("Frames that the next panel is shown for"), " " + tr("frames"))
        self.hold.counted.connect(lambda count: strips.set(panel_id, hold=count))
        held = QtWidgets.QWidget()
        row = QtWidgets.QHBoxLayout(held)
        row.setContentsMargins(24, 2, 12, 2)
        label = QtWidgets.QLabel(tr("Hold the next panel for"))
        label.setBuddy(self.hold)
        row.addWidget(label)
        row.addWidget(self.hold)
        holding = QtWidgets.QWidgetAction(menu)
        holding.setDefaultWidget(held)
        menu.addAction(holding)
        self._discard = add(tr("Discard these frames"), lambda: strips.discard(panel_id))
        self._cancel = add(tr("Cancel"), lambda: strips.cancel(panel_id))
        return menu

    def show_strip(self, view: StripView) -> None:
        self.frames.show_value(view.frames)
        self.hold.show_value(view.hold)
        seconds = QtCore.QLocale().toString((view.frames - 1) / view.rate, "f", 1)
        self.length.setText(tr("{seconds} s", seconds=seconds))
        if not self.prompt.hasFocus() and self.prompt.text() != view.prompt:
            self.prompt.setText(view.prompt)
            self.prompt.setCursorPosition(0)
        busy = view.state in ("waiting", "queued", "loading", "sampling", "placing")
        self.state.setVisible(bool(view.text))
        self.state.setText(" ".join(filter(None, (view.text, view.remedy))))
        self.state.set_tone("busy" if busy else TONES.get(view.state, "quiet"))
        self.bar.setVisible(busy)
        self.bar.set_fraction(view.fraction)
        self.make.setEnabled(view.can)
        self.make.set_glyph("again" if view.made else "film")
        self.make.set_words(
            tr("Make these frames again; those you painted stay") if view.made else tr("Make the frames in between")
        )
        self.play.setEnabled(view.made and not busy)
        self._new_seed.setEnabled(view.can and view.made)
        self._insert.setEnabled(view.can)
        self._discard.setEnabled(view.made and not busy)
        self._cancel.setVisible(busy)

    def paintEvent(self, event: QtGui.QPaintEvent | None) -> None:  # noqa: N802
        """A line down the left: this is what leads from the panel above to the one below."""
        painter = QtGui.QPainter(self)
        painter.setRenderHint(QtGui.QPainter.RenderHint.Antialiasing)
        pen = QtGui.QPen(quiet_colour(self.palette()), 1.2, Qt.PenStyle.DotLine)
        painter.setPen(pen)
        x, bottom = 11.0, self.height() - 3.0
        painter.drawLine(QtCore.QPointF(x, 1), QtCore.QPointF(x, bottom))
        painter.setPen(QtGui.QPen(pen.color(), 1.2))
        for side in (-3.0, 3.0):
            painter.drawLine(QtCore.QPointF(x + side, bottom - 3.5), QtCore.QPointF(x, bottom))
