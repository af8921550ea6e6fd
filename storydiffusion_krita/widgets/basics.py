"""Small parts that the docker's rows are made of."""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi, sin

from ..qt import Qt, QtCore, QtGui, QtWidgets, number_of

Signal = QtCore.pyqtSignal


def mixed(one: QtGui.QColor, other: QtGui.QColor, share: float) -> QtGui.QColor:
    """`share` of the other colour in one."""
    a, b = one.getRgbF(), other.getRgbF()
    rgb = [(x or 0.0) * (1 - share) + (y or 0.0) * share for x, y in zip(a[:3], b[:3], strict=True)]
    return QtGui.QColor.fromRgbF(*rgb)


def is_dark(palette: QtGui.QPalette) -> bool:
    return palette.color(QtGui.QPalette.ColorRole.Window).lightness() < 128


def quiet_colour(palette: QtGui.QPalette) -> QtGui.QColor:
    """Text that is there to be looked up, not read."""
    role = QtGui.QPalette.ColorRole
    return mixed(palette.color(role.WindowText), palette.color(role.Window), 0.35)


def tone_colour(palette: QtGui.QPalette, tone: str) -> QtGui.QColor:
    """'good', 'busy', 'warn', 'bad' or 'quiet', readable on the theme's background."""
    light, dark = {
        "good": ("#217a3c", "#7ac98d"),
        "busy": ("#1f66b0", "#7fb6ee"),
        "warn": ("#8a5a00", "#e3b35a"),
        "bad": ("#b3261e", "#f2938c"),
    }.get(tone, ("", ""))
    return QtGui.QColor(dark if is_dark(palette) else light) if light else quiet_colour(palette)


class Label(QtWidgets.QLabel):
    """Wrapping text in one of the tones; the colour is chosen when it is painted, so it follows the theme."""

    def __init__(self, text: str = "", tone: str = "", wrap: bool = True) -> None:
        super().__init__(text)
        self._tone = tone
        self.setWordWrap(wrap)
        self.setTextFormat(Qt.TextFormat.PlainText)
        # one long word must not widen the docker
        self.setSizePolicy(QtWidgets.QSizePolicy.Policy.Ignored, QtWidgets.QSizePolicy.Policy.Preferred)

    def set_tone(self, tone: str) -> None:
        self._tone = tone
        self.update()

    def paintEvent(self, event: QtGui.QPaintEvent | None) -> None:  # noqa: N802
        painter, palette = QtGui.QPainter(self), QtGui.QPalette(self.palette())
        if self._tone:
            palette.setColor(QtGui.QPalette.ColorRole.WindowText, tone_colour(palette, self._tone))
        flags = number_of(self.alignment())
        if self.wordWrap():
            flags |= number_of(Qt.TextFlag.TextWordWrap)
        style = self.style()
        assert style is not None
        role, text = QtGui.QPalette.ColorRole.WindowText, self.text()
        if not self.wordWrap():
            text = self.fontMetrics().elidedText(text, Qt.TextElideMode.ElideRight, self.width())
        style.drawItemText(painter, self.contentsRect(), flags, palette, self.isEnabled(), text, role)


# --------------------------------------------------------------------------- glyphs, on a field of 16 x 16


def _line(*points: tuple[float, float]) -> QtGui.QPainterPath:
    path = QtGui.QPainterPath(QtCore.QPointF(*points[0]))
    for point in points[1:]:
        path.lineTo(QtCore.QPointF(*point))
    return path


def _again() -> QtGui.QPainterPath:
    path = QtGui.QPainterPath()
    path.arcMoveTo(QtCore.QRectF(3, 3, 10, 10), 60)
    path.arcTo(QtCore.QRectF(3, 3, 10, 10), 60, -300)
    path.addPath(_line((10.2, 0.9), (10.6, 3.8), (7.7, 4.4)))
    return path


def _lock(open_: bool) -> QtGui.QPainterPath:
    path = QtGui.QPainterPath()
    path.addRoundedRect(QtCore.QRectF(3.5, 7.5, 9, 6), 1, 1)
    path.moveTo(5.5, 7.5)
    path.arcTo(QtCore.QRectF(5.5, 2.5 if not open_ else 1, 5, 6), 180, -180 if not open_ else -150)
    if not open_:
        path.lineTo(10.5, 7.5)
    return path


def _gear() -> QtGui.QPainterPath:
    path = QtGui.QPainterPath()
    path.addEllipse(QtCore.QPointF(8, 8), 2, 2)
    path.addEllipse(QtCore.QPointF(8, 8), 4.6, 4.6)
    for i in range(8):
        x, y = cos(i * pi / 4), sin(i * pi / 4)
        path.addPath(_line((8 + 4.6 * x, 8 + 4.6 * y), (8 + 6.6 * x, 8 + 6.6 * y)))
    return path


def _dots() -> QtGui.QPainterPath:
    path = QtGui.QPainterPath()
    for x in (3.5, 8.0, 12.5):
        path.addEllipse(QtCore.QPointF(x, 8), 0.7, 0.7)
    return path


def _grip() -> QtGui.QPainterPath:
    path = QtGui.QPainterPath()
    for x in (6.0, 10.0):
        for y in (4.0, 8.0, 12.0):
            path.addEllipse(QtCore.QPointF(x, y), 0.5, 0.5)
    return path


def _script() -> QtGui.QPainterPath:
    path = _line((3, 3), (13, 3))
    for y, x in ((6.4, 13), (9.8, 13), (13, 9)):
        path.addPath(_line((3, y), (x, y)))
    return path


GLYPHS: dict[str, Callable[[], QtGui.QPainterPath]] = {
    "again": _again,
    "lock": lambda: _lock(False),
    "unlock": lambda: _lock(True),
    "gear": _gear,
    "more": _dots,
    "grip": _grip,
    "script": _script,
    "plus": lambda: _plus(),
    "film": lambda: _film(),
    "play": lambda: _line((5, 3.5), (12.5, 8), (5, 12.5), (5, 3.5)),
    "previous": lambda: _line((10, 3.5), (5.5, 8), (10, 12.5)),
    "next": lambda: _line((6, 3.5), (10.5, 8), (6, 12.5)),
}


def _plus() -> QtGui.QPainterPath:
    path = _line((8, 3), (8, 13))
    path.addPath(_line((3, 8), (13, 8)))
    return path


def _film() -> QtGui.QPainterPath:
    path = QtGui.QPainterPath()
    path.addRoundedRect(QtCore.QRectF(2.5, 3.5, 11, 9), 1, 1)
    for x in (5.0, 11.0):
        path.addPath(_line((x, 3.5), (x, 12.5)))
    for y in (6.5, 9.5):
        path.addPath(_line((2.5, y), (5, y)))
        path.addPath(_line((11, y), (13.5, y)))
    return path


def draw_glyph(painter: QtGui.QPainter, name: str, rect: QtCore.QRectF, colour: QtGui.QColor) -> None:
    painter.save()
    painter.setRenderHint(QtGui.QPainter.RenderHint.Antialiasing)
    painter.translate(rect.topLeft())
    painter.scale(rect.width() / 16, rect.height() / 16)
    pen = QtGui.QPen(colour, 1.4)
    pen.setCapStyle(Qt.PenCapStyle.RoundCap)
    pen.setJoinStyle(Qt.PenJoinStyle.RoundJoin)
    painter.setPen(pen)
    painter.drawPath(GLYPHS[name]())
    painter.restore()


class GlyphButton(QtWidgets.QToolButton):
    """A flat button with a glyph in the theme's text colour; its words are its tooltip and accessible name."""

    def __init__(self, glyph: str, words: str, size: int = 22) -> None:
        super().__init__()
        self._glyph = glyph
        self.setAutoRaise(True)
        self.setFixedSize(size, size)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.set_words(words)

    def set_words(self, words: str) -> None:
        self.setToolTip(words)
        self.setAccessibleName(words)

    def set_glyph(self, glyph: str) -> None:
        self._glyph = glyph
        self.update()

    def paintEvent(self, event: QtGui.QPaintEvent | None) -> None:  # noqa: N802
        painter = QtWidgets.QStylePainter(self)
        option = QtWidgets.QStyleOptionToolButton()
        self.initStyleOption(option)
        option.features &= ~QtWidgets.QStyleOptionToolButton.ToolButtonFeature.HasMenu
        painter.drawComplexControl(QtWidgets.QStyle.ComplexControl.CC_ToolButton, option)
        if self.hasFocus():
            ring = self.palette().color(QtGui.QPalette.ColorRole.Highlight)
            painter.setPen(QtGui.QPen(ring, 1))
            painter.drawRect(self.rect().adjusted(0, 0, -1, -1))
        side = min(self.width(), self.height()) - 6
        rect = QtCore.QRectF((self.width() - side) / 2, (self.height() - side) / 2, side, side)
        normal, role = QtGui.QPalette.ColorGroup.Normal, QtGui.QPalette.ColorRole
        colour = self.palette().color(normal, role.WindowText)
        if not self.isEnabled():
            colour = mixed(colour, self.palette().color(normal, role.Window), 0.65)
        draw_glyph(painter, self._glyph, rect, colour)
        painter.end()


class TagHighlighter(QtGui.QSyntaxHighlighter):
    """[Names] in their character's colour, captions quiet."""

    def __init__(self, document: QtGui.QTextDocument, captions: bool = False) -> None:
        super().__init__(document)
        self._captions = captions
        self.colours: Callable[[str], str] = lambda name: ""

    def highlightBlock(self, text: str | None) -> None:  # noqa: N802
        from .. import script

        text, palette = text or "", QtWidgets.QApplication.palette()
        if self._captions:
            at = 0 if text.lstrip().startswith("#") else text.find(" #")
            if at >= 0:
                quiet = QtGui.QTextCharFormat()
                quiet.setForeground(quiet_colour(palette))
                self.setFormat(at, len(text) - at, quiet)
        for tag in script.TAG.finditer(text):
            colour = self.colours(script.key(tag[1]))
            if not colour:
                continue
            tagged = QtGui.QTextCharFormat()
            tagged.setFontWeight(QtGui.QFont.Weight.DemiBold)
            white = QtGui.QColor("#ffffff") if is_dark(palette) else QtGui.QColor("#000000")
            tagged.setForeground(mixed(QtGui.QColor(colour), white, 0.3))
            self.setFormat(tag.start(), tag.end() - tag.start(), tagged)


class GrowingEdit(QtWidgets.QPlainTextEdit):
    """A paragraph edited in place: as high as its words, no line breaks, Tab goes on."""

    edited = Signal(str)

    def __init__(self, placeholder: str, name: str) -> None:
        super().__init__()
        self.setPlaceholderText(placeholder)
        self.setAccessibleName(name)
        self.setTabChangesFocus(True)
        self.setFrameShape(QtWidgets.QFrame.Shape.NoFrame)
        self.setVerticalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setSizePolicy(QtWidgets.QSizePolicy.Policy.Ignored, QtWidgets.QSizePolicy.Policy.Fixed)
        self._document.setDocumentMargin(2)
        self._text = ""
        self.textChanged.connect(self._changed)

    @property
    def _document(self) -> QtGui.QTextDocument:
        document = self.document()
        assert document is not None
        return document

    def set_text(self, text: str) -> None:
        """From outside; what is being typed keeps its cursor."""
        if text != self._text:
            self._text = text
            self.setPlainText(text)
            self._fit()

    def _changed(self) -> None:
        self._fit()
        text = " ".join(self.toPlainText().split("\n"))
        if text != self._text:  # colouring is a change of the text too, for Qt
            self._text = text
            self.edited.emit(text)

    def _fit(self) -> None:
        lines = max(1, round(self._document.size().height()))
        height = lines * self.fontMetrics().lineSpacing() + 6
        if height != self.height():
            self.setFixedHeight(height)

    def resizeEvent(self, event: QtGui.QResizeEvent | None) -> None:  # noqa: N802
        super().resizeEvent(event)
        self._fit()

    def changeEvent(self, event: QtCore.QEvent | None) -> None:  # noqa: N802
        super().changeEvent(event)
        if event is not None and event.type() == QtCore.QEvent.Type.PaletteChange:
            for highlighter in self._document.findChildren(QtGui.QSyntaxHighlighter):
                highlighter.rehighlight()

    def keyPressEvent(self, event: QtGui.QKeyEvent | None) -> None:  # noqa: N802
        if event is not None and event.key() in (Qt.Key.Key_Return, Qt.Key.Key_Enter):
            self.focusNextChild()
            return
        super().keyPressEvent(event)

    def wheelEvent(self, event: QtGui.QWheelEvent | None) -> None:  # noqa: N802
        if event is not None:
            event.ignore()  # the list scrolls, not the paragraph


class Thumbnail(QtWidgets.QWidget):
    """A picture, whole, on a quiet ground."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.setFixedSize(side, side)
        self._image: QtGui.QImage | None = None

    def set_image(self, image: QtGui.QImage | None) -> None:
        self._image = image
        self.update()

    def paintEvent(self, event: QtGui.QPaintEvent | None) -> None:  # noqa: N802
        painter = QtGui.QPainter(self)
        painter.setRenderHint(QtGui.QPainter.RenderHint.SmoothPixmapTransform)
        role, palette = QtGui.QPalette.ColorRole, self.palette()
        ground = mixed(palette.color(role.Window), palette.color(role.WindowText), 0.12)
        if self._image is None or self._image.isNull():
            painter.setRenderHint(QtGui.QPainter.RenderHint.Antialiasing)
            pen = QtGui.QPen(mixed(ground, palette.color(role.WindowText), 0.25), 1, Qt.PenStyle.DashLine)
            painter.setPen(pen)
            painter.setBrush(ground)
            painter.drawRoundedRect(QtCore.QRectF(self.rect()).adjusted(0.5, 0.5, -0.5, -0.5), 3, 3)
            return
        painter.fillRect(self.rect(), ground)
        size = self._image.size().scaled(self.size(), Qt.AspectRatioMode.KeepAspectRatio)
        left, top = (self.width() - size.width()) // 2, (self.height() - size.height()) // 2
        painter.drawImage(QtCore.QRect(QtCore.QPoint(left, top), size), self._image)


class ThinBar(QtWidgets.QWidget):
    """Progress in four pixels; None is not known yet."""

    def __init__(self) -> None:
        super().__init__()
        self.setFixedHeight(4)
        self._fraction: float | None = None

    def set_fraction(self, fraction: float | None) -> None:
        self._fraction = fraction
        self.update()

    def paintEvent(self, event: QtGui.QPaintEvent | None) -> None:  # noqa: N802
        painter = QtGui.QPainter(self)
        role, palette = QtGui.QPalette.ColorRole, self.palette()
        painter.fillRect(self.rect(), mixed(palette.color(role.Window), palette.color(role.WindowText), 0.15))
        if self._fraction is not None:
            width = round(self.width() * min(max(self._fraction, 0.0), 1.0))
            painter.fillRect(0, 0, width, self.height(), palette.color(role.Highlight))
