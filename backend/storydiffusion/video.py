"""Films on disk: pictures in, an MP4, WebM, GIF, APNG or a folder of PNGs out.

Kept here: a film of any length at flat memory (pictures are taken one at a time and let go), and a file
whole or not at all. The codecs are FFmpeg's, by PyAV.
"""

from __future__ import annotations

import io
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError

from storydiffusion.errors import ImageError, StoryDiffusionError
from storydiffusion.pictures import png_bytes, write_atomically, written_whole
from storydiffusion.references import Picture, check_picture


@dataclass(frozen=True)
class Format:
    """How a kind of film is written.

    Attributes:
        container, codec, pixels: FFmpeg's names; players know 'yuv420p' best, which has even sides only.
        options: of the codec.
        subtitles: FFmpeg's name of the captions' codec, "" where the format holds none.
        filters: what every picture goes through first.
    """

    container: str
    codec: str
    pixels: str
    options: tuple[tuple[str, str], ...] = ()
    subtitles: str = ""
    filters: tuple[tuple[str, str], ...] = ()


#: By the file's ending. A GIF's palette is made for every picture by itself: two passes would hold them all; what
#: FFmpeg leaves out of a picture because the one before had it (its `gifflags`) is wrong where palettes differ.
FORMATS = {
    ".mp4": Format("mp4", "libx264", "yuv420p", (("crf", "16"), ("preset", "medium")), "mov_text"),
    ".webm": Format("webm", "libvpx-vp9", "yuv420p", (("crf", "20"), ("b", "0"), ("row-mt", "1")), "webvtt"),
    ".gif": Format("gif", "gif", "pal8", (("loop", "0"), ("gifflags", "0"))),
    ".apng": Format("apng", "apng", "rgb24"),
}
#: Captions are timed in these, seconds.
TICK = Fraction(1, 1000)
#: FFmpeg's encoders of captions want to know how they look, in ASS.
CAPTION_STYLE = b"""[Script Info]
ScriptType: v4.00+
[V4+ Styles]
Format: Name, Fontname, Fontsize
Style: Default,Arial,18
[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
"""


class FilmError(StoryDiffusionError):
    """A film that cannot be written or read."""

    kind = "film"


@dataclass(frozen=True)
class Caption:
    """A line shown from picture `start` on, for `length` pictures."""

    text: str
    start: int
    length: int


def write_film(path: Path, pictures: Iterable[Picture], rate: Fraction, captions: Sequence[Caption] = ()) -> int:
    """Write a film; how many pictures it has.

    Args:
        path: its ending says the format (`FORMATS`); without one, a new folder of PNGs is made.
        pictures: (height, width, 3) RGB each, all of one size.
        rate: pictures a second.
        captions: subtitles that a player can turn off; MP4 and WebM hold them.

    Raises:
        FilmError: no such format, or it cannot hold captions or the rate; no pictures.
        ImageError: a picture of another size than the first.
        StoryDiffusionError: it could not be written.
    """
    check_film(path, rate, captions=bool(captions))
    counted = _alike(pictures)
    first = next(counted, None)
    if first is None:
        raise FilmError("The film has no pictures.", "Make its panels first.")
    everything = itertools.chain([first], counted)
    if not path.suffix:
        return _write_folder(path, everything)
    chosen = FORMATS[path.suffix.lower()]
    with written_whole(path) as partial:
        try:
            return _encode(partial, chosen, first, everything, rate, captions)
        except FFmpegError as error:
            raise FilmError(f"{path} could not be written: {error}.", "Make room, or use another format.") from error


def film_bytes(suffix: str, pictures: Iterable[Picture], rate: Fraction, captions: Sequence[Caption] = ()) -> bytes:
    """The same as a file's content, with nothing written to disk; `suffix` is one of `FORMATS`.

    Raises:
        FilmError, ImageError: as `write_film`.
    """
    check_film(Path(f"film{suffix}"), rate, captions=bool(captions))
    counted = _alike(pictures)
    first = next(counted, None)
    if first is None:
        raise FilmError("The film has no pictures.", "Make its panels first.")
    content = io.BytesIO()
    try:
        _encode(content, FORMATS[suffix.lower()], first, itertools.chain([first], counted), rate, captions)
    except FFmpegError as error:
        raise FilmError(f"The film could not be written: {error}.", "Use another format.") from error
    return content.getvalue()


def check_film(path: Path, rate: Fraction, *, captions: bool = False) -> None:
    """Raises FilmError where a film cannot be written so: before its pictures are made, not after."""
    if rate <= 0 or rate > 240:
        raise FilmError(f"A film of {float(rate):g} pictures a second was asked for.", "Use 1 to 240.")
    if path.suffix and path.suffix.lower() not in FORMATS:
        raise FilmError(f"Films are not written as '{path.suffix}'.", f"Use {', '.join(FORMATS)}, or a folder's name.")
    if captions and not (path.suffix and FORMATS[path.suffix.lower()].subtitles):
        raise FilmError(
            f"{path.suffix or 'A folder'} holds no captions.", "Use .mp4 or .webm, or leave the captions out."
        )
    if not path.suffix and path.exists():
        raise FilmError(f"{path} is there already.", "Choose another name; nothing is overwritten.")


def _alike(pictures: Iterable[Picture]) -> Iterator[Picture]:
    shape: tuple[int, ...] | None = None
    for i, picture in enumerate(pictures):
        check_picture(picture, f"Picture {i + 1} of the film")
        shape = shape or picture.shape
        if picture.shape != shape:
            raise ImageError(
                f"Picture {i + 1} of the film has {picture.shape[1]} x {picture.shape[0]} pixels, "
                f"the first {shape[1]} x {shape[0]}.",
                "Make all panels of one size.",
            )
        yield picture


def _write_folder(folder: Path, pictures: Iterable[Picture]) -> int:
    """PNGs 0001.png, 0002.png ... in a folder that is there when all of them are."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".", ignore_cleanup_errors=True) as partial:
            count, inside = 0, Path(partial) / folder.name
            for count, picture in enumerate(pictures, 1):
                write_atomically(inside / f"{count:04d}.png", png_bytes(picture))
            inside.rename(folder)
            return count
    except OSError as error:
        raise FilmError(
            f"{folder} could not be written: {error.strerror or error}.", "Choose another place."
        ) from error


def _even(picture: Picture) -> Picture:
    """The picture with its last column and row doubled where a side is odd."""
    height, width = picture.shape[:2]
    return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _encode(
    target: Path | io.BytesIO,
    chosen: Format,
    first: Picture,
    pictures: Iterable[Picture],
    rate: Fraction,
    captions: Sequence[Caption],
) -> int:
    fits = _even if chosen.pixels.startswith("yuv420") else np.ascontiguousarray
    with av.open(target if isinstance(target, io.BytesIO) else str(target), "w", format=chosen.container) as film:
        video: Any = film.add_stream(chosen.codec, rate=rate, options=dict(chosen.options))
        video.height, video.width = fits(first).shape[:2]
        video.pix_fmt = chosen.pixels
        video.codec_context.time_base = 1 / rate
        if chosen.pixels.startswith("yuv"):  # said, so that no player guesses
            video.codec_context.colorspace = av.video.reformatter.Colorspace.ITU709
            video.codec_context.color_range = av.video.reformatter.ColorRange.MPEG
        lines = _subtitles(film, chosen, captions, rate)
        palette = _Palette(video, rate) if chosen.pixels == "pal8" else None
        count = 0
        for picture in pictures:
            while lines and lines[0].pts * TICK <= count / rate:
                film.mux(lines.pop(0))
            frame = av.VideoFrame.from_ndarray(fits(picture), format="rgb24")
            if palette:
                frame = palette(frame)
            elif chosen.pixels.startswith("yuv"):
                frame = frame.reformat(format=chosen.pixels, dst_colorspace="ITU709")
            frame.pts, frame.time_base = count, 1 / rate
            film.mux(video.encode(frame))
            count += 1
        film.mux(video.encode(None))
    return count


class _Palette:
    """Each picture in 256 colours of its own."""

    def __init__(self, video: Any, rate: Fraction) -> None:
        graph = av.filter.Graph()
        source = graph.add_buffer(
            width=video.width, height=video.height, format=av.VideoFormat("rgb24"), time_base=1 / rate
        )
        split, choose = graph.add("split"), graph.add("palettegen", "stats_mode=single")
        use, end = graph.add("paletteuse", "new=1:dither=sierra2_4a"), graph.add("buffersink")
        source.link_to(split)
        split.link_to(use, 0, 0)
        split.link_to(choose, 1, 0)
        choose.link_to(use, 0, 1)
        use.link_to(end)
        graph.configure()
        self.graph, self.count = graph, 0

    def __call__(self, frame: Any) -> Any:
        frame.pts = self.count
        self.count += 1
        self.graph.push(frame)
        return self.graph.pull()


def _subtitles(film: Any, chosen: Format, captions: Sequence[Caption], rate: Fraction) -> list[Any]:
    """The captions as packets, by their start."""
    if not captions:
        return []
    stream = film.add_stream(chosen.subtitles)
    stream.codec_context.time_base, stream.codec_context.subtitle_header = TICK, CAPTION_STYLE
    packets = []
    for caption in sorted(captions, key=lambda one: one.start):
        text = caption.text.encode()
        packet = av.Packet(len(text).to_bytes(2, "big") + text if chosen.subtitles == "mov_text" else text)
        packet.stream, packet.time_base = stream, TICK
        packet.pts = packet.dts = round(caption.start / rate / TICK)
        packet.duration = round(caption.length / rate / TICK)
        packets.append(packet)
    return packets


def read_film(path: Path) -> Iterator[Picture]:
    """The pictures of a film, (height, width, 3) RGB, one at a time.

    Raises:
        FilmError: it cannot be read.
    """
    try:
        with av.open(str(path)) as film:
            for frame in film.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
    except (FFmpegError, IndexError) as error:
        raise FilmError(f"{path} cannot be read as a film: {error}.", "Use an MP4, WebM, GIF or APNG.") from error
