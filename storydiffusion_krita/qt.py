"""The one place that knows PyQt5 (Krita 5) from PyQt6 (Krita 6).

The rest uses what is the same in both: scoped enums, `exec()`, `sizeInBytes()`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from PyQt6 import QtCore, QtGui, QtWidgets, sip
    from PyQt6.QtGui import QAction
elif "PyQt5.QtCore" in sys.modules:  # both may be installed: the one that Krita has loaded is right
    from PyQt5 import QtCore, QtGui, QtWidgets, sip
    from PyQt5.QtWidgets import QAction
else:
    try:
        from PyQt6 import QtCore, QtGui, QtWidgets, sip
        from PyQt6.QtGui import QAction
    except ImportError:
        from PyQt5 import QtCore, QtGui, QtWidgets, sip
        from PyQt5.QtWidgets import QAction

Qt = QtCore.Qt
Wrapper = TypeVar("Wrapper")

__all__ = ["QAction", "Qt", "QtCore", "QtGui", "QtWidgets", "number_of", "owned"]


def number_of(flags: Any) -> int:
    """Flags where Qt takes a plain number: an enum in PyQt6, already one in PyQt5."""
    return int(getattr(flags, "value", flags))


def owned(wrapper: Wrapper) -> Wrapper:
    """Krita makes a new wrapper whenever it is asked for layers, and nobody deletes those that come in lists or by
    their id: each would keep its layer's pixels in memory for good. From here on it goes with its last use."""
    if isinstance(wrapper, sip.wrapper):
        sip.transferback(wrapper)
    return wrapper
