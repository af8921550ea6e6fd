"""What Krita loads: the docker and its actions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from krita import DockWidget, DockWidgetFactory, DockWidgetFactoryBase, Extension, Krita

from . import save_guard
from .qt import QtCore, QtWidgets
from .settings import data_folder, load_settings
from .studio import Studio
from .texts import tr, use_language

DOCKER_ID = "storydiffusion_docker"
HERE = Path(__file__).resolve().parent

_studio: Studio | None = None


def studio() -> Studio:
    """The one of this Krita, made when it is first needed."""
    global _studio
    if _studio is None:
        folder = data_folder()
        use_language(load_settings(folder).language or QtCore.QLocale().name())
        _studio = Studio(Krita.instance(), folder, HERE / "backend")
        _studio.docker.document_asked.connect(lambda: _trigger("file_new"))
    return _studio


class StoryDockWidget(DockWidget):  # type: ignore[misc]
    """Krita makes one for every main window. There is one story docker, and it is where the artist is."""

    def __init__(self) -> None:
        super().__init__()
        self.setWindowTitle(tr("Story"))
        self._take()

    def _take(self) -> None:
        """Have the story docker here, and in the window that had it a word about where it is."""
        docker = studio().docker
        before = docker.parent()
        if before is self:
            return
        if isinstance(before, QtWidgets.QDockWidget):
            words = QtWidgets.QLabel(tr("The story is shown in another window. Click here to have it in this one."))
            words.setWordWrap(True)
            words.setMargin(12)
            before.setWidget(words)
        left = self.widget()
        self.setWidget(docker)
        docker.show()
        if left is not None:
            left.deleteLater()

    def _release(self) -> None:
        """The story docker outlives the window it is in."""
        if self.widget() is studio().docker:
            studio().docker.setParent(None)

    def event(self, event: QtCore.QEvent) -> bool:
        kind, types = event.type(), QtCore.QEvent.Type
        if kind == types.WindowActivate or (kind == types.Show and studio().docker.parent() is None):
            self._take()
        elif kind == types.Hide and not event.spontaneous() and not self.window().isVisible():
            self._release()
        return bool(super().event(event))

    def canvasChanged(self, canvas: Any) -> None:  # noqa: N802
        studio().poll()


class StoryExtension(Extension):  # type: ignore[misc]
    """Shortcuts as Krita's own actions, and goodbye."""

    def __init__(self, parent: Any) -> None:
        super().__init__(parent)
        self._guard = save_guard.SaveGuard(lambda: studio().before_save())

    def setup(self) -> None:
        notifier = Krita.instance().notifier()
        notifier.setActive(True)
        notifier.applicationClosing.connect(lambda: studio().end())
        self._notifier = notifier  # it goes with its last reference

    def createActions(self, window: Any) -> None:  # noqa: N802
        main = window.qwindow()  # `window` itself is gone when this returns
        for name, text, call in (
            ("storydiffusion_show", tr("Show the Story docker"), lambda: _show(main)),
            ("storydiffusion_generate", tr("Story: generate"), lambda: studio().docker.generate_now()),
            ("storydiffusion_again", tr("Story: this panel again"), lambda: studio().docker.again_selected()),
            ("storydiffusion_cancel", tr("Story: cancel"), lambda: studio().docker.cancel_all()),
            ("storydiffusion_script", tr("Story: script"), lambda: studio().docker.show_script()),
            ("storydiffusion_take_next", tr("Story: later take"), lambda: studio().docker.step_take(1)),
            ("storydiffusion_take_previous", tr("Story: earlier take"), lambda: studio().docker.step_take(-1)),
        ):
            window.createAction(name, text, "tools/scripts").triggered.connect(lambda _=False, call=call: call())
        # the window's own actions are there once it is built
        QtCore.QTimer.singleShot(0, lambda: self._watch(main))

    def _watch(self, main: QtWidgets.QMainWindow) -> None:
        found = [Krita.instance().action(name) for name in save_guard.ACTIONS]
        self._guard.watch([action for action in found if action is not None], main)


def _show(main: QtWidgets.QMainWindow) -> None:
    docker = main.findChild(QtWidgets.QDockWidget, DOCKER_ID)
    if docker is not None:
        docker.setVisible(True)
        docker.raise_()


def _trigger(name: str) -> None:
    action = Krita.instance().action(name)
    if action is not None:
        action.trigger()


def register(application: Any) -> None:
    application.addExtension(StoryExtension(application))
    # scoped in PyQt6, of the class in PyQt5
    scoped: Any = getattr(DockWidgetFactoryBase, "DockPosition", None)
    position = scoped.DockRight if hasattr(scoped, "DockRight") else DockWidgetFactoryBase.DockRight
    application.addDockWidgetFactory(DockWidgetFactory(DOCKER_ID, position, StoryDockWidget))
