"""A prompt with words the model never saw says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from storydiffusion.vocabulary import load_vocabulary, unknown_words


def test_a_model_without_a_vocabulary_knows_every_word(tmp_path: Path) -> None:
    assert unknown_words("a zebra", load_vocabulary(tmp_path)) == []


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("A Cat in a close-up.", []),
        ("a zebra, a cat and a zebra", ["zebra"]),
        ("ein Café", ["ein", "café"]),
        ("", []),
    ],
)
def test_unknown_words_are_named_once_in_order(text: str, unknown: list[str], tmp_path: Path) -> None:
    (tmp_path / "vocabulary.txt").write_text("a\nand\ncat\nin\nclose-up\n")
    assert unknown_words(text, load_vocabulary(tmp_path)) == unknown
