"""Frames as a file that Krita opens; that it does, the tests in `tests/krita` say."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PyQt6.QtGui import QColor, QImage

from storydiffusion_krita import kra, pictures


def drawn(width: int, height: int, seed: int) -> QImage:
    image = QImage(width, height, QImage.Format.Format_ARGB32)
    for y in range(height):
        for x in range(width):
            image.setPixelColor(x, y, QColor((x * 7 + seed) % 256, (y * 5) % 256, (x + y * seed) % 256))
    return image


def unpacked(pixels: bytes, width: int, height: int) -> QImage:
    """A layer's pixels as Krita reads them."""
    lines = pixels.split(b"\n", 5)
    assert lines[:4] == [b"VERSION 2", b"TILEWIDTH 64", b"TILEHEIGHT 64", b"PIXELSIZE 4"]
    count, rest = int(lines[4].removeprefix(b"DATA ")), lines[5]
    rows = [bytearray(width * 4) for _ in range(height)]
    for _ in range(count):
        head, rest = rest.split(b"\n", 1)
        x, y, size = (int(number) for number in head.replace(b"LZF,", b"").split(b","))
        assert rest[:1] == b"\0", "compressed, though nobody compressed it"
        tile, rest = rest[1:size], rest[size:]
        for row in range(min(64, height - y)):
            columns = min(64, width - x)
            rows[y + row][4 * x : 4 * (x + columns)] = tile[256 * row : 256 * row + 4 * columns]
    assert not rest
    return pictures.from_pixels(b"".join(bytes(row) for row in rows), width, height)


def times(archive: zipfile.ZipFile) -> dict[int, str]:
    root = ElementTree.fromstring(archive.read("film/layers/film.keyframes.xml"))
    found = [one for one in root.iter() if one.tag.endswith("}keyframe")]
    return {int(one.attrib["time"]): one.attrib["frame"] for one in found}


@pytest.mark.parametrize("size", [(64, 64), (100, 70), (130, 200)])
@pytest.mark.parametrize("start", [0, 27])
def test_every_frame_is_in_the_file_at_its_time(tmp_path: Path, size: tuple[int, int], start: int) -> None:
    frames = [drawn(*size, seed) for seed in (1, 2, 3)]
    file = tmp_path / "film.kra"
    pictures.save_frames(frames, str(file), *size, start)
    with zipfile.ZipFile(file) as archive:
        found = times(archive)
        assert list(found) == ([0] if start else []) + [start, start + 1, start + 2]
        for frame, time in zip(frames, range(start, start + 3), strict=True):
            assert unpacked(archive.read(f"film/layers/{found[time]}"), *size) == frame
            assert archive.read(f"film/layers/{found[time]}.defaultpixel") == bytes(4)
        if start:
            assert archive.read(f"film/layers/{found[0]}").endswith(b"DATA 0\n"), "something is seen before it begins"


def test_the_file_says_what_krita_asks_for(tmp_path: Path) -> None:
    file = tmp_path / "film.kra"
    kra.write_animation(str(file), (100, 70), [()], 5)
    with zipfile.ZipFile(file) as archive:
        first = archive.infolist()[0]
        assert (first.filename, first.compress_type) == ("mimetype", zipfile.ZIP_STORED)
        assert archive.read("mimetype") == b"application/x-krita"
        document = ElementTree.fromstring(archive.read("maindoc.xml"))
    image = next(one for one in document.iter() if one.tag.endswith("}IMAGE"))
    layer = next(one for one in document.iter() if one.tag.endswith("}layer"))
    assert (image.attrib["width"], image.attrib["height"]) == ("100", "70")
    assert (layer.attrib["keyframes"], layer.attrib["intimeline"]) == ("film.keyframes.xml", "1")


def test_two_files_do_not_share_a_layers_id(tmp_path: Path) -> None:
    ids = set()
    for name in ("a.kra", "b.kra"):
        kra.write_animation(str(tmp_path / name), (64, 64), [()], 0)
        with zipfile.ZipFile(tmp_path / name) as archive:
            document = ElementTree.fromstring(archive.read("maindoc.xml"))
        ids.add(next(one for one in document.iter() if one.tag.endswith("}layer")).attrib["uuid"])
    assert len(ids) == 2


def test_a_frame_of_another_size_fills_the_canvas(tmp_path: Path) -> None:
    red: Any = QImage(50, 50, QImage.Format.Format_ARGB32)
    red.fill(QColor("red"))
    pictures.save_frames([red], str(tmp_path / "film.kra"), 90, 40, 0)
    with zipfile.ZipFile(tmp_path / "film.kra") as archive:
        whole = unpacked(archive.read("film/layers/frame0"), 90, 40)
    assert {whole.pixelColor(x, y).name() for x in (0, 89) for y in (0, 39)} == {"#ff0000"}


@pytest.mark.parametrize("format_", [QImage.Format.Format_RGB32, QImage.Format.Format_RGB888])
def test_beyond_the_canvas_is_nothing(tmp_path: Path, format_: QImage.Format) -> None:
    """Frames come from the backend without an alpha channel; the last tiles reach over the edge."""
    pictures.save_frames([drawn(100, 70, 1).convertToFormat(format_)], str(tmp_path / "film.kra"), 100, 70, 0)
    with zipfile.ZipFile(tmp_path / "film.kra") as archive:
        pixels = archive.read("film/layers/frame0")
    assert unpacked(pixels, 128, 128).pixelColor(100, 0).alpha() == 0
    assert unpacked(pixels, 128, 128).pixelColor(0, 70).alpha() == 0
    assert unpacked(pixels, 128, 128).pixelColor(99, 69).alpha() == 255


def test_an_animation_of_no_frames_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without frames"):
        kra.write_animation(str(tmp_path / "film.kra"), (64, 64), [], 0)


def test_a_file_that_cannot_be_written_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        kra.write_animation(str(tmp_path / "nowhere" / "film.kra"), (64, 64), [()], 0)
