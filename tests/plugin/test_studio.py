"""Everything together over a fake krita: real desk, real threads, a backend that a test plays."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PyQt6.QtGui import QColor, QImage
from PyQt6.QtWidgets import QApplication

from storydiffusion_krita import pictures
from storydiffusion_krita.backend_process import Backend, Status
from storydiffusion_krita.client import Event, Made
from storydiffusion_krita.environment import Environment
from storydiffusion_krita.studio import Studio
from test_layers import Application, Document


class Lone(Application):
    def activeDocument(self) -> Any:  # noqa: N802
        return None


class Client:
    """Makes every panel in one colour."""

    def __init__(self) -> None:
        self.tell: Callable[[Event], None] = lambda event: None
        self.requests: list[Any] = []

    def models(self) -> list[Any]:
        return [{"id": "storyworld", "title": "Storyworld", "width": 64, "height": 64, "installed": True}]

    def submit(self, request: Any, images: Any, key: str) -> str:
        self.requests.append(request)
        return f"job{len(self.requests)}"

    def result(self, job: str) -> list[Made]:
        image = QImage(64, 64, QImage.Format.Format_RGB32)
        image.fill(QColor("#336699"))
        return [Made(panel, pictures.encode(image), 5) for panel in self.requests[-1]["panels"]]

    def events(self, last_id: str = "") -> Any:
        time.sleep(0.2)
        return iter(())

    def forget(self, job: str) -> None: ...
    def cancel(self, job: str) -> None: ...


def until(holds: Callable[[], object], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        QApplication.processEvents()
        time.sleep(0.002)


@pytest.fixture
def studio(tmp_path: Path, application: object) -> Any:
    krita = Application()
    krita.opened.append(Document(krita))
    backend = Backend(Environment(tmp_path, tmp_path), lambda call: call(), command=["x"])
    one = Studio(krita, tmp_path, tmp_path, backend)  # type: ignore[arg-type]
    one.krita = krita  # type: ignore[attr-defined]
    backend.begin = lambda *given: None  # type: ignore[method-assign]
    one.docker.show()
    yield one
    one.docker.close()
    one.end()


def test_from_the_button_to_layers_in_the_document(studio: Any) -> None:
    client = Client()
    studio._connected(client)
    until(lambda: studio._models)
    studio.docker.example.click()
    studio.docker.generate.click()
    until(lambda: client.requests)
    until(lambda: studio.desk._open and next(iter(studio.desk._open.values())).job)
    studio.desk.told(Event("1", "finished", {"job": "job1"}))
    until(lambda: not studio._active.working)
    document = studio.krita.opened[0]
    assert [group.name() for group in document.root.children] == ["Panel 1", "Panel 2", "Panel 3", "Panel 4"]
    take = document.root.children[0].children[0]
    assert take.pixels[3, 3] == bytes([0x99, 0x66, 0x33, 0xFF])
    studio.poll()
    assert studio.docker.generate.text() == "Everything again, new seeds"
    assert document.annotations["storydiffusion/story"]


def test_every_document_has_its_own_story_and_the_active_one_is_shown(studio: Any) -> None:
    studio.docker.example.click()
    studio.krita.opened.insert(0, Document(studio.krita))
    studio.poll()
    assert studio._active.story.panels == []
    assert len(studio._controllers) == 2
    studio.krita.opened.pop(0)
    studio.poll()
    assert len(studio._active.story.panels) == 4
    assert len(studio._controllers) == 1


def test_who_never_opens_the_docker_has_no_backend(tmp_path: Path, application: object) -> None:
    begun: list[Any] = []
    backend = Backend(Environment(tmp_path, tmp_path), lambda call: call(), command=["x"])
    backend.begin = lambda *given: begun.append(given)  # type: ignore[method-assign]
    one = Studio(Lone(), tmp_path, tmp_path, backend)  # type: ignore[arg-type]
    assert begun == []
    one.docker.show()
    one.docker.hide()
    one.docker.show()
    assert len(begun) == 1
    one.end()


def test_the_status_is_shown_and_settings_are_kept(studio: Any, tmp_path: Path) -> None:
    studio.backend._say(Status("failed", "It broke.", "Do this.", "start"))
    assert studio.docker.status.text.text() == "It broke."
    studio.docker.settings.previews.setChecked(False)
    assert '"previews": false' in (tmp_path / "settings.json").read_text()
    assert studio._active.previews is False


def test_looking_costs_little(studio: Any) -> None:
    studio.docker.example.click()
    until(lambda: len(studio._active.story.panels) == 4)
    began = time.process_time()
    for _ in range(50):
        studio.poll()
    assert (time.process_time() - began) / 50 < 0.006, "at one look in 0.6 s that is more than 1 % of a core"
