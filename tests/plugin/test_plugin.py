"""What Krita loads, over a krita module that has no Krita behind it."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PyQt6.QtCore import QCoreApplication, QEvent, Qt
from PyQt6.QtWidgets import QDockWidget, QLabel, QMainWindow


class Application:
    def documents(self) -> list[Any]:
        return []

    def activeDocument(self) -> None:  # noqa: N802
        return None

    def action(self, name: str) -> None:
        return None


class Krita:
    @staticmethod
    def instance() -> Application:
        return Application()


@pytest.fixture
def plugin(application: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    krita: Any = types.ModuleType("krita")
    krita.DockWidget, krita.Krita = QDockWidget, Krita
    krita.DockWidgetFactory = krita.DockWidgetFactoryBase = krita.Extension = object
    monkeypatch.setitem(sys.modules, "krita", krita)
    monkeypatch.setenv("STORYDIFFUSION_HOME", str(tmp_path))
    monkeypatch.delitem(sys.modules, "storydiffusion_krita.plugin", raising=False)
    module = importlib.import_module("storydiffusion_krita.plugin")
    yield module
    module.studio().end()
    monkeypatch.delitem(sys.modules, "storydiffusion_krita.plugin")


def activate(docker: QDockWidget) -> None:
    QCoreApplication.sendEvent(docker, QEvent(QEvent.Type.WindowActivate))


def test_the_story_docker_goes_with_the_artist_from_window_to_window(plugin: Any) -> None:
    first = plugin.StoryDockWidget()
    story = plugin.studio().docker
    assert first.widget() is story
    second = plugin.StoryDockWidget()
    assert second.widget() is story
    assert isinstance(first.widget(), QLabel), "an empty docker says nothing"
    activate(first)
    assert first.widget() is story
    assert "another window" in second.widget().text()
    activate(first)
    assert first.widget() is story


def test_a_window_that_closes_leaves_the_story_to_the_others(plugin: Any) -> None:
    windows = [QMainWindow(), QMainWindow()]
    dockers = [plugin.StoryDockWidget(), plugin.StoryDockWidget()]
    for window, docker in zip(windows, dockers, strict=True):
        window.addDockWidget(Qt.DockWidgetArea.RightDockWidgetArea, docker)
        window.show()
    story = plugin.studio().docker
    activate(dockers[1])
    windows[1].close()
    windows[1].deleteLater()
    QCoreApplication.sendPostedEvents(None, QEvent.Type.DeferredDelete.value)
    activate(dockers[0])
    assert dockers[0].widget() is story
    assert story.isVisible()
    windows[0].close()
    assert story.parent() is None, "it would be deleted with the window"
