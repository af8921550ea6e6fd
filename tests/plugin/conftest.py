"""Qt without a screen; the plugin from the top of the repository."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator

import pytest

os.environ["QT_QPA_PLATFORM"] = "offscreen"

from PyQt6 import QtWidgets


@pytest.fixture(scope="session")
def application() -> object:
    application = QtWidgets.QApplication.instance() or QtWidgets.QApplication([])
    application.setStyle("Fusion")
    return application


@pytest.fixture(autouse=True)
def _no_mistake_in_a_slot(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Qt would abort the program at an exception in a slot; Krita opens a dialog."""
    mistakes: list[str] = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: mistakes.append("".join(traceback.format_exception(*error))))
    yield
    assert not mistakes, mistakes[0]


@pytest.fixture(autouse=True)
def _english() -> Iterator[None]:
    from storydiffusion_krita.texts import use_language

    use_language("en")
    yield
    use_language("en")
