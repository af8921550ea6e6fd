"""The words a small model knows, so that a prompt it cannot understand says so."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path


def load_vocabulary(model: Path) -> frozenset[str]:
    """The words in `model`/vocabulary.txt; empty for models that know no such limit."""
    path = model / "vocabulary.txt"
    return frozenset(path.read_text(encoding="utf-8").split()) if path.is_file() else frozenset()


def unknown_words(text: str, vocabulary: Collection[str]) -> list[str]:
    """The words of `text` the model never saw, in order, each once; none without a vocabulary."""
    if not vocabulary:
        return []
    known = {part for word in vocabulary for part in word.lower().split("-")} | set(vocabulary)
    words = re.findall(r"[^\W\d_]+", text.lower())
    return list(dict.fromkeys(word for word in words if word not in known))
