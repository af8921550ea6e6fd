"""Helpers for what people type and what errors say."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str:
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)), "")


def says_something(text: str) -> bool:
    """Whether there is a letter, number or symbol in it, not only spaces and punctuation."""
    return any(unicodedata.category(character)[0] in "LNS" for character in text)


def lines(text: str) -> list[str]:
    """The lines as an editor counts them, runs of white space made one space."""
    return [" ".join(line.split()) for line in re.split(r"\r\n|\r|\n", text)]


def shorten(text: str, width: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def tidy(text: str) -> str:
    """One space between words, none before a comma or full stop, no comma at either end."""
    text = re.sub(r"\s+(?=[,;!?]|\.(?:\s|$))", "", " ".join(text.split()))
    return text.lstrip(" ,;").rstrip(" ,;")
