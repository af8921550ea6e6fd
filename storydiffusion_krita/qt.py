"""The one place that knows PyQt5 (Krita 5) from PyQt6 (Krita 6).

The rest uses what is the same in both: scoped enums, `exec()`, `sizeInBytes()`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PyQt6 import QtCore, QtGui, QtWidgets
    from PyQt6.QtGui import QAction
elif "PyQt5.QtCore" in sys.modules:  # both may be installed: the one that Krita has loaded is right
    from PyQt5 import QtCore, QtGui, QtWidgets
    from PyQt5.QtWidgets import QAction
else:
    try:
        from PyQt6 import QtCore, QtGui, QtWidgets
        from PyQt6.QtGui import QAction
    except ImportError:
        from PyQt5 import QtCore, QtGui, QtWidgets
        from PyQt5.QtWidgets import QAction

Qt = QtCore.Qt

__all__ = ["QAction", "Qt", "QtCore", "QtGui", "QtWidgets", "number_of"]


def number_of(flags: Any) -> int:
    """Flags where Qt takes a plain number: an enum in PyQt6, already one in PyQt5."""
    return int(getattr(flags, "value", flags))
