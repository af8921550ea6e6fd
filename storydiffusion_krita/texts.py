"""Words for people: English in the code, other languages by table."""

from __future__ import annotations

from .translations import JAPANESE

_TABLES: dict[str, dict[str, str]] = {"en": {}, "ja": JAPANESE}
_current = _TABLES["en"]


def use_language(code: str) -> None:
    """'ja', 'ja_JP', 'en', …; one that there is no table for is English."""
    global _current
    _current = _TABLES.get(code.replace("-", "_").split("_")[0].lower(), _TABLES["en"])


def tr(text: str, /, **values: object) -> str:
    """The text in the artist's language, its {placeholders} filled."""
    return _current.get(text, text).format(**values)
