"""Pictures on disk: whole or not at all, never over another, and carrying their story."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from storydiffusion.errors import ImageError, StoryDiffusionError
from storydiffusion.pictures import (
    contact_sheet,
    embedded_text,
    free_path,
    load_mask,
    load_picture,
    png_bytes,
    write_atomically,
)


def picture(height: int = 24, width: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_a_png_comes_back_with_the_story_it_carries(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    write_atomically(path, png_bytes(picture(), {"storydiffusion:story": "title = 'Frühstück 朝'"}))
    assert np.array_equal(load_picture(path), picture())
    assert embedded_text(path) == {"storydiffusion:story": "title = 'Frühstück 朝'"}


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.png"
    write_atomically(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StoryDiffusionError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_earlier_take_is_never_overwritten(tmp_path: Path) -> None:
    for expected in ("p1.png", "p1.take2.png", "p1.take3.png"):
        path = free_path(tmp_path / "p1.png")
        assert path.name == expected
        path.touch()


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"GIF89a" + b"\0" * 40])
def test_what_is_not_a_picture_is_refused_with_a_remedy(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"PNG|damaged"):
        load_picture(path)


def test_a_truncated_picture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    path.write_bytes(png_bytes(picture(200, 200))[:5000])
    with pytest.raises(ImageError, match="damaged"):
        load_picture(path)


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"gone\.png"):
        load_picture(tmp_path / "gone.png")


def test_transparency_lies_on_white_paper(tmp_path: Path) -> None:
    layer = np.zeros((4, 4, 4), np.uint8)
    layer[:2] = (255, 0, 0, 255)
    Image.fromarray(layer).save(tmp_path / "p.png")
    loaded = load_picture(tmp_path / "p.png")
    assert loaded[0, 0].tolist() == [255, 0, 0]
    assert loaded[3, 3].tolist() == [255, 255, 255]


def test_a_mask_is_one_value_a_pixel(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "m.png")
    mask = load_mask(tmp_path / "m.png")
    assert mask.shape == (24, 32)
    assert mask.dtype == np.uint8


def test_a_contact_sheet_shows_every_picture_in_order() -> None:
    pictures = [np.full((40, 60, 3), value, np.uint8) for value in (10, 90, 170, 250, 130)]
    sheet = contact_sheet(pictures, ["a", "a long caption that must wrap over several lines", "c", "d", "e"])
    for value in (10, 90, 170, 250, 130):
        assert (sheet == value).all(-1).sum() >= 40 * 60
    assert sheet.shape[1] > 4 * 60
