"""The status line, and what the gear opens: the backend, its log, and the story's rarer settings."""

from __future__ import annotations

from collections.abc import Callable

from ..backend_process import Backend, Status
from ..controller import Controller
from ..qt import QtCore, QtGui, QtWidgets
from ..settings import Settings
from ..story_state import MAX_SEED
from ..texts import tr
from .basics import GlyphButton, Label, Signal, ThinBar, tone_colour

DOTS = {"ready": "good", "failed": "bad", "lost": "bad", "absent": "quiet"}


class Dot(QtWidgets.QWidget):
    def __init__(self) -> None:
        super().__init__()
        self.setFixedSize(12, 18)
        self.tone = "quiet"

    def paintEvent(self, event: QtGui.QPaintEvent | None) -> None:  # noqa: N802
        painter = QtGui.QPainter(self)
        painter.setRenderHint(QtGui.QPainter.RenderHint.Antialiasing)
        colour = tone_colour(self.palette(), self.tone)
        painter.setPen(colour)
        if self.tone != "quiet":
            painter.setBrush(colour)
        painter.drawEllipse(QtCore.QRectF(1.5, 4.5, 9, 9))


class StatusLine(QtWidgets.QWidget):
    """One line: what the backend does; where it cannot, what to do, and a button that does it."""

    acted = Signal(str)

    def __init__(self) -> None:
        super().__init__()
        self._dot = Dot()
        self.text = Label()
        self.remedy = Label(tone="quiet")
        self.button = QtWidgets.QPushButton()
        self.button.clicked.connect(lambda: self.acted.emit(self._action))
        self.gear = GlyphButton("gear", tr("Settings and log"))
        self.gear.setCheckable(True)
        self._bar = ThinBar()
        self._action = ""
        line = QtWidgets.QHBoxLayout()
        line.setSpacing(5)
        line.addWidget(self._dot)
        line.addWidget(self.text, 1)
        line.addWidget(self.gear)
        layout = QtWidgets.QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(3)
        layout.addLayout(line)
        layout.addWidget(self.remedy)
        layout.addWidget(self._bar)
        layout.addWidget(self.button)
        self.show_status(Status("absent", ""))

    def show_status(self, status: Status, model: str = "") -> None:
        self._dot.tone = DOTS.get(status.state, "busy")
        self._dot.update()
        ready = status.state == "ready"
        self.text.setText(" · ".join(filter(None, (model if ready else "", status.text))))
        self.text.setToolTip(status.text)
        self.remedy.setText(status.remedy)
        self.remedy.setVisible(bool(status.remedy))
        self._bar.setVisible(status.fraction is not None)
        self._bar.set_fraction(status.fraction)
        self._action = status.action
        words = {
            "install": tr("Install the backend"),
            "update": tr("Update the backend"),
            "start": tr("Start it again"),
            "stop_install": tr("Stop"),
        }
        self.button.setText(words.get(status.action, ""))
        self.button.setVisible(bool(status.action))


class SettingsPage(QtWidgets.QWidget):
    """What the gear opens, in place."""

    device_chosen = Signal(str)
    connect_asked = Signal(str, str)
    restart_asked = Signal()
    previews_chosen = Signal(bool)

    def __init__(self, settings: Settings, backend: Backend) -> None:
        super().__init__()
        self._backend = backend
        self._controller: Controller | None = None
        form = QtWidgets.QFormLayout(self)
        form.setContentsMargins(0, 2, 0, 6)
        form.setRowWrapPolicy(QtWidgets.QFormLayout.RowWrapPolicy.WrapLongRows)
        form.setFieldGrowthPolicy(QtWidgets.QFormLayout.FieldGrowthPolicy.AllNonFixedFieldsGrow)
        self._story_rows(form)
        self.device = QtWidgets.QComboBox()
        for name, words in (
            ("cpu", tr("CPU: works everywhere, slow with large models")),
            ("cuda", tr("NVIDIA GPU (CUDA)")),
            ("rocm", tr("AMD GPU (ROCm, Linux)")),
            ("mps", tr("Apple GPU (MPS)")),
        ):
            self.device.addItem(words, name)
        _narrow(self.device)
        self.device.setCurrentIndex(max(0, self.device.findData(settings.device)))
        self.device.activated.connect(lambda _: self.device_chosen.emit(self.device.currentData()))
        self.restart = QtWidgets.QPushButton(tr("Restart"))
        self.restart.clicked.connect(self.restart_asked.emit)
        form.addRow(_heading(tr("Backend")))
        form.addRow(tr("Runs on"), self.device)
        self.address = QtWidgets.QLineEdit(settings.remote)
        self.address.setPlaceholderText(tr("this computer"))
        self.address.setAccessibleName(tr("Address of another backend"))
        self.token = QtWidgets.QLineEdit(settings.token)
        self.token.setEchoMode(QtWidgets.QLineEdit.EchoMode.Password)
        self.token.setAccessibleName(tr("Token"))
        connect = QtWidgets.QPushButton(tr("Connect"))
        connect.clicked.connect(lambda: self.connect_asked.emit(self.address.text().strip(), self.token.text().strip()))
        form.addRow(tr("Address"), self.address)
        form.addRow(tr("Token"), self.token)
        buttons = QtWidgets.QHBoxLayout()
        for button in (connect, self.restart):
            button.setMinimumWidth(40)
            buttons.addWidget(button)
        form.addRow(buttons)
        self.previews = QtWidgets.QCheckBox(tr("on the canvas"))
        self.previews.setChecked(settings.previews)
        self.previews.toggled.connect(self.previews_chosen.emit)
        form.addRow(tr("Previews"), self.previews)
        self.log = QtWidgets.QPlainTextEdit()
        self.log.setReadOnly(True)
        self.log.setAccessibleName(tr("Log"))
        self.log.setFixedHeight(110)
        self.log.setLineWrapMode(QtWidgets.QPlainTextEdit.LineWrapMode.NoWrap)
        font = QtGui.QFontDatabase.systemFont(QtGui.QFontDatabase.SystemFont.FixedFont)
        font.setPointSizeF(max(7.0, self.font().pointSizeF() * 0.85))
        self.log.setFont(font)
        form.addRow(_heading(tr("Log")))
        form.addRow(self.log)
        self._timer = QtCore.QTimer(self)
        self._timer.setInterval(1000)
        self._timer.timeout.connect(self._read_log)

    def _story_rows(self, form: QtWidgets.QFormLayout) -> None:
        self.negative = QtWidgets.QLineEdit()
        self.negative.setPlaceholderText(tr("what should not be seen"))
        self.negative.editingFinished.connect(lambda: self._set("negative_prompt", self.negative.text()))
        self.seed = QtWidgets.QLineEdit()
        self.seed.setValidator(QtGui.QRegularExpressionValidator(QtCore.QRegularExpression("[0-9]{1,18}")))
        self.seed.editingFinished.connect(lambda: self._set("seed", min(int(self.seed.text() or 0), MAX_SEED)))
        self.steps = QtWidgets.QSpinBox()
        self.steps.setRange(0, 200)
        self.steps.setSpecialValueText(tr("the model's"))
        self.steps.editingFinished.connect(lambda: self._set("steps", self.steps.value() or None))
        self.guidance = QtWidgets.QDoubleSpinBox()
        self.guidance.setRange(-0.5, 30)
        self.guidance.setSingleStep(0.5)
        self.guidance.setDecimals(1)
        self.guidance.setSpecialValueText(tr("the model's"))
        self.guidance.editingFinished.connect(
            lambda: self._set("guidance_scale", self.guidance.value() if self.guidance.value() >= 0 else None)
        )
        for box in (self.steps, self.guidance):
            box.setMinimumWidth(60)
        form.addRow(_heading(tr("This story")))
        form.addRow(tr("Seed"), self.seed)
        form.addRow(tr("Without"), self.negative)
        form.addRow(tr("Steps"), self.steps)
        form.addRow(tr("Guidance"), self.guidance)

    def _set(self, name: str, value: object) -> None:
        if self._controller is not None and getattr(self._controller.story, name) != value:
            self._controller.set_settings(**{name: value})

    def show_story(self, controller: Controller | None) -> None:
        self._controller = controller
        for widget in (self.seed, self.negative, self.steps, self.guidance):
            widget.setEnabled(controller is not None and not controller.readonly)
        if controller is None:
            return
        story = controller.story
        if not self.seed.hasFocus():
            self.seed.setText(str(story.seed))
        if not self.negative.hasFocus():
            self.negative.setText(story.negative_prompt)
        self.steps.setValue(story.steps or 0)
        self.guidance.setValue(-0.5 if story.guidance_scale is None else story.guidance_scale)

    def showEvent(self, event: QtGui.QShowEvent | None) -> None:  # noqa: N802
        super().showEvent(event)
        self._timer.start()
        self._read_log()

    def _read_log(self) -> None:
        if not self.isVisible():
            self._timer.stop()
            return
        text = self._backend.log_text()
        if text != self.log.toPlainText():
            self.log.setPlainText(text)
            bar = self.log.verticalScrollBar()
            if bar is not None:
                bar.setValue(bar.maximum())


def _heading(text: str) -> QtWidgets.QLabel:
    label = QtWidgets.QLabel(text)
    font = label.font()
    font.setBold(True)
    label.setFont(font)
    return label


def _narrow(box: QtWidgets.QComboBox) -> None:
    """A combo box as wide as there is room, not as its longest entry."""
    box.setSizeAdjustPolicy(QtWidgets.QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
    box.setMinimumContentsLength(6)
    box.setSizePolicy(QtWidgets.QSizePolicy.Policy.Ignored, QtWidgets.QSizePolicy.Policy.Fixed)


def narrow_combo(name: str, activated: Callable[[QtWidgets.QComboBox], None]) -> QtWidgets.QComboBox:
    box = QtWidgets.QComboBox()
    box.setAccessibleName(name)
    box.setToolTip(name)
    _narrow(box)
    box.activated.connect(lambda _: activated(box))
    return box
