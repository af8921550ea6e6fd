"""Everything at work together: one backend, one desk, a controller a document, the docker that shows one.

Kept here: Krita's GUI thread never waits on the backend, the disk or the network.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import pictures
from .backend_process import Backend, Status
from .client import Client, Failure
from .controller import Controller
from .docker import StoryDocker
from .environment import Environment
from .jobs import JobDesk, Listener, Worker
from .layers import Application, Document, KritaDocument, StoryDocument
from .qt import QtCore
from .settings import Settings, load_settings

POLL_MS = 600
SHEET_SIZE = 512  # pixels: more than the model's own grid adds nothing but weight to the file


class Poster(QtCore.QObject):
    """Brings calls from any thread to this object's thread."""

    _called = QtCore.pyqtSignal(object)

    def __init__(self) -> None:
        super().__init__()
        self._called.connect(self._call)  # of this object: Qt queues it where the sender is another thread

    @QtCore.pyqtSlot(object)
    def _call(self, call: Callable[[], None]) -> None:
        call()

    def post(self, call: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # Qt is gone: Krita is closing, nobody waits for this
            self._called.emit(call)


def sheet_of(picture: Any) -> bytes:
    """A character's picture, small enough to live in the document."""
    return pictures.encode(pictures.fitted(pictures.on_white(picture), SHEET_SIZE), "JPG", 90)


class Studio(QtCore.QObject):
    """Made once, when the docker is."""

    def __init__(self, application: Application, folder: Path, wheels: Path, backend: Backend | None = None) -> None:
        super().__init__()
        self._application, self._folder = application, folder
        self._poster = Poster()
        self.settings: Settings = load_settings(folder)
        self.backend = backend or Backend(Environment(folder, wheels), self._poster.post)
        self.backend.changed = self._status
        self.backend.connected = self._connected
        self.desk = JobDesk(pictures.Codec(), self._poster.post, Worker().run)
        self.desk.lost = self.backend.lost
        self._listener: Listener | None = None
        self._models: list[dict[str, Any]] = []
        self._controllers: list[tuple[StoryDocument, Controller]] = []
        self._active: Controller | None = None
        self.docker = StoryDocker(self.settings, self.backend)
        self._wire_docker()
        self._poll = QtCore.QTimer(self)
        self._poll.setInterval(POLL_MS)
        self._poll.timeout.connect(self.poll)

    def _wire_docker(self) -> None:
        docker = self.docker
        docker.shown.connect(self.begin)
        docker.status.acted.connect(self._act)
        docker.settings.device_chosen.connect(self._choose_device)
        docker.settings.connect_asked.connect(self._choose_backend)
        docker.settings.restart_asked.connect(self.backend.restart)
        docker.settings.previews_chosen.connect(self._choose_previews)

    def begin(self) -> None:
        """The docker is seen for the first time: start the backend, and look at Krita from time to time.

        Who never opens the docker has no Python process beside their Krita.
        """
        if self._poll.isActive():
            return
        self.backend.begin(self.settings.device, self.settings.remote, self.settings.token)
        self.docker.show_status(self.backend.status)
        self._poll.start()
        self.poll()

    def end(self) -> None:
        """Krita is closing."""
        self._poll.stop()
        for _, controller in self._controllers:
            controller.flush()
        if self._listener is not None:
            self._listener.stop()
        self.backend.end()

    # ----------------------------------------------------------------------- documents

    def controller_of(self, document: Document) -> Controller:
        """The document's controller, made when it is first seen."""
        for one, controller in self._controllers:
            if isinstance(one, KritaDocument) and one.is_of(document):
                return controller
        adapter = KritaDocument(self._application, document)
        controller = Controller(
            adapter,
            self.desk,
            self._defer,
            sheet_of,
            background=self._background,
            save_frames=pictures.save_frames,
        )
        controller.strips.play_asked = self._play
        controller.previews = self.settings.previews
        self._controllers.append((adapter, controller))
        self._tell_model_size(controller)
        return controller

    def _defer(self, call: Callable[[], None]) -> None:
        QtCore.QTimer.singleShot(0, call)

    def _background(self, call: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """In a thread of its own: files of a film must not wait for pictures that travel."""

        def work() -> None:
            result = call()
            self._poster.post(lambda: then(result))

        threading.Thread(target=work, name="storydiffusion files", daemon=True).start()

    def _play(self) -> None:
        action = self._application.action("toggle_playback")
        if action is not None:
            action.trigger()

    def poll(self) -> None:
        """Which document is active, and what the artist did in it."""
        if not self.docker.isVisible() and not self.desk.outstanding:
            return  # it is looked at again as soon as somebody sees it
        for pair in list(self._controllers):
            if not pair[0].is_open():
                pair[1].close()
                self._controllers.remove(pair)
        document = self._application.activeDocument()
        controller = self.controller_of(document) if document is not None else None
        if controller is not self._active:
            self._active = controller
            self.docker.show_controller(controller)
            self.docker.show_status(self.backend.status)
        if controller is not None:
            controller.poll()
            self._tell_model_size(controller)
            if controller.working:
                controller.changed("progress", "")  # time left goes on between steps
        if self.backend.status.state == "ready" and not self.backend.health.get("device"):
            self.backend.refresh()

    def before_save(self) -> None:
        for _, controller in self._controllers:
            controller.before_save()

    # ----------------------------------------------------------------------- the backend

    def _status(self, status: Status) -> None:
        self.docker.show_status(status)

    def _connected(self, client: Client | None) -> None:
        if self._listener is not None:
            self._listener.stop()
            self._listener = None
        self.desk.connect(client)
        if client is not None:
            self._listener = Listener(client, self._poster.post, self.desk.told, lambda failure: self.backend.lost())
            self._ask_models(client)

    def _ask_models(self, client: Client) -> None:
        def ask() -> None:
            try:
                models = client.models()
            except Failure:
                return  # whatever is wrong shows where it matters: in the status line, or at the first job
            self._poster.post(lambda: self._show_models(models))

        threading.Thread(target=ask, name="storydiffusion models", daemon=True).start()

    def _show_models(self, models: list[dict[str, Any]]) -> None:
        self._models = models
        self.docker.show_models(models)
        self.docker.show_status(self.backend.status)

    def _tell_model_size(self, controller: Controller) -> None:
        for one in self._models:
            if one["id"] == controller.story.model:
                controller.model_size = (one["width"], one["height"])
                controller.model_longest = one.get("longest", 0)  # a backend of before has none

    def _act(self, action: str) -> None:
        calls = {
            "install": self.backend.install,
            "update": self.backend.install,
            "start": self.backend.restart,
            "stop_install": self.backend.stop_install,
        }
        if action in calls:
            calls[action]()

    def _choose_device(self, device: str) -> None:
        self.settings.device = self.backend.device = device
        self._save_settings()
        if self.backend.environment.outdated(device):
            self.backend.install()

    def _choose_backend(self, address: str, token: str) -> None:
        self.settings.remote, self.settings.token = address, token
        self._save_settings()
        self.backend.begin(self.settings.device, address, token)

    def _choose_previews(self, wanted: bool) -> None:
        self.settings.previews = wanted
        self._save_settings()
        for _, controller in self._controllers:
            controller.previews = wanted

    def _save_settings(self) -> None:
        with contextlib.suppress(OSError):  # they hold until Krita is closed
            self.settings.save(self._folder)
