"""Clears our previews away before Krita writes a file.

Krita tells of a save only afterwards. But every save begins with an action, and an action is set off by
its shortcut, by its menu or by a button: each of these is an event that can be seen before.
"""

from __future__ import annotations

from collections.abc import Callable

from .qt import QAction, QtCore, QtWidgets

ACTIONS = (
    "file_save", "file_save_as", "file_export_file", "file_export_advanced", "file_export_animation", "file_print",
    "file_export_pdf", "save_incremental_version", "save_incremental_backup", "file_close", "file_close_all",
    "file_quit",
)  # fmt: skip


class SaveGuard(QtCore.QObject):
    def __init__(self, before_save: Callable[[], None]) -> None:
        super().__init__()
        self._before_save = before_save
        self._actions: list[QAction] = []

    def watch(self, actions: list[QAction], window: QtWidgets.QMainWindow) -> None:
        """Looks at a window's own save actions, its menus and its toolbars."""
        self._actions += actions
        for action in actions:
            action.installEventFilter(self)
        for menu in window.findChildren(QtWidgets.QMenu):
            if any(action in actions for action in menu.actions()):
                menu.aboutToShow.connect(self._before_save)
        for bar in window.findChildren(QtWidgets.QToolBar):
            for action in actions:
                button = bar.widgetForAction(action)
                if button is not None:
                    button.installEventFilter(self)

    def eventFilter(self, watched: QtCore.QObject | None, event: QtCore.QEvent | None) -> bool:  # noqa: N802
        kinds = (QtCore.QEvent.Type.Shortcut, QtCore.QEvent.Type.MouseButtonPress)
        if event is not None and event.type() in kinds:
            self._before_save()
        return False
