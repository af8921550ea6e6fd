"""N panels and what lies between them: a film, frame by frame.

Kept here: a film of any length at flat memory, because a stretch is let go once its frames are handed on; and
what is finished stays so, because a stretch is a folder of PNGs that is there whole or not at all, named by
everything it was made from. A film that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from storydiffusion.errors import PlanError, StoryDiffusionError
from storydiffusion.motion.movers import Mover
from storydiffusion.motion.transition import Easing, Stretch
from storydiffusion.pictures import load_picture, png_bytes, write_atomically
from storydiffusion.references import Picture
from storydiffusion.run import Cancel, Settings
from storydiffusion.sampling import Callback
from storydiffusion.video import Caption

#: Raised when frames come out otherwise than before: stretches of an older one are made again.
GENERATION = 2
MAX_HOLD = 1000


@dataclass(frozen=True)
class Transition:
    """What lies between two panels.

    Attributes:
        frames: of the stretch, the two panels included.
        prompt: what happens; may be empty.
        easing: how time passes.
    """

    frames: int = 16
    prompt: str = ""
    easing: Easing = "smooth"


@dataclass(frozen=True)
class Shot:
    """A panel of a film, and what follows it.

    Attributes:
        id: the panel's.
        picture: reads it, when it is needed.
        hold: for how many frames it is shown, at least 1.
        caption: shown under it while it is held.
    """

    id: str
    picture: Callable[[], Picture]
    hold: int = 1
    caption: str = ""
    transition: Transition = Transition()


def length(shots: Sequence[Shot]) -> int:
    """Frames of the whole film.

    Raises:
        PlanError: a panel is held for less than a frame, or there is no panel.
    """
    if not shots:
        raise PlanError("A film needs a panel.", "Make some first.")
    if wrong := [shot for shot in shots if not 1 <= shot.hold <= MAX_HOLD]:
        raise PlanError(f"Panel {wrong[0].id} is held for {wrong[0].hold} frames.", f"Hold it for 1 to {MAX_HOLD}.")
    return sum(shot.hold for shot in shots) + sum(shot.transition.frames - 2 for shot in shots[:-1])


def captions(shots: Sequence[Shot]) -> list[Caption]:
    """Each panel's caption while it is held, by frame."""
    found, at = [], 0
    for shot in shots:
        if shot.caption:
            found.append(Caption(shot.caption, at, shot.hold))
        at += shot.hold + shot.transition.frames - 2
    return found


def strip(shots: Sequence[Shot], columns: int = 8, most: int = 8) -> list[list[int]]:
    """For each way between two panels the frames of the film that show it on a contact strip: the panels and as
    many between as fit into `columns`. Of a long film `most` ways, the first and the last among them: a strip is to be
    looked at, and held in memory until then."""
    rows, at = [], -1
    for shot in shots[:-1]:
        at += shot.hold
        count = shot.transition.frames
        rows.append([at + round(i * (count - 1) / (columns - 1)) for i in range(columns)])
        at += count - 2
    if len(rows) > most:
        rows = [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]
    return rows


def frames(
    shots: Sequence[Shot],
    open_mover: Callable[[], Mover],
    settings: Settings,
    folder: Path,
    model: str,
    callback: Callback | None = None,
    cancel: Cancel = lambda: False,
) -> Iterator[Picture]:
    """The film's frames in order.

    Args:
        open_mover: gives whoever makes the stretches; called when the first has to be made.
        folder: keeps the stretches.
        model: whose weights they are made with.

    Raises:
        PlanError, ImageError, Cancelled: as `transition.between`.
        StoryDiffusionError: a stretch could not be kept.
    """
    length(shots)
    movers: list[Mover] = []
    for i, shot in enumerate(shots):
        start = shot.picture()
        for _ in range(shot.hold):
            yield start
        if i + 1 == len(shots):
            return
        asked, following = shot.transition, shots[i + 1]
        keyframes = {0: start, asked.frames - 1: following.picture()}
        stretch = Stretch(
            f"{shot.id}-{following.id}",
            asked.frames,
            keyframes,
            asked.prompt,
            seed=settings.seed,
            easing=asked.easing,
        )
        stretch.check()
        kept = folder / f"{stretch.id}-{key_of(stretch, settings, model)}"
        if not kept.is_dir():
            if not movers:
                movers.append(open_mover())
            keep(kept, movers[0](stretch, settings, callback, cancel))
        for number in range(1, asked.frames - 1):
            yield load_picture(kept / f"{number:04d}.png")


def key_of(stretch: Stretch, settings: Settings, model: str) -> str:
    """12 hexadecimal digits of everything that a stretch is made from."""
    digest = hashlib.blake2b(digest_size=6)
    words = replace(stretch, keyframes={})
    digest.update(f"{GENERATION}\x1f{model}\x1f{words}\x1f{replace(settings, plan=None, chunk=1)}".encode())
    for frame, picture in sorted(stretch.keyframes.items()):
        digest.update(f"{frame}\x1f{picture.shape}".encode() + picture.tobytes())
    return digest.hexdigest()


def keep(folder: Path, pictures: Sequence[Picture]) -> None:
    """Write a stretch's frames, 0000.png and on, to a folder that is there when all of them are."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".", ignore_cleanup_errors=True) as partial:
            inside = Path(partial) / folder.name
            for number, picture in enumerate(pictures):
                write_atomically(inside / f"{number:04d}.png", png_bytes(picture))
            inside.rename(folder)
    except OSError as error:
        raise StoryDiffusionError(
            f"{folder} could not be written: {error.strerror or error}.", "Make room, or choose another place."
        ) from error
