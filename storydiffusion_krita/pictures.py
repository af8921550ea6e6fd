"""Pictures between Krita and the backend. Every function here may run in a worker thread."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from . import kra
from .qt import Qt, QtCore, QtGui

QImage = QtGui.QImage


def from_pixels(data: bytes, width: int, height: int) -> QImage:
    """Krita's 8-bit pixels: BGRA, row-major, 4 bytes each."""
    image = QImage(data, width, height, width * 4, QImage.Format.Format_ARGB32)
    return image.copy()  # the bytes are not ours to keep


def to_pixels(image: QImage) -> bytes:
    """The inverse of `from_pixels`."""
    image = image.convertToFormat(QImage.Format.Format_ARGB32)
    bits = image.constBits()
    assert bits is not None
    return bytes(bits.asstring(image.sizeInBytes()))  # 4 bytes a pixel: rows have no padding


def from_mask(data: bytes, width: int, height: int) -> QImage:
    """Krita's selection: one byte a pixel."""
    return QImage(data, width, height, width, QImage.Format.Format_Grayscale8).copy()


def scaled(image: QImage, width: int, height: int) -> QImage:
    if (image.width(), image.height()) == (width, height):
        return image
    return image.scaled(width, height, Qt.AspectRatioMode.IgnoreAspectRatio, Qt.TransformationMode.SmoothTransformation)


def padded(image: QImage, size: tuple[int, int], fill: bool = True) -> QImage:
    """What the artist sees, in the middle of a picture of `size`'s shape; the inverse of `cropped`.

    The margin repeats the edge (`fill`), or is black. Pictures come out at `size`, masks keep their scale.
    """
    width, height = size
    scale = min(width / image.width(), height / image.height())
    if not fill:
        width, height, scale = round(width / scale), round(height / scale), 1.0
    inner_width, inner_height = round(image.width() * scale), round(image.height() * scale)
    inner = scaled(image, inner_width, inner_height)
    if (inner_width, inner_height) == (width, height):
        return inner
    left, top = (width - inner_width) // 2, (height - inner_height) // 2
    whole = QImage(width, height, image.format())
    whole.fill(Qt.GlobalColor.black)
    painter = QtGui.QPainter(whole)
    painter.setCompositionMode(QtGui.QPainter.CompositionMode.CompositionMode_Source)
    if fill:
        for x, y, w, h, edge in (
            (0, 0, left, height, (0, 0, 1, inner_height)),
            (left + inner_width, 0, width - left - inner_width, height, (inner_width - 1, 0, 1, inner_height)),
            (0, 0, width, top, (0, 0, inner_width, 1)),
            (0, top + inner_height, width, height - top - inner_height, (0, inner_height - 1, inner_width, 1)),
        ):
            painter.drawImage(QtCore.QRect(x, y, w, h), inner, QtCore.QRect(*edge))
    painter.drawImage(left, top, inner)
    painter.end()
    return whole


def cropped(image: QImage, width: int, height: int) -> QImage:
    """The middle of a picture, filling width x height without stretching it."""
    scale = max(width / image.width(), height / image.height())
    w, h = min(image.width(), round(width / scale)), min(image.height(), round(height / scale))
    left, top = (image.width() - w) // 2, (image.height() - h) // 2
    return scaled(image.copy(left, top, w, h), width, height)


def inside(base: QImage, made: QImage, mask: QImage) -> QImage:
    """`made` where the mask is white, `base` to the bit where it is black; at the size of `base`.

    The model's picture is smaller than the canvas: outside the selection it would only lose detail.
    """
    over = cropped(made, base.width(), base.height()).convertToFormat(QImage.Format.Format_ARGB32)
    over.setAlphaChannel(scaled(mask, base.width(), base.height()))
    result = base.convertToFormat(QImage.Format.Format_ARGB32)
    painter = QtGui.QPainter(result)
    painter.drawImage(0, 0, over)
    painter.end()
    return result


def fitted(image: QImage, size: int) -> QImage:
    """At most `size` pixels on its longer side."""
    if max(image.width(), image.height()) <= size:
        return image
    return image.scaled(size, size, Qt.AspectRatioMode.KeepAspectRatio, Qt.TransformationMode.SmoothTransformation)


def encode(image: QImage, kind: str = "PNG", quality: int = -1) -> bytes:
    buffer = QtCore.QBuffer()
    buffer.open(QtCore.QIODevice.OpenModeFlag.WriteOnly)
    image.save(buffer, kind, quality)
    return bytes(buffer.data().data())


def decode(data: bytes) -> QImage:
    """The picture in a file's bytes.

    Raises:
        ValueError: it is none.
    """
    image = QImage.fromData(data)
    if image.isNull():
        raise ValueError("no picture")
    return image


def on_white(image: QImage) -> QImage:
    paper = QImage(image.size(), QImage.Format.Format_RGB32)
    paper.fill(Qt.GlobalColor.white)
    painter = QtGui.QPainter(paper)
    painter.drawImage(0, 0, image)
    painter.end()
    return paper


def digest(data: bytes) -> str:
    """Eight characters that differ where pixels do."""
    return hashlib.blake2b(data, digest_size=4).hexdigest()


def save_frames(frames: Sequence[QImage], path: str, width: int, height: int, start: int) -> None:
    """Write frames for Krita's timeline, from the time `start` (in frames) on, at the size of the canvas, pixels.

    Raises:
        OSError: the file cannot be written.
    """
    kra.write_animation(path, (width, height), [_tiles(frame, width, height) for frame in frames], start)


def _tiles(frame: QImage, width: int, height: int) -> Iterator[kra.Tile]:
    """Of one frame at a time: many of them at the size of the canvas would fill the memory."""
    image = cropped(frame, width, height).convertToFormat(QImage.Format.Format_ARGB32)  # with an edge to be clear
    for y in range(0, height, kra.TILE):
        for x in range(0, width, kra.TILE):
            yield x, y, to_pixels(image.copy(x, y, kra.TILE, kra.TILE))  # clear where it is beyond the edge


def look(image: QImage) -> str:
    """A digest of what a picture looks like, from a few hundred of its pixels."""
    small = image.scaled(24, 24, Qt.AspectRatioMode.IgnoreAspectRatio, Qt.TransformationMode.SmoothTransformation)
    return hashlib.blake2b(to_pixels(small), digest_size=4).hexdigest()


class Codec:
    """Pictures as they travel (`jobs.Codec`)."""

    def encode(self, picture: QImage, size: tuple[int, int] | None) -> bytes:
        mask = picture.format() == QImage.Format.Format_Grayscale8
        return encode(padded(picture, size, fill=not mask) if size else picture)

    def decode(self, data: bytes) -> QImage:
        return decode(data)

    def inside(self, base: QImage, made: QImage, mask: QImage) -> QImage:
        return inside(base, made, mask)
