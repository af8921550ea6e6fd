"""The story's characters: name, description, picture, colour; edited in place."""

from __future__ import annotations

from ..controller import Controller
from ..qt import Qt, QtCore, QtGui, QtWidgets
from ..story_state import COLOURS, Character
from ..texts import tr
from .basics import GlyphButton, GrowingEdit, Label, Signal, mixed

FACE = 34


class Face(QtWidgets.QToolButton):
    """A character's picture in their colour, or their initial."""

    def __init__(self) -> None:
        super().__init__()
        self.setFixedSize(FACE, FACE)
        self.setAutoRaise(True)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self._colour, self._initial, self._image = COLOURS[0], "", QtGui.QImage()

    def show_character(self, one: Character, picture: bytes) -> None:
        self._colour, self._initial = one.colour, one.name[:1].upper()
        self._image = QtGui.QImage.fromData(picture) if picture else QtGui.QImage()
        words = tr("Picture of {name}: take it from the active layer", name=one.name)
        self.setToolTip(words)
        self.setAccessibleName(words)
        self.update()

    def paintEvent(self, event: QtGui.QPaintEvent | None) -> None:  # noqa: N802
        painter = QtGui.QPainter(self)
        painter.setRenderHint(QtGui.QPainter.RenderHint.Antialiasing)
        painter.setRenderHint(QtGui.QPainter.RenderHint.SmoothPixmapTransform)
        rect = QtCore.QRectF(self.rect()).adjusted(1.5, 1.5, -1.5, -1.5)
        shape = QtGui.QPainterPath()
        shape.addRoundedRect(rect, 5, 5)
        window = self.palette().color(QtGui.QPalette.ColorRole.Window)
        painter.fillPath(shape, mixed(QtGui.QColor(self._colour), window, 0.6))
        painter.save()
        painter.setClipPath(shape)
        if self._image.isNull():
            font = self.font()
            font.setBold(True)
            painter.setFont(font)
            painter.setPen(self.palette().color(QtGui.QPalette.ColorRole.WindowText))
            painter.drawText(self.rect(), Qt.AlignmentFlag.AlignCenter, self._initial)
        else:
            side = min(self._image.width(), self._image.height())
            source = QtCore.QRect((self._image.width() - side) // 2, (self._image.height() - side) // 2, side, side)
            painter.drawImage(self.rect(), self._image, source)
        painter.restore()
        focus = self.palette().color(QtGui.QPalette.ColorRole.Highlight)
        painter.setPen(QtGui.QPen(focus if self.hasFocus() else QtGui.QColor(self._colour), 2))
        painter.drawPath(shape)


class CharacterRow(QtWidgets.QWidget):
    def __init__(self, controller: Controller, character_id: str) -> None:
        super().__init__()
        self._controller, self.character_id = controller, character_id
        self.face = Face()
        self.face.clicked.connect(lambda: controller.picture_from_layer(character_id))
        self.name = QtWidgets.QLineEdit()
        self.name.setAccessibleName(tr("Name of the character"))
        self.name.setFrame(False)
        font = self.name.font()
        font.setBold(True)
        self.name.setFont(font)
        self.name.editingFinished.connect(self._rename)
        self.description = GrowingEdit(tr("what they look like: a fox in a long scarf"), tr("Description"))
        self.description.edited.connect(lambda text: controller.set_character(character_id, description=text))
        self.more = GlyphButton("more", tr("More for this character"))
        self.more.setPopupMode(QtWidgets.QToolButton.ToolButtonPopupMode.InstantPopup)
        self.wrong = Label(tone="bad")
        self.wrong.hide()
        grid = QtWidgets.QGridLayout(self)
        grid.setContentsMargins(0, 1, 0, 1)
        grid.setHorizontalSpacing(5)
        grid.setVerticalSpacing(1)
        grid.addWidget(self.face, 0, 0, 2, 1, Qt.AlignmentFlag.AlignTop)
        grid.addWidget(self.name, 0, 1)
        grid.addWidget(self.more, 0, 2)
        grid.addWidget(self.description, 1, 1, 1, 2)
        grid.addWidget(self.wrong, 2, 1, 1, 2)
        grid.setColumnStretch(1, 1)
        self._picture: str | None = None
        self.more.setMenu(self._menu())

    def _menu(self) -> QtWidgets.QMenu:
        controller, character_id = self._controller, self.character_id
        menu = QtWidgets.QMenu(self)
        _add(menu, tr("Picture from the active layer"), lambda: controller.picture_from_layer(character_id))
        self._remove_picture = _add(menu, tr("Remove the picture"), lambda: controller.remove_picture(character_id))
        colours = menu.addMenu(tr("Colour"))
        assert colours is not None
        for colour in COLOURS:
            swatch = QtGui.QPixmap(16, 16)
            swatch.fill(QtGui.QColor(colour))
            action = _add(colours, colour, lambda c=colour: controller.set_character(character_id, colour=c))
            action.setIcon(QtGui.QIcon(swatch))
        menu.addSeparator()
        _add(menu, tr("Remove the character"), lambda: controller.remove_character(character_id))
        return menu

    def show_character(self, one: Character) -> None:
        if not self.name.hasFocus():
            self.name.setText(one.name)
        self.description.set_text(one.description)
        look = f"{one.colour} {one.name} {one.picture}"
        if look != self._picture:
            self._picture = look
            self.face.show_character(one, self._controller.picture_of(one.id) if one.picture else b"")
        self._remove_picture.setEnabled(bool(one.picture))
        for widget in (self.name, self.description):
            widget.setReadOnly(self._controller.readonly)

    def _rename(self) -> None:
        wrong = self._controller.set_character(self.character_id, name=self.name.text())
        self.wrong.setText(wrong)
        self.wrong.setVisible(bool(wrong))
        if wrong:
            one = self._controller.story.character(self.character_id)
            self.name.setText(one.name if one is not None else "")


def _add(menu: QtWidgets.QMenu, text: str, call: object) -> QtGui.QAction:
    action = menu.addAction(text)
    assert action is not None
    action.triggered.connect(lambda: call())  # type: ignore[operator]
    return action


class Characters(QtWidgets.QWidget):
    """The list; `changed` when rows came or went."""

    changed = Signal()

    def __init__(self) -> None:
        super().__init__()
        self._controller: Controller | None = None
        self.rows: dict[str, CharacterRow] = {}
        title = QtWidgets.QLabel(tr("Characters"))
        font = title.font()
        font.setBold(True)
        title.setFont(font)
        self.add = GlyphButton("plus", tr("Add a character"))
        self.add.clicked.connect(self._add)
        head = QtWidgets.QHBoxLayout()
        head.addWidget(title, 1)
        head.addWidget(self.add)
        self._layout = QtWidgets.QVBoxLayout(self)
        self._layout.setContentsMargins(0, 0, 0, 0)
        self._layout.setSpacing(3)
        self._layout.addLayout(head)
        self._hint = Label(tr("Nobody yet. A character stays the same in all panels that name them."), "quiet")
        self._layout.addWidget(self._hint)

    def show_story(self, controller: Controller) -> None:
        if controller is not self._controller:
            self._controller = controller
            self._drop(list(self.rows))
        characters = controller.story.characters
        self._drop([name for name in self.rows if controller.story.character(name) is None])
        for one in characters:
            if one.id not in self.rows:
                self.rows[one.id] = CharacterRow(controller, one.id)
                self._layout.addWidget(self.rows[one.id])
            self.rows[one.id].show_character(one)
        self._hint.setVisible(not characters)
        self.add.setEnabled(not controller.readonly)

    def _drop(self, names: list[str]) -> None:
        for name in names:
            row = self.rows.pop(name)
            self._layout.removeWidget(row)
            row.hide()
            row.deleteLater()

    def _add(self) -> None:
        one = self._controller.add_character() if self._controller is not None else None
        if one is not None and one.id in self.rows:
            name = self.rows[one.id].name
            name.setFocus()
            name.selectAll()
