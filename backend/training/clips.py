"""The storyworld in motion: clips whose every frame is known.

A clip is a row of frames; a frame is a scene, what a camera sees of it, and, while night falls or one place
becomes another, how far another scene shines through. So frames can be drawn as pixels (`draw`) or as what
their latents say (`shown`, which needs no picture), and where the character is in each of them is known
(`trajectory`).
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from storydiffusion.motion.camera import way_of
from training import captions, fields, world
from training.data import HELD_OUT
from training.world import Figure, Scene, View

LENGTH = 16
MOTIONS = ("walk", "run", "jump", "wave", "turn", "sit", "hat", "pan", "zoom", "nightfall", "travel")
#: How often each is learned: from one place to another is what lies between two panels of a story.
ODDS = (1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 4)


@dataclass(frozen=True)
class Frame:
    """One picture of a clip; `blend` (0 to 1) of it is the scene `later`."""

    scene: Scene
    view: View = world.WHOLE
    later: Scene | None = None
    blend: float = 0.0


@dataclass(frozen=True)
class Clip:
    """Frames of one motion, one of `MOTIONS`."""

    motion: str
    frames: tuple[Frame, ...]

    @property
    def displacement(self) -> float:
        """How far the character gets from the first frame to the last, in picture sides."""
        first, *_, last = trajectory(self)
        return math.dist(first, last) / world.SIZE


def clip(number: int, motion: str = "", length: int = LENGTH) -> Clip:
    """Clip `number` of the training world; those from `HELD_OUT` on are in no training run."""
    return sample_clip(random.Random(f"clip {number}"), motion, length)


def held_out(count: int, length: int = LENGTH) -> list[Clip]:
    """The first held-out clips, the motions in turn."""
    return [clip(HELD_OUT + i, MOTIONS[i % len(MOTIONS)], length) for i in range(count)]


def draw(frame: Frame, size: int = world.SIZE) -> NDArray[np.uint8]:
    """(size, size, 3) RGB."""
    picture = world.draw(frame.scene, size, frame.view)
    if frame.later is None or not frame.blend:
        return picture
    later = world.draw(frame.later, size, frame.view)
    return np.rint(picture + frame.blend * (later.astype(np.float32) - picture)).astype(np.uint8)


def shown(frame: Frame) -> fields.Array:
    """What the frame's latents say besides colours: (fields.CHANNELS, GRID, GRID)."""
    out = fields.draw(frame.scene, frame.view)
    if frame.later is None or not frame.blend:
        return out
    blended: fields.Array = out + np.float32(frame.blend) * (fields.draw(frame.later, frame.view) - out)
    return blended


def trajectory(clip: Clip) -> list[tuple[float, float]]:
    """Where the character stands, or hangs in the air, in every frame: (x, y), pixels of the picture."""
    places = []
    for frame in clip.frames:
        figure, view = frame.scene.cells[0].figures[0], frame.view
        y = figure.y - figure.scale * world.pose(figure)[2]
        places.append(((figure.x - view.left) * view.zoom, (y - view.top) * view.zoom))
    return places


def caption(frame: Frame, rng: random.Random) -> str:
    """A frame in words: of two scenes the one that is seen more; a figure on its way into a pose is said to be in the
    nearer one, and one whose feet are closed between two steps still walks."""
    scene = frame.later if frame.later is not None and frame.blend >= 0.5 else frame.scene
    figure = scene.cells[0].figures[0]
    walks = figure.action == "walking" and figure.then == "standing"
    action = figure.then if figure.then and figure.phase >= 0.5 and not walks else figure.action
    return captions.describe(_with(scene, action=action, then="", facing=1), rng).text


# --------------------------------------------------------------------------- motions


def eased(t: float) -> float:
    """Slow, fast, slow: 3 t^2 - 2 t^3 (Hermite)."""
    return t * t * (3 - 2 * t)


def _with(scene: Scene, **changes: object) -> Scene:
    """The scene with its figure changed."""
    cell = scene.cells[0]
    figure = dataclasses.replace(cell.figures[0], **changes)  # type: ignore[arg-type]
    return dataclasses.replace(scene, cells=(dataclasses.replace(cell, figures=(figure,)),))


def _stride(t: float, steps: int) -> float:
    """How far the feet are closed, 0 (apart) to 1, `steps` times in a clip."""
    return 0.5 - 0.5 * math.cos(2 * math.pi * steps * t)


def _travel(rng: random.Random, figure: Figure, least: float, most: float) -> tuple[float, float]:
    """From where to where, pixels: as far as asked, inside the picture."""
    distance = rng.uniform(least, most)
    start = rng.uniform(52, world.SIZE - 52 - distance)
    return (start, start + distance) if rng.random() < 0.5 else (start + distance, start)


def sample_clip(rng: random.Random, motion: str = "", length: int = LENGTH) -> Clip:
    """A random clip of one character; `motion` is one of `MOTIONS`."""
    motion = motion or rng.choices(MOTIONS, ODDS)[0]
    who = world.sample_character(rng)
    action = {"walk": "walking", "run": "walking", "travel": rng.choice(world.ACTIONS)}.get(motion, "standing")
    start = world.single(rng, who, framing="far" if rng.random() < 0.3 else "medium", action=action)
    figure = start.cells[0].figures[0]
    if start.framing == "medium":  # from foot to ear in the picture
        start = _with(start, scale=min(figure.scale, 0.9))
        figure = start.cells[0].figures[0]
    at = _MOTIONS[motion](rng, start, figure)
    times = [i / max(length - 1, 1) for i in range(length)]
    return Clip(motion, tuple(at(t) for t in times))


At = Callable[[float], Frame]


def _walk(rng: random.Random, scene: Scene, figure: Figure, *, least: float, most: float, steps: int, hop: float) -> At:
    x0, x1 = _travel(rng, figure, least, most)
    facing = 1 if x1 > x0 else -1

    def at(t: float) -> Frame:
        closed = _stride(t, steps)
        return Frame(
            _with(
                scene,
                x=x0 + (x1 - x0) * t,
                y=figure.y - hop * figure.scale * closed,
                facing=facing,
                then="standing",
                phase=0.9 * closed,
            )
        )

    return at


def _jump(rng: random.Random, scene: Scene, figure: Figure) -> At:
    x0, x1 = _travel(rng, figure, 30, 130)

    def at(t: float) -> Frame:
        high = 4 * t * (1 - t)
        return Frame(
            _with(
                scene,
                x=x0 + (x1 - x0) * t,
                facing=1 if x1 > x0 else -1,
                then="jumping",
                phase=high,
            )
        )

    return at


def _pose(then: str) -> Callable[[random.Random, Scene, Figure], At]:
    return lambda rng, scene, figure: lambda t: Frame(_with(scene, then=then, phase=eased(t)))


def _turn(rng: random.Random, scene: Scene, figure: Figure) -> At:
    # never quite edge on: a figure without breadth cannot be seen
    def facing(t: float) -> float:
        turned = figure.facing * math.cos(math.pi * t)
        return math.copysign(max(abs(turned), 0.25), turned)

    return lambda t: Frame(_with(scene, facing=facing(t)))


def _hat(rng: random.Random, scene: Scene, figure: Figure) -> At:
    hat = rng.choice([one for one in world.HATS if one != "none"])
    bare, wearing = (dataclasses.replace(figure.character, hat=one) for one in ("none", hat))
    return lambda t: Frame(
        _with(
            scene,
            character=wearing if t >= 0.5 else bare,
            then="waving",
            phase=4 * t * (1 - t),
        )
    )


def _camera(rng: random.Random, scene: Scene, figure: Figure, *, zooming: bool) -> At:
    zoom = rng.uniform(1.25, 1.7)
    room = world.SIZE - world.SIZE / zoom
    # where the figure stays in sight
    left = min(max(figure.x - world.SIZE / zoom / 2, 0), room)
    near = View(left, room, zoom)
    far = world.WHOLE if zooming else View(0 if left > room / 2 else room, room, zoom)
    if rng.random() < 0.5:
        near, far = far, near

    def at(t: float) -> Frame:
        k = eased(t)
        nearer = near.zoom / far.zoom
        zoomed: float = far.zoom * nearer**k
        side, way = world.SIZE / zoomed, way_of(nearer, k)

        def edge(a: float, b: float, full: float) -> float:
            return min(max(a + (b - a) * way, 0), full - side)

        return Frame(scene, View(edge(far.left, near.left, world.SIZE), edge(far.top, near.top, world.SIZE), zoomed))

    return at


def _nightfall(rng: random.Random, scene: Scene, figure: Figure) -> At:
    times = world.TIMES if rng.random() < 0.7 else world.TIMES[::-1]
    skies = [dataclasses.replace(scene, cells=(dataclasses.replace(scene.cells[0], time=one),)) for one in times]

    def at(t: float) -> Frame:
        i = min(int(2 * t), 1)
        return Frame(skies[i], later=skies[i + 1], blend=2 * t - i)

    return at


def _travelling(rng: random.Random, scene: Scene, figure: Figure) -> At:
    """Into another place: the character goes on as one, the places dissolve."""
    there = world.single(rng, figure.character, framing="far" if rng.random() < 0.2 else "medium")
    end = there.cells[0].figures[0]
    scale = min(end.scale, 0.9)

    def at(t: float) -> Frame:
        k = eased(t)
        moved = dataclasses.replace(
            figure,
            x=figure.x + k * (end.x - figure.x),
            y=figure.y + k * (end.y - figure.y),
            scale=figure.scale * (scale / figure.scale) ** k,
            facing=figure.facing if k < 0.5 else end.facing,  # seen from the front, that is a blink
            then=end.action,
            phase=k,
        )
        here, later = (
            dataclasses.replace(one, cells=(dataclasses.replace(one.cells[0], figures=(moved,)),))
            for one in (scene, there)
        )
        return Frame(here, later=later, blend=k)

    return at


def _walking(rng: random.Random, scene: Scene, figure: Figure) -> At:
    return _walk(rng, scene, figure, least=24, most=80, steps=2, hop=2)


def _running(rng: random.Random, scene: Scene, figure: Figure) -> At:
    return _walk(rng, scene, figure, least=80, most=150, steps=4, hop=9)


_MOTIONS: dict[str, Callable[[random.Random, Scene, Figure], At]] = {
    "walk": _walking,
    "run": _running,
    "jump": _jump,
    "wave": _pose("waving"),
    "turn": _turn,
    "sit": _pose("sitting"),
    "hat": _hat,
    "pan": lambda rng, scene, figure: _camera(rng, scene, figure, zooming=False),
    "zoom": lambda rng, scene, figure: _camera(rng, scene, figure, zooming=True),
    "nightfall": _nightfall,
    "travel": _travelling,
}
