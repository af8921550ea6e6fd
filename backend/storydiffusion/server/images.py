"""Bytes to pixels and back. Decoders see PNG, JPEG and WebP only, and only below a pixel limit."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from storydiffusion.errors import ImageError

Pixels = NDArray[np.uint8]

#: one picture's; four times a page of 4096²
MAX_PIXELS = 64 * 1024 * 1024
FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP"}
#: the first bytes of each format, so that a decoder never sees anything that is not its own
MAGIC = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff", "WEBP": b"RIFF"}


def decode_picture(data: bytes, media_type: str, what: str) -> Pixels:
    """A picture as (height, width, 3) RGB; transparency lies on white, an animation is its first frame.

    Raises:
        ImageError: not of that type, damaged, or of more than MAX_PIXELS.
    """
    with _open(data, media_type, what) as image:
        try:
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                layer = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            return np.array(_eight_bits(image).convert("RGB"))
        except _DAMAGE as error:
            raise ImageError(f"{what} is damaged.", "Export it again.") from error


def decode_mask(data: bytes, media_type: str, what: str) -> Pixels:
    """A mask as (height, width), white where something is chosen.

    Raises:
        ImageError: as `decode_picture`.
    """
    with _open(data, media_type, what) as image:
        try:
            return np.array(_eight_bits(image).convert("L"))
        except _DAMAGE as error:
            raise ImageError(f"{what} is damaged.", "Export it again.") from error


#: what Pillow raises for damage, by format and version
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, Image.DecompressionBombError)


def _open(data: bytes, media_type: str, what: str) -> Image.Image:
    format_ = FORMATS.get(media_type, "")
    if not format_ or not data.startswith(MAGIC[format_]) or (format_ == "WEBP" and data[8:12] != b"WEBP"):
        raise ImageError(f"{what} is not a PNG, JPEG or WebP picture of the type it says.", "Export it as PNG.")
    try:
        image = Image.open(io.BytesIO(data), formats=(format_,))
    except _DAMAGE as error:
        raise ImageError(f"{what} is not a {format_} picture that can be read.", "Export it again.") from error
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ImageError(
            f"{what} has {image.width} x {image.height} pixels.",
            f"Scale it to at most {MAX_PIXELS // 1_000_000} megapixels.",
        )
    return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits scaled to 8, which Pillow's own conversion would clip."""
    if not image.mode.startswith("I"):
        return image
    grey = np.asarray(image).astype(np.int64) // 257
    return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))


def encode_png(picture: Pixels) -> bytes:
    """(height, width, 3) RGB as PNG; packed lightly, since it travels once and is read at once."""
    ok, encoded = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not ok:
        raise ImageError("A finished panel could not be written as PNG.")
    return encoded.tobytes()


def pack(files: Mapping[str, bytes]) -> bytes:
    """A ZIP of files that are packed already."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            # a fixed date: the same result is the same bytes
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()
