"""A file of Krita's with one animated layer in it: how frames reach the timeline in one step of undo. No Qt, no Krita.

`Document.importAnimation` would be the straight way, but Krita 6.0.4 dies in it where the machine is busy: what it
still has to do for one file reads the document that the next one has already replaced. This file is opened as a
document of its own, waited for and closed.

The format is what Krita itself saves (syntax 2.0, of every version since 2.x): a layer's pixels lie in tiles of
64 x 64, here as they are; the archive compresses them.
"""

from __future__ import annotations

import uuid
import zipfile
from collections.abc import Iterable, Sequence
from typing import IO

#: the file name of Krita's own profile for what is seen on a screen
SRGB = "sRGB-elle-V2-srgbtrc.icc"
#: pixels a side
TILE = 64
#: BGRA, 8 bits each
PIXEL = 4
#: in front of a tile's pixels: they are not compressed
RAW = b"\0"
CLEAR = bytes(PIXEL)
FOLDER = "film/layers"

#: left and top in pixels, and TILE * TILE pixels, row by row
Tile = tuple[int, int, bytes]

DOCUMENT = """\
<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE DOC PUBLIC '-//KDE//DTD krita 2.0//EN' 'http://www.calligra.org/DTD/krita-2.0.dtd'>
<DOC xmlns="http://www.calligra.org/DTD/krita" editor="Krita" kritaVersion="5.1.5" syntaxVersion="2.0">
 <IMAGE name="film" description="" mime="application/x-kra" width="{width}" height="{height}" x-res="72" y-res="72"
  colorspacename="RGBA" profile="{profile}">
  <layers>
   <layer name="film" nodetype="paintlayer" uuid="{{{uuid}}}" filename="{first}" keyframes="film.keyframes.xml"
    colorspacename="RGBA" compositeop="normal" opacity="255" visible="1" locked="0" collapsed="0" intimeline="1"
    onionskin="0" colorlabel="0" x="0" y="0" channelflags="" channellockflags=""/>
  </layers>
 </IMAGE>
</DOC>
"""
KEYFRAMES = """\
<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE keyframes PUBLIC '-//KDE//DTD krita-keyframes 1.0//EN' 'http://www.calligra.org/DTD/krita-keyframes-1.0.dtd'>
<keyframes xmlns="http://www.calligra.org/DTD/krita-keyframes">
 <channel name="content">
{keyframes} </channel>
</keyframes>
"""
KEYFRAME = """\
  <keyframe frame="{name}" time="{time}" color-label="0">
   <offset type="point" x="0" y="0"/>
  </keyframe>
"""


def write_animation(path: str, size: tuple[int, int], frames: Sequence[Iterable[Tile]], start: int) -> None:
    """One layer of keyframes from the time `start` on; before it nothing is seen.

    Args:
        size: width and height of the canvas, pixels.
        frames: the tiles of each, in sRGB; what no tile covers is clear.
        start: in frames.

    Raises:
        OSError: the file cannot be written.
        ValueError: there are no frames.
    """
    if not frames:
        raise ValueError("an animation without frames")
    times = {f"frame{i}": start + i for i in range(len(frames))}
    if start:  # Krita wants a keyframe at the beginning of time
        times = {"clear": 0, **times}
    keyframes = "".join(KEYFRAME.format(name=name, time=time) for name, time in times.items())
    width, height = size
    document = DOCUMENT.format(width=width, height=height, profile=SRGB, uuid=uuid.uuid4(), first=next(iter(times)))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("mimetype", "application/x-krita", zipfile.ZIP_STORED)
        archive.writestr("maindoc.xml", document)
        archive.writestr(f"{FOLDER}/film.keyframes.xml", KEYFRAMES.format(keyframes=keyframes))
        for name in times:
            tiles = frames[times[name] - start] if name != "clear" else ()
            with archive.open(f"{FOLDER}/{name}", "w") as file:
                _write_pixels(file, list(tiles))
            archive.writestr(f"{FOLDER}/{name}.defaultpixel", CLEAR)


def _write_pixels(file: IO[bytes], tiles: Sequence[Tile]) -> None:
    file.write(b"VERSION 2\nTILEWIDTH %d\nTILEHEIGHT %d\nPIXELSIZE %d\nDATA %d\n" % (TILE, TILE, PIXEL, len(tiles)))
    for x, y, pixels in tiles:
        file.write(b"%d,%d,LZF,%d\n" % (x, y, len(RAW) + len(pixels)))
        file.write(RAW + pixels)
