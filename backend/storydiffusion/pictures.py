"""Pictures on disk and beside each other: PNG with the story inside, contact sheets."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError

from storydiffusion.errors import ImageError, StoryDiffusionError
from storydiffusion.references import Picture, resized

#: Keys of the PNG text chunks a panel carries.
STORY_KEY = "storydiffusion:story"
PANEL_KEY = "storydiffusion:panel"
MAX_PIXELS = 64 * 1024 * 1024


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to be written inside, which takes its place at the end: whole or not at all.

    Raises:
        StoryDiffusionError: the disk is full or the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=f".part{path.suffix}")
        os.close(handle)
        partial = Path(name)
        try:
            yield partial
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.chmod(0o644)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StoryDiffusionError(
            f"{path} could not be written: {error.strerror or error}.", "Choose another folder or make room."
        ) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; raises as `written_whole` does."""
    with written_whole(path) as partial:
        partial.write_bytes(content)


def free_path(path: Path) -> Path:
    """`path`, or the next take beside it that does not exist yet: p1.png, p1.take2.png, ... (a panel's
    id holds no dot, so a take is never mistaken for another panel)."""
    take, candidate = 1, path
    while candidate.exists():
        take += 1
        candidate = path.with_name(f"{path.stem}.take{take}{path.suffix}")
    return candidate


def png_bytes(picture: Picture, text: Mapping[str, str] | None = None) -> bytes:
    """A (height, width, 3) picture as PNG, `text` in international text chunks."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    buffer = BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path, formats=("PNG", "JPEG", "WEBP"))
    except FileNotFoundError as error:
        raise ImageError(f"There is no picture at {path}.", "Check the name.") from error
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path} is not a PNG, JPEG or WebP picture.", "Export it as PNG.") from error
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"{path} has {image.width} x {image.height} pixels.", "Scale it to at most 64 megapixels.")
    return image


def load_picture(path: Path) -> Picture:
    """A PNG, JPEG or WebP as (height, width, 3) RGB; transparency lies on white.

    Raises:
        ImageError: there is no picture that can be read.
    """
    image = _open(path)
    try:
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            layer = image.convert("RGBA")
            paper = Image.new("RGBA", layer.size, "white")
            image = Image.alpha_composite(paper, layer)
        return np.array(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ImageError(f"{path} is damaged.", "Export it again.") from error


def load_mask(path: Path) -> NDArray[np.uint8]:
    """A mask picture as (height, width), white where the panel may change."""
    try:
        return np.array(_open(path).convert("L"))
    except (OSError, SyntaxError) as error:
        raise ImageError(f"{path} is damaged.", "Export it again.") from error


def embedded_text(path: Path) -> dict[str, str]:
    """The text chunks of a PNG that this project wrote."""
    image = _open(path)
    image.load()
    return {str(key): str(value) for key, value in image.info.items() if str(key).startswith("storydiffusion:")}


def contact_sheet(pictures: Sequence[Picture], captions: Sequence[str] = (), columns: int = 0) -> Picture:
    """Pictures side by side on paper, captions below, wrapped to the picture's width.

    Pictures are shown at the size of the first, at most 512 pixels, so that the sheet of a long story
    stays a picture one can open.
    """
    scale = min(1.0, 512 / max(pictures[0].shape[:2]))
    size = [max(1, round(side * scale)) for side in pictures[0].shape[:2]]
    pictures = [resized(picture, size[1], size[0]) for picture in pictures]
    columns = columns or min(4, len(pictures))
    height, width = pictures[0].shape[:2]
    letters = max(12, width // 17)
    font = ImageFont.load_default(letters)
    wrapped = [_wrap(text, font, width) for text in captions] or [[] for _ in pictures]
    lines = max((len(one) for one in wrapped), default=0)
    gap, line = max(8, width // 24), round(letters * 1.35)
    cell = height + (lines * line + gap // 2 if lines else 0)
    rows = math.ceil(len(pictures) / columns)
    paper = Image.new("RGB", (gap + columns * (width + gap), gap + rows * (cell + gap)), "#fffdf8")
    pen = ImageDraw.Draw(paper)
    for i, picture in enumerate(pictures):
        x, y = gap + i % columns * (width + gap), gap + i // columns * (cell + gap)
        pen.rectangle((x - 2, y - 2, x + width + 1, y + height + 1), fill="#2b2430")
        paper.paste(Image.fromarray(picture), (x, y))
        for n, text in enumerate(wrapped[i]):
            pen.text((x, y + height + gap // 2 + n * line), text, fill="#2b2430", font=font)
    return np.array(paper)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
