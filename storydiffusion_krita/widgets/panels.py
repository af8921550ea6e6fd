"""The panels in reading order: one row each, edited, dragged and made again in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..controller import Controller
from ..progress import PanelView
from ..qt import Qt, QtCore, QtGui, QtWidgets
from ..story_state import MAX_SEED, Panel
from ..texts import tr
from .basics import GlyphButton, GrowingEdit, Label, Signal, TagHighlighter, ThinBar, Thumbnail, mixed
from .strips import StripRow

TONES = {"done": "quiet", "stale": "warn", "problem": "bad", "failed": "bad", "empty": "quiet"}
THUMBNAIL = 56


class Grip(QtWidgets.QWidget):
    """The panel's number, by which it is dragged."""

    pressed = Signal(object)
    dragged = Signal(QtCore.QPoint)
    dropped = Signal()

    def __init__(self) -> None:
        super().__init__()
        self.setFixedWidth(18)
        self.setCursor(Qt.CursorShape.OpenHandCursor)
        self.setToolTip(tr("Drag to another place, or Alt+Up and Alt+Down"))
        self.number = 0

    def paintEvent(self, event: QtGui.QPaintEvent | None) -> None:  # noqa: N802
        from .basics import draw_glyph, quiet_colour

        painter = QtGui.QPainter(self)
        font = self.font()
        font.setBold(True)
        painter.setFont(font)
        painter.drawText(QtCore.QRect(0, 0, self.width(), 20), Qt.AlignmentFlag.AlignCenter, str(self.number))
        draw_glyph(painter, "grip", QtCore.QRectF(1, 22, 16, 16), quiet_colour(self.palette()))

    def mousePressEvent(self, event: QtGui.QMouseEvent | None) -> None:  # noqa: N802
        self.setCursor(Qt.CursorShape.ClosedHandCursor)
        if event is not None:
            self.pressed.emit(event.modifiers())

    def mouseMoveEvent(self, event: QtGui.QMouseEvent | None) -> None:  # noqa: N802
        if event is not None and event.buttons() & Qt.MouseButton.LeftButton:
            self.dragged.emit(self.mapToGlobal(event.pos()))

    def mouseReleaseEvent(self, event: QtGui.QMouseEvent | None) -> None:  # noqa: N802
        self.setCursor(Qt.CursorShape.OpenHandCursor)
        self.dropped.emit()


class PanelRow(QtWidgets.QWidget):
    """One panel."""

    chosen = Signal(str, object)  # id, keyboard modifiers
    stepped = Signal(str, int)

    def __init__(self, controller: Controller, panel_id: str) -> None:
        super().__init__()
        self._controller, self.panel_id = controller, panel_id
        self._selected = False
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.grip = Grip()
        self.thumbnail = Thumbnail(THUMBNAIL)
        self.prompt = GrowingEdit(tr("[Name] and what is to be seen"), tr("Prompt"))
        self.prompt.edited.connect(lambda text: controller.set_words(panel_id, prompt=text))
        document = self.prompt.document()
        assert document is not None
        self.highlighter = TagHighlighter(document)
        self.caption = GrowingEdit(tr("caption"), tr("Caption"))
        font = self.caption.font()
        font.setItalic(True)
        self.caption.setFont(font)
        self.caption.edited.connect(lambda text: controller.set_words(panel_id, caption=text))
        self.state = Label(tone="quiet")
        self.bar = ThinBar()
        self.bar.hide()
        self.seed = QtWidgets.QLineEdit()
        self.seed.setPlaceholderText(tr("seed: the story's"))
        self.seed.setAccessibleName(tr("Seed"))
        self.seed.setValidator(QtGui.QRegularExpressionValidator(QtCore.QRegularExpression("[0-9]{0,18}")))
        self.seed.editingFinished.connect(self._seed_typed)
        self.seed.hide()
        self._build_buttons()
        words = QtWidgets.QVBoxLayout()
        words.setSpacing(1)
        for widget in (self.prompt, self.caption, self.state, self.bar, self.seed):
            words.addWidget(widget)
        words.addLayout(self._buttons)
        outer = QtWidgets.QHBoxLayout(self)
        outer.setContentsMargins(2, 4, 2, 4)
        outer.setSpacing(4)
        outer.addWidget(self.grip)
        outer.addWidget(self.thumbnail, 0, Qt.AlignmentFlag.AlignTop)
        outer.addLayout(words, 1)

    def _build_buttons(self) -> None:
        controller, panel_id = self._controller, self.panel_id
        self.previous = GlyphButton("previous", tr("Earlier take"), 18)
        self.previous.clicked.connect(lambda: controller.choose_take(panel_id, -1))
        self.take = Label(wrap=False)
        self.take.setSizePolicy(QtWidgets.QSizePolicy.Policy.Fixed, QtWidgets.QSizePolicy.Policy.Preferred)
        self.next = GlyphButton("next", tr("Later take"), 18)
        self.next.clicked.connect(lambda: controller.choose_take(panel_id, 1))
        self.lock = GlyphButton("unlock", tr("Lock: leave this panel as it is"), 22)
        self.lock.setCheckable(True)
        self.lock.clicked.connect(lambda locked: controller.set_locked(panel_id, locked))
        self.again = GlyphButton("again", tr("Make this panel again"), 22)
        self.again.clicked.connect(lambda: controller.again(panel_id))
        self.more = GlyphButton("more", tr("More for this panel"), 22)
        self.more.setPopupMode(QtWidgets.QToolButton.ToolButtonPopupMode.InstantPopup)
        self.more.setMenu(self._menu())
        self._buttons = QtWidgets.QHBoxLayout()
        self._buttons.setSpacing(1)
        for widget in (self.previous, self.take, self.next):
            self._buttons.addWidget(widget)
        self.short = Label(tone="quiet", wrap=False)
        self._buttons.addWidget(self.short, 1)
        for widget in (self.lock, self.again, self.more):
            self._buttons.addWidget(widget)

    def _menu(self) -> QtWidgets.QMenu:
        controller, panel_id = self._controller, self.panel_id
        menu = QtWidgets.QMenu(self)

        def add(to: QtWidgets.QMenu, text: str, call: Callable[[], object]) -> QtGui.QAction:
            action = to.addAction(text)
            assert action is not None
            action.triggered.connect(lambda: call())
            return action

        self._new_seed = add(menu, tr("Again with a new seed"), lambda: controller.generate([panel_id], True))
        refine = menu.addMenu(tr("Refine the picture"))
        assert refine is not None
        self._refine = refine
        for text, strength in ((tr("A little"), 0.3), (tr("Somewhat"), 0.5), (tr("A lot"), 0.75)):
            add(refine, text, partial(controller.refine, panel_id, strength))
        self._keep = add(menu, tr("Keep this take's seed"), lambda: controller.keep_seed(panel_id))
        add(menu, tr("Choose a seed…"), self._show_seed)
        self._discard = add(menu, tr("Discard this take"), lambda: controller.discard_take(panel_id))
        self._cancel = add(menu, tr("Cancel"), lambda: controller.cancel(panel_id))
        menu.addSeparator()
        add(menu, tr("Add a panel after this"), lambda: controller.add_panel(panel_id))
        add(menu, tr("Move up"), lambda: self.stepped.emit(panel_id, -1))
        add(menu, tr("Move down"), lambda: self.stepped.emit(panel_id, 1))
        add(menu, tr("Remove from the story"), lambda: controller.remove_panel(panel_id))
        return menu

    def _show_seed(self) -> None:
        self.seed.show()
        self.seed.setFocus()

    def _seed_typed(self) -> None:
        text = self.seed.text().strip()
        self._controller.set_seed(self.panel_id, min(int(text), MAX_SEED) if text else None)

    def show_panel(self, view: PanelView, image: QtGui.QImage | None, colours: Callable[[str], str]) -> None:
        if self.grip.number != view.number:
            self.grip.number = view.number
            self.grip.update()
            self.setAccessibleName(tr("Panel {number}", number=view.number))
        self.prompt.set_text(view.prompt)
        if colours is not self.highlighter.colours:
            self.highlighter.colours = colours
            self.highlighter.rehighlight()
        self.caption.set_text(view.caption)
        busy = view.state in ("waiting", "queued", "loading", "sampling", "placing")
        calm = view.state in ("done", "empty")  # one word, beside the buttons
        self.short.setText(view.text if calm and view.takes < 2 else "")
        self.state.setVisible(not calm)
        self.state.setText(" ".join(filter(None, (view.text, view.remedy))))
        self.state.set_tone("busy" if busy else TONES.get(view.state, "quiet"))
        self.bar.setVisible(busy)
        self.bar.set_fraction(view.fraction)
        self.thumbnail.set_image(image)
        if not self.seed.hasFocus():
            self.seed.setText("" if view.seed is None else str(view.seed))
            self.seed.setVisible(view.seed is not None)
        self._show_buttons(view, busy)
        if view.selected != self._selected:
            self._selected = view.selected
            self.update()

    def _show_buttons(self, view: PanelView, busy: bool) -> None:
        several = view.takes > 1
        for widget in (self.previous, self.take, self.next):
            widget.setVisible(several)
        self.take.setText(f"{view.take}/{view.takes}")
        self.take.setToolTip(tr("take {take} of {takes}", take=view.take, takes=view.takes))
        self.previous.setEnabled(view.take > 1)
        self.next.setEnabled(view.take < view.takes)
        self.lock.setChecked(view.locked)
        self.lock.set_glyph("lock" if view.locked else "unlock")
        can = not busy and not view.problem and not view.locked
        self.again.setEnabled(can)
        inside = view.inside_selection
        self.again.set_words(tr("Again inside the selection") if inside else tr("Make this panel again"))
        for action in (self._new_seed, self._refine):
            action.setEnabled(can and (action is self._new_seed or view.takes > 0))
        self._keep.setEnabled(view.take > 0)
        self._discard.setEnabled(view.take > 0 and not busy)
        self._cancel.setVisible(busy)

    def paintEvent(self, event: QtGui.QPaintEvent | None) -> None:  # noqa: N802
        role, palette = QtGui.QPalette.ColorRole, self.palette()
        painter = QtGui.QPainter(self)
        painter.setRenderHint(QtGui.QPainter.RenderHint.Antialiasing)
        window, highlight = palette.color(role.Window), palette.color(role.Highlight)
        rect = QtCore.QRectF(self.rect()).adjusted(0.5, 0.5, -0.5, -0.5)
        painter.setPen(QtGui.QPen(highlight, 1) if self.hasFocus() else Qt.PenStyle.NoPen)
        text = palette.color(role.WindowText)
        painter.setBrush(mixed(window, highlight, 0.3) if self._selected else mixed(window, text, 0.04))
        painter.drawRoundedRect(rect, 4, 4)

    def focusInEvent(self, event: QtGui.QFocusEvent | None) -> None:  # noqa: N802
        super().focusInEvent(event)
        if event is not None and event.reason() != Qt.FocusReason.MouseFocusReason:
            self.chosen.emit(self.panel_id, Qt.KeyboardModifier.NoModifier)

    def mousePressEvent(self, event: QtGui.QMouseEvent | None) -> None:  # noqa: N802
        if event is not None:
            self.setFocus(Qt.FocusReason.MouseFocusReason)
            self.chosen.emit(self.panel_id, event.modifiers())

    def keyPressEvent(self, event: QtGui.QKeyEvent | None) -> None:  # noqa: N802
        if event is None:
            return
        keys = {Qt.Key.Key_Up: -1, Qt.Key.Key_Down: 1}
        if event.key() in keys and event.modifiers() & Qt.KeyboardModifier.AltModifier:
            self.stepped.emit(self.panel_id, keys[Qt.Key(event.key())])
        elif event.key() in keys:
            _neighbour(self, keys[Qt.Key(event.key())])
        elif event.key() in (Qt.Key.Key_Return, Qt.Key.Key_Enter, Qt.Key.Key_F2):
            self.prompt.setFocus()
        else:
            super().keyPressEvent(event)


def _neighbour(row: PanelRow, step: int) -> None:
    panels = row.parentWidget()
    if isinstance(panels, PanelList):
        order = panels.order
        at = order.index(row.panel_id) + step
        if 0 <= at < len(order):
            panels.rows[order[at]].setFocus(Qt.FocusReason.TabFocusReason)


class PanelList(QtWidgets.QWidget):
    """All panels; `moved` says that a panel was dropped at a place."""

    moved = Signal(str, int)

    def __init__(self) -> None:
        super().__init__()
        self._controller: Controller | None = None
        self.rows: dict[str, PanelRow] = {}
        self.strips: dict[str, StripRow] = {}
        self.order: list[str] = []
        self._colours: dict[str, str] = {}
        self._colour_of: Callable[[str], str] = lambda name: ""
        self._drop_at: int | None = None
        self._layout = QtWidgets.QVBoxLayout(self)
        self._layout.setContentsMargins(0, 0, 0, 0)
        self._layout.setSpacing(3)

    def show_story(self, controller: Controller) -> None:
        """Rows for the panels that there are, in their order."""
        from .. import script

        if controller is not self._controller:
            self._controller = controller
            self._drop_rows(list(self.rows))
        colours = {script.key(one.name): one.colour for one in controller.story.characters}
        if colours != self._colours:
            self._colours = colours
            self._colour_of = lambda name: colours.get(name, "")
        panels = controller.story.panels
        self._drop_rows([name for name in self.rows if controller.story.panel(name) is None])
        order = [panel.id for panel in panels]
        for panel in panels:
            if panel.id not in self.rows:
                self.rows[panel.id] = self._new_row(controller, panel.id)
                self.strips[panel.id] = StripRow(controller, panel.id)
        if order != self.order:
            self.order = order
            for at, panel_id in enumerate(order):
                row, strip = self.rows[panel_id], self.strips[panel_id]
                self._layout.insertWidget(2 * at, row)
                self._layout.insertWidget(2 * at + 1, strip)
                QtWidgets.QWidget.setTabOrder(row.more, strip.frames)
                if at:
                    QtWidgets.QWidget.setTabOrder(self.strips[order[at - 1]].more, row)
        for panel_id in order:
            self.show_panel(panel_id)

    def show_panel(self, panel_id: str) -> None:
        controller, row = self._controller, self.rows.get(panel_id)
        panel = controller.story.panel(panel_id) if controller is not None else None
        if controller is not None and row is not None and panel is not None:
            row.show_panel(controller.view(panel), controller.thumbnail(panel_id), self._colour_of)
            self._show_strip(controller, panel)
            before = self.order.index(panel_id) - 1 if panel_id in self.order else -1
            if before >= 0 and (above := controller.story.panel(self.order[before])) is not None:
                self._show_strip(controller, above)  # which leads to this panel

    def _show_strip(self, controller: Controller, panel: Panel) -> None:
        strip = self.strips[panel.id]
        exists = controller.strips.exists(panel)
        strip.setVisible(exists)
        if exists:
            strip.show_strip(controller.strips.view(panel))

    def _new_row(self, controller: Controller, panel_id: str) -> PanelRow:
        row = PanelRow(controller, panel_id)
        row.chosen.connect(self._choose)
        row.stepped.connect(self._step)
        row.grip.pressed.connect(lambda modifiers: self._choose(panel_id, modifiers))
        row.grip.dragged.connect(lambda at: self._drag(panel_id, at))
        row.grip.dropped.connect(lambda: self._drop(panel_id))
        return row

    def _drop_rows(self, names: list[str]) -> None:
        for name in names:
            for row in (self.rows.pop(name), self.strips.pop(name)):
                self._layout.removeWidget(row)
                row.hide()
                row.deleteLater()
            self.order = [one for one in self.order if one != name]

    def _choose(self, panel_id: str, modifiers: Qt.KeyboardModifier) -> None:
        controller = self._controller
        if controller is None:
            return
        selected = controller.selected
        if modifiers & Qt.KeyboardModifier.ControlModifier:
            others = [one for one in selected if one != panel_id]
            controller.select(others if panel_id in selected else [*selected, panel_id])
        elif modifiers & Qt.KeyboardModifier.ShiftModifier and selected and selected[0] in self.order:
            a, b = self.order.index(selected[0]), self.order.index(panel_id)
            between = self.order[min(a, b) : max(a, b) + 1]
            controller.select([selected[0], *(one for one in between if one != selected[0])])
        else:
            controller.select([panel_id])

    def _step(self, panel_id: str, step: int) -> None:
        to = self.order.index(panel_id) + step
        if self._controller is not None and 0 <= to < len(self.order):
            self._controller.move_panel(panel_id, to)
            self.rows[panel_id].setFocus(Qt.FocusReason.OtherFocusReason)

    # ----------------------------------------------------------------------- dragging

    def place_at(self, y: int) -> int:
        """Between which rows a height is: 0 before the first."""
        middles = [self.rows[name].geometry().center().y() for name in self.order]
        return sum(y > middle for middle in middles)

    def _drag(self, panel_id: str, at: QtCore.QPoint) -> None:
        self._drop_at = self.place_at(self.mapFromGlobal(at).y())
        area = self.parentWidget()
        while area is not None and not isinstance(area, QtWidgets.QScrollArea):
            area = area.parentWidget()
        if area is not None:
            here = area.widget().mapFromGlobal(at)  # type: ignore[union-attr]
            area.ensureVisible(0, here.y(), 0, 24)
        self.update()

    def _drop(self, panel_id: str) -> None:
        to, self._drop_at = self._drop_at, None
        self.update()
        if to is None or self._controller is None:
            return
        at = self.order.index(panel_id)
        to -= to > at
        if to != at:
            self._controller.move_panel(panel_id, to)

    def paintEvent(self, event: QtGui.QPaintEvent | None) -> None:  # noqa: N802
        if self._drop_at is None or not self.order:
            return
        row = self.rows[self.order[min(self._drop_at, len(self.order) - 1)]].geometry()
        y = row.top() - 2 if self._drop_at < len(self.order) else row.bottom() + 2
        painter = QtGui.QPainter(self)
        painter.fillRect(0, max(0, y - 1), self.width(), 3, self.palette().color(QtGui.QPalette.ColorRole.Highlight))
