"""The Qt that this Krita has loaded: 5 and 6 may both be installed."""

import sys
from typing import TYPE_CHECKING

import krita  # noqa: F401  (loads it)

if TYPE_CHECKING or "PyQt6.QtCore" in sys.modules:
    from PyQt6 import QtCore, QtGui, QtWidgets
else:
    from PyQt5 import QtCore, QtGui, QtWidgets

__all__ = ["QtCore", "QtGui", "QtWidgets"]
