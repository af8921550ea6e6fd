"""The storyworld: storybook scenes drawn from parameters.

A scene is data (who, doing what, where, when, how framed); `svg` draws it with resvg and
`storydiffusion`'s evaluation knows the truth of every picture because it is the data. Nothing here
knows captions (`captions.py`) or tensors.

Coordinates are pixels of a 256 x 256 picture. A figure is drawn in its own units: feet at (0, 0),
y upwards negative, head's top near y = -180, and is placed by `translate scale`.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import resvg_py
from numpy.typing import NDArray

SIZE = 256

KINDS = ("cat", "rabbit", "bear", "frog", "elephant", "duck")
COLORS = {
    "red": "#d9342b",
    "orange": "#f28a1e",
    "yellow": "#f8d53c",
    "green": "#3fa045",
    "blue": "#2d6bd2",
    "purple": "#8a45b8",
    "pink": "#f79ac0",
    "brown": "#8a5630",
    "white": "#faf6ee",
    "black": "#35303a",
}
HATS = ("none", "top hat", "party hat", "crown", "beanie", "bow", "scarf")
CLOTHES = ("shirt", "dress", "overalls", "coat")
PATTERNS = ("plain", "striped", "spotted")
PLACES = (
    "forest",
    "beach",
    "city",
    "mountains",
    "desert",
    "meadow",
    "castle",
    "farm",
    "bedroom",
    "library",
)
INDOORS = frozenset({"bedroom", "library"})
TIMES = ("day", "sunset", "night")
WEATHERS = ("clear", "rain", "snow")
ACTIONS = ("standing", "walking", "jumping", "waving", "sitting", "reading")
FRAMINGS = ("close-up", "medium", "far")
POSITIONS = ("left", "middle", "right")
LAYOUTS = ("single", "twins", "triplets", "strip", "sheet", "mirror", "pair", "crowd")

#: Every attribute the probe reads from a picture of one character, with its values.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "kind": KINDS,
    "fur": tuple(COLORS),
    "clothes": CLOTHES,
    "clothes_color": tuple(COLORS),
    "pattern": PATTERNS,
    "hat": HATS,
    "hat_color": tuple(COLORS),
    "place": PLACES,
    "time": TIMES,
    "weather": WEATHERS,
    "action": ACTIONS,
    "framing": FRAMINGS,
    "position": POSITIONS,
}
#: The attributes that make a character: what consistency has to hold.
CHARACTER_ATTRIBUTES = (
    "kind",
    "fur",
    "clothes",
    "clothes_color",
    "pattern",
    "hat",
    "hat_color",
)

#: Each place is staged in this many ways (where the sun, the barn, the window, the books are).
STAGINGS = 2

OUTLINE = "#3b2b33"
Part = Literal["fur", "clothes", "hat", "other"]


@dataclass(frozen=True)
class Character:
    """What stays the same from picture to picture. Values are those of `ATTRIBUTES`."""

    kind: str
    fur: str
    clothes: str
    clothes_color: str
    pattern: str
    hat: str
    hat_color: str


@dataclass(frozen=True)
class Figure:
    """A character drawn somewhere: feet at (x, y) pixels, `scale` pixels a figure unit.

    `phase` is how far it is on the way from `action` to the action `then`, 0 to 1; `facing` is -1 (left)
    to 1 (right), and in between while it turns.
    """

    character: Character
    action: str
    x: float
    y: float
    scale: float
    facing: float = 1
    then: str = ""
    phase: float = 0.0

    @property
    def moving(self) -> bool:
        """Whether it is seen between two actions or in a turn."""
        return bool(self.then) or abs(self.facing) < 1


@dataclass(frozen=True)
class Cell:
    """A place with figures in it; a picture is one cell, a comic strip has several."""

    place: str
    time: str
    weather: str
    figures: tuple[Figure, ...]
    seed: int


@dataclass(frozen=True)
class Scene:
    """One picture. `framing` and `position` speak of single pictures only."""

    layout: str
    cells: tuple[Cell, ...]
    framing: str = "medium"
    position: str = "middle"

    def attributes(self) -> dict[str, str]:
        """The truth the probe is measured against; attributes that cannot be seen are left out."""
        cell, figure = self.cells[0], self.cells[0].figures[0]
        truth = dataclasses.asdict(figure.character)
        truth |= {"place": cell.place, "time": cell.time, "action": figure.action}
        truth |= {"framing": self.framing, "position": self.position}
        if cell.place not in INDOORS:
            truth["weather"] = cell.weather
        if self.framing == "close-up" or figure.moving:
            del truth["action"]
        if figure.character.hat == "none":
            del truth["hat_color"]
        return truth


@dataclass(frozen=True)
class View:
    """What a camera sees of a picture: `zoom` (1 or more) times nearer, from its left and top edge on."""

    left: float = 0.0
    top: float = 0.0
    zoom: float = 1.0


WHOLE = View()


# --------------------------------------------------------------------------- sampling


def sample_character(rng: random.Random, **fixed: str) -> Character:
    """Every attribute drawn independently and uniformly, `fixed` ones apart."""
    drawn = {name: rng.choice(ATTRIBUTES[name]) for name in CHARACTER_ATTRIBUTES}
    return Character(**{**drawn, **fixed})


def _figure(rng: random.Random, who: Character, x: float, scale: float, y: float = 236.0, action: str = "") -> Figure:
    return Figure(
        who,
        action or rng.choice(ACTIONS),
        x + rng.uniform(-6, 6),
        y + rng.uniform(-4, 4),
        scale * rng.uniform(0.94, 1.06),
        rng.choice((-1, 1)),
    )


def _cell(rng: random.Random, figures: Sequence[Figure], place: str = "") -> Cell:
    return Cell(
        place or rng.choice(PLACES),
        rng.choice(TIMES),
        rng.choices(WEATHERS, (2, 1, 1))[0],
        tuple(figures),
        rng.randrange(1 << 30),
    )


def single(
    rng: random.Random,
    who: Character,
    *,
    framing: str = "",
    position: str = "",
    action: str = "",
    place: str = "",
) -> Scene:
    """One character in one place."""
    framing = framing or rng.choices(FRAMINGS, (4, 13, 3))[0]
    position = position or rng.choice(POSITIONS)
    side = POSITIONS.index(position) - 1
    x, y, scale = {
        "close-up": (128 + 50 * side, 292, 1.2),
        "medium": (128 + 62 * side, 238, 0.92),
        "far": (128 + 76 * side, 228, 0.64),
    }[framing]
    figure = _figure(rng, who, x, scale, y, action)
    return Scene("single", (_cell(rng, [figure], place),), framing, position)


#: Share of the pictures that show somebody between two actions, or turning.
MOVING = 0.1


def sample_scene(rng: random.Random, layout: str = "") -> Scene:
    """A random picture; about half hold one character once, the rest repeat or mix characters. Some
    catch their first figure in a movement."""
    scene = _at_rest(rng, layout)
    if rng.random() >= MOVING or scene.layout in ("mirror", "crowd"):
        return scene
    cell = scene.cells[0]
    figure = cell.figures[0]
    if rng.random() < 0.75:
        figure = dataclasses.replace(figure, then=rng.choice(ACTIONS), phase=rng.random())
    else:
        figure = dataclasses.replace(figure, facing=rng.choice((-1, 1)) * rng.uniform(0.2, 0.9))
    cell = dataclasses.replace(cell, figures=(figure, *cell.figures[1:]))
    return dataclasses.replace(scene, cells=(cell, *scene.cells[1:]))


def _at_rest(rng: random.Random, layout: str) -> Scene:
    layout = layout or rng.choices(LAYOUTS, (50, 17, 4, 14, 3, 3, 8, 1))[0]
    who = sample_character(rng)
    if layout == "single":
        return single(rng, who)
    if layout == "twins":
        figures = [_figure(rng, who, x, 0.92) for x in (74, 182)]
    elif layout == "triplets":
        figures = [_figure(rng, who, x, 0.66, 230) for x in (50, 128, 206)]
    elif layout == "pair":
        other = sample_character(rng)
        figures = [_figure(rng, c, x, 0.92) for c, x in ((who, 74), (other, 182))]
    elif layout == "crowd":
        spots = [(x, y) for y in (150, 192, 236) for x in (44, 100, 156, 212)]
        figures = [
            _figure(rng, sample_character(rng), x + rng.uniform(-8, 8), 0.46, y)
            for x, y in rng.sample(spots, rng.randint(4, 6))
        ]
        figures.sort(key=lambda figure: figure.y)
    elif layout == "mirror":
        here = _figure(rng, who, 70, 0.86)
        there = dataclasses.replace(here, x=256 - here.x, facing=-here.facing)
        figures = [here, there]
    elif layout == "sheet":
        actions = rng.sample(ACTIONS, 3)
        figures = [_figure(rng, who, x, 0.66, 214, action) for x, action in zip((50, 128, 206), actions, strict=True)]
    else:
        assert layout == "strip", layout
        places = rng.sample(PLACES, 4)
        if rng.random() < 0.75:  # two tall cells
            cells = [_cell(rng, [_figure(rng, who, 64, 0.86, 236)], p) for p in places[:2]]
        else:  # two by two
            cells = [_cell(rng, [_figure(rng, who, 64, 0.5, 118)], p) for p in places]
        return Scene(layout, tuple(cells))
    return Scene(layout, (_cell(rng, figures),))


# --------------------------------------------------------------------------- colours


def mix(a: str, b: str, t: float) -> str:
    """The colour `t` of the way from `a` to `b`, both '#rrggbb'."""
    pairs = zip(bytes.fromhex(a[1:]), bytes.fromhex(b[1:]), strict=True)
    return "#" + "".join(f"{round(x + (y - x) * t):02x}" for x, y in pairs)


class Paint:
    """How the parts of a figure are filled; `MaskPaint` fills one part white and the rest black."""

    def __init__(self, who: Character, uid: str) -> None:
        self.fur = COLORS[who.fur]
        self.light = mix(self.fur, "#fff6e6", 0.55)
        self.dark = mix(self.fur, "#1c1420", 0.28)
        self.hat = COLORS[who.hat_color]
        self.hat_trim = mix(self.hat, "#1c1420" if who.hat_color != "black" else "#ffffff", 0.3)
        base = COLORS[who.clothes_color]
        pale = who.clothes_color in ("white", "yellow", "pink")
        self.contrast = mix(base, "#2a3150" if pale else "#fffaf0", 0.72)
        self.clothes = base
        self.pattern = "" if who.pattern == "plain" else f"url(#{uid})"
        self.defs = ""
        if who.pattern == "striped":
            self.defs = (
                f'<pattern id="{uid}" width="18" height="18" patternUnits="userSpaceOnUse">'
                f'<rect y="3" width="18" height="7" fill="{self.contrast}"/></pattern>'
            )
        elif who.pattern == "spotted":
            self.defs = (
                f'<pattern id="{uid}" width="19" height="19" patternUnits="userSpaceOnUse">'
                f'<circle cx="9.5" cy="9.5" r="5.2" fill="{self.contrast}"/></pattern>'
            )

    def garment(self, d: str) -> str:
        """A piece of clothing: its colour, the pattern over it (never its own tiles' seams), a contour."""
        out = _path(d, self.flat("clothes", self.clothes))
        if self.pattern:
            out += _path(d, f'fill="{self.pattern}"')
        return out + _path(d, self.line("other", OUTLINE, 3))

    def fill(self, part: Part, color: str) -> str:
        return f'fill="{color}" stroke="{OUTLINE}" stroke-width="3" stroke-linejoin="round"'

    def flat(self, part: Part, color: str) -> str:
        return f'fill="{color}"'

    def line(self, part: Part, color: str, width: float) -> str:
        return f'fill="none" stroke="{color}" stroke-width="{width}" stroke-linecap="round"'


class MaskPaint(Paint):
    """Draws where one part of a figure is to be seen: white there, black elsewhere."""

    def __init__(self, who: Character, uid: str, part: Part) -> None:
        super().__init__(dataclasses.replace(who, pattern="plain"), uid)
        self.part = part

    def _shade(self, part: Part) -> str:
        return "#ffffff" if part == self.part else "#000000"

    def fill(self, part: Part, color: str) -> str:
        return f'fill="{self._shade(part)}"'

    flat = fill

    def line(self, part: Part, color: str, width: float) -> str:
        return super().line(part, self._shade(part), width)


class SilhouettePaint(MaskPaint):
    """Fills the whole figure with one shade: who is seen where."""

    def __init__(self, who: Character, shade: int) -> None:
        super().__init__(who, "silhouette", "other")
        self.shade = f"rgb({shade},{shade},{shade})"

    def _shade(self, part: Part) -> str:
        return self.shade


# --------------------------------------------------------------------------- the figure


def _ellipse(x: float, y: float, rx: float, ry: float, style: str, turn: float = 0) -> str:
    spin = f' transform="rotate({turn} {x} {y})"' if turn else ""
    return f'<ellipse cx="{x}" cy="{y}" rx="{rx}" ry="{ry}" {style}{spin}/>'


def _path(d: str, style: str) -> str:
    return f'<path d="{d}" {style}/>'


def _limb(x0: float, y0: float, x1: float, y1: float, width: float, p: Paint, part: Part, color: str) -> str:
    """A round-ended limb: an outline stroke under a fill stroke."""
    d = f"M{x0} {y0}L{x1} {y1}"
    outline = _path(d, p.line("other", OUTLINE, width + 6))
    return outline + _path(d, p.line(part, color, width))


def _ears(who: Character, p: Paint) -> str:
    f = p.fill("fur", p.fur)
    inner = p.flat("other", p.light)
    both: Callable[[Callable[[int], str]], str] = lambda draw: draw(-1) + draw(1)
    if who.kind == "rabbit":
        return both(
            lambda s: _ellipse(s * 27, -196, 12, 38, f, s * 14) + _ellipse(s * 27, -194, 5.5, 27, inner, s * 14)
        )
    if who.kind == "cat":
        return both(
            lambda s: (
                _path(f"M{s * 12} -172 L{s * 46} -203 L{s * 48} -146 Z", f)
                + _path(f"M{s * 24} -170 L{s * 42} -190 L{s * 43} -158 Z", inner)
            )
        )
    if who.kind == "bear":
        return both(lambda s: _ellipse(s * 38, -171, 18, 18, f) + _ellipse(s * 38, -171, 9, 9, inner))
    if who.kind == "frog":
        return both(lambda s: _ellipse(s * 26, -172, 18, 18, f))
    if who.kind == "elephant":
        return both(lambda s: _ellipse(s * 56, -138, 27, 33, f) + _ellipse(s * 57, -137, 17, 22, inner))
    return _path("M-3 -176 Q-12 -198 2 -200 M3 -176 Q8 -196 16 -196", p.line("fur", p.dark, 6))


def _eyes(y: float, dx: float, p: Paint, r: float = 8.5) -> str:
    white, black = p.flat("other", "#ffffff"), p.flat("other", "#241a26")
    ring = p.fill("other", "#ffffff").replace('width="3"', 'width="2"')
    return "".join(
        _ellipse(s * dx, y, r, r + 1.5, ring)
        + _ellipse(s * dx + 1.5, y + 1, r * 0.58, r * 0.7, black)
        + _ellipse(s * dx + 3, y - 2, r * 0.22, r * 0.22, white)
        for s in (-1, 1)
    )


def _head(who: Character, p: Paint) -> str:
    f = p.fill("fur", p.fur)
    dark = p.flat("other", "#241a26")
    light = p.flat("other", p.light)
    smile = p.line("other", OUTLINE, 3)
    blush = "".join(_ellipse(s * 33, -117, 8, 5, p.flat("other", "#f2788a") + ' opacity=".55"') for s in (-1, 1))
    if who.kind == "elephant":
        trunk = "M0 -124 Q2 -96 16 -92 Q26 -90 28 -99"
        return (
            _ellipse(0, -134, 46, 42, f)
            + blush
            + _eyes(-140, 19, p)
            + _path(trunk, p.line("other", OUTLINE, 21))
            + _path(trunk, p.line("fur", p.fur, 15))
        )
    if who.kind == "duck":
        bill = p.fill("other", "#f6a21c" if who.fur not in ("orange", "yellow") else "#d9622b")
        return (
            _ellipse(0, -134, 44, 43, f)
            + blush
            + _eyes(-143, 18, p)
            + _path("M-27 -124 Q0 -142 27 -124 Q22 -104 0 -103 Q-22 -104 -27 -124Z", bill)
            + _path("M-24 -120 Q0 -112 24 -120", smile)
        )
    if who.kind == "frog":
        return (
            _ellipse(0, -132, 52, 38, f)
            + _eyes(-171, 26, p, 11)
            + _ellipse(0, -112, 38, 15, light)
            + _path("M-36 -122 Q0 -96 36 -122", smile)
            + blush
        )
    shape = _ellipse(0, -133, 49 if who.kind == "bear" else 47, 42, f)
    if who.kind == "bear":
        face = (
            _ellipse(0, -116, 22, 17, light)
            + _ellipse(0, -125, 9, 6.5, dark)
            + _path("M0 -119 V-111 M-9 -109 Q0 -103 9 -109", smile)
        )
    elif who.kind == "cat":
        whiskers = "M-20 -117 L-44 -122 M-20 -112 L-44 -110 M20 -117 L44 -122 M20 -112 L44 -110"
        face = (
            _ellipse(0, -114, 18, 12, light)
            + _path("M-6 -124 L6 -124 L0 -117 Z", p.flat("other", "#e2607a"))
            + _path("M0 -117 Q-8 -106 -13 -112 M0 -117 Q8 -106 13 -112", smile)
            + _path(whiskers, p.line("other", OUTLINE, 2))
        )
    else:  # rabbit
        teeth = p.fill("other", "#ffffff").replace('width="3"', 'width="2"')
        face = (
            _ellipse(0, -114, 20, 13, light)
            + f'<rect x="-6" y="-112" width="12" height="11" {teeth}/>'
            + _ellipse(0, -122, 6.5, 5, p.flat("other", "#e2607a"))
            + _path("M-13 -113 Q-6 -109 0 -114 Q6 -109 13 -113", smile)
        )
    return shape + blush + _eyes(-141, 20, p) + face


def _tail(who: Character, p: Paint) -> str:
    f = p.fill("fur", p.fur)
    if who.kind in ("rabbit", "bear"):
        return _ellipse(-34, -44, 13, 13, f)
    if who.kind == "cat":
        d = "M-20 -36 Q-58 -30 -54 -66 Q-52 -80 -62 -86"
        return _path(d, p.line("other", OUTLINE, 17)) + _path(d, p.line("fur", p.fur, 11))
    if who.kind == "duck":
        return _path("M-22 -40 L-56 -66 L-40 -32 Z", f)
    if who.kind == "elephant":
        return _path("M-24 -46 Q-48 -44 -50 -22", p.line("fur", p.dark, 6))
    return ""


def _hat(who: Character, p: Paint) -> str:
    f, trim = p.fill("hat", p.hat), p.flat("hat", p.hat_trim)
    if who.hat == "top hat":
        return (
            f'<rect x="-25" y="-226" width="50" height="54" rx="4" {f}/>'
            f'<rect x="-24" y="-189" width="48" height="10" {trim}/>' + _ellipse(0, -172, 43, 8.5, f)
        )
    if who.hat == "party hat":
        return (
            _path("M-27 -168 L0 -232 L27 -168 Q0 -158 -27 -168Z", f)
            + _path("M-19 -188 Q0 -180 19 -188 L15 -198 Q0 -190 -15 -198Z", trim)
            + _ellipse(0, -233, 9, 9, p.fill("other", "#fffaf0"))
        )
    if who.hat == "crown":
        jewels = "".join(_ellipse(x, -175, 4, 4, p.flat("other", "#fffaf0")) for x in (-20, 0, 20))
        return _path("M-36 -166 L-40 -208 L-19 -188 L0 -214 L19 -188 L40 -208 L36 -166 Q0 -158 -36 -166Z", f) + jewels
    if who.hat == "beanie":
        return (
            _path("M-42 -158 Q-42 -205 0 -206 Q42 -205 42 -158Z", f)
            + f'<rect x="-46" y="-170" width="92" height="17" rx="8" {p.fill("hat", p.hat_trim)}/>'
            + _ellipse(0, -208, 12, 12, p.fill("hat", p.hat_trim))
        )
    if who.hat == "bow":
        return "".join(
            _path(f"M0 -178 Q{s * 26} -214 {s * 42} -196 Q{s * 46} -176 {s * 38} -162 Q{s * 22} -160 0 -178Z", f)
            for s in (-1, 1)
        ) + _ellipse(0, -178, 11, 11, p.fill("hat", p.hat_trim))
    return ""


def _scarf(p: Paint) -> str:
    f = p.fill("hat", p.hat)
    return (
        _path("M12 -92 L40 -90 L44 -40 L20 -40 Z", f)
        + _path("M-44 -104 Q0 -78 44 -104 L44 -88 Q0 -62 -44 -88Z", f)
        + _path("M23 -52 H42", p.line("hat", p.hat_trim, 5))
    )


#: action -> (left hand, right hand, left foot, right foot), figure units
POSES: dict[str, tuple[tuple[float, float], ...]] = {
    "standing": ((-42, -46), (42, -46), (-15, -6), (15, -6)),
    "walking": ((-46, -62), (40, -36), (-34, -8), (34, -10)),
    "jumping": ((-58, -118), (58, -118), (-38, -22), (38, -22)),
    "waving": ((-42, -46), (66, -136), (-15, -6), (15, -6)),
    "sitting": ((-40, -44), (40, -44), (-40, -8), (40, -8)),
    "reading": ((-24, -56), (24, -56), (-15, -6), (15, -6)),
}


#: How far the body sinks (the feet stay), and how far the whole figure is lifted, figure units.
DROP = {"sitting": 22.0}
LIFT = {"jumping": 30.0}


def pose(figure: Figure) -> tuple[tuple[tuple[float, float], ...], float, float]:
    """Hands and feet as in `POSES`, how far the body sinks and how far the figure is lifted."""
    a, b, t = figure.action, figure.then or figure.action, figure.phase
    joints = tuple((x + t * (u - x), y + t * (v - y)) for (x, y), (u, v) in zip(POSES[a], POSES[b], strict=True))
    drop, lift = (of.get(a, 0) + t * (of.get(b, 0) - of.get(a, 0)) for of in (DROP, LIFT))
    return joints, drop, lift


def figure_svg(figure: Figure, paint: Paint) -> str:
    """The figure as SVG in picture coordinates."""
    who, p = figure.character, paint
    (left, right, foot_l, foot_r), drop, lift = pose(figure)
    reading = (figure.then if figure.then and figure.phase >= 0.5 else figure.action) == "reading"
    sleeves = who.clothes in ("shirt", "coat")
    legs_dressed = who.clothes == "overalls"

    def arm(side: int, hand: tuple[float, float]) -> str:
        x, y = hand
        part: Part = "clothes" if sleeves else "fur"
        sleeve = p.clothes if sleeves else p.fur
        paw = _ellipse(x, y, 10, 10, p.fill("fur", p.fur))
        return paw + _limb(side * 24, -84, x * 0.86 + side * 3, y - (y + 84) * 0.14, 15, p, part, sleeve)

    def leg(side: int, foot: tuple[float, float]) -> str:
        x, y = foot
        part: Part = "clothes" if legs_dressed else "fur"
        color = p.clothes if legs_dressed else p.fur
        shoe = _ellipse(x + side * 4, y, 16, 9, p.fill("fur", p.fur))
        return _limb(side * 14, -34 + drop, x, y - 6, 18, p, part, color) + shoe

    torso = "M-27 -90 Q-36 -50 -29 -28 Q0 -18 29 -28 Q36 -50 27 -90 Z"
    if who.clothes == "shirt":
        body = p.garment(torso)
    elif who.clothes == "dress":
        body = p.garment("M-23 -92 L-52 -22 Q0 -6 52 -22 L23 -92 Z")
    elif who.clothes == "overalls":
        strap = p.line("clothes", p.clothes, 9)
        body = (
            _path(torso, p.fill("fur", p.fur))
            + _path("M-18 -66 L-23 -92 M18 -66 L23 -92", strap)
            + p.garment("M-20 -70 H20 L21 -52 L33 -50 Q35 -30 29 -26 Q0 -14 -29 -26 Q-35 -30 -33 -50 L-21 -52 Z")
            + _ellipse(-15, -64, 3.5, 3.5, p.flat("other", "#fffaf0"))
            + _ellipse(15, -64, 3.5, 3.5, p.flat("other", "#fffaf0"))
        )
    else:  # coat
        dots = "".join(_ellipse(6, y, 4, 4, p.flat("other", "#fffaf0")) for y in (-72, -54, -36))
        body = (
            p.garment("M-29 -94 Q-40 -50 -42 -16 Q0 -6 42 -16 Q40 -50 29 -94 Z")
            + _path("M0 -90 V-12", p.line("other", OUTLINE, 3))
            + dots
            + _path("M-24 -96 L0 -78 L24 -96 L14 -100 L-14 -100Z", p.fill("other", "#fffaf0"))
        )
    book = ""
    if reading:
        book = _path("M0 -64 L-30 -74 V-44 L0 -34 L30 -44 V-74 Z M0 -64 V-34", p.fill("other", "#fff3d0"))
    over = left[1] < -80  # raised arms lie behind the head, lowered ones before the body
    arms_back = (arm(-1, left) if over else "") + (arm(1, right) if right[1] < -80 else "")
    arms_front = ("" if over else arm(-1, left)) + ("" if right[1] < -80 else arm(1, right))
    upper = (
        _tail(who, p)
        + arms_back
        + body
        + (_scarf(p) if who.hat == "scarf" and not reading else "")
        + (book + arms_front if reading else arms_front)
    )
    if who.hat == "scarf" and reading:
        upper += _path("M-44 -104 Q0 -78 44 -104 L44 -88 Q0 -62 -44 -88Z", p.fill("hat", p.hat))
    head = _ears(who, p) + _head(who, p) + _hat(who, p)
    legs = leg(-1, foot_l) + leg(1, foot_r)
    move = f"translate({figure.x:.2f} {figure.y:.2f}) scale({figure.scale * figure.facing:.4f} {figure.scale:.4f})"
    if drop:
        inner = f'<g transform="translate(0 {drop})">{upper}</g>{legs}<g transform="translate(0 {drop})">{head}</g>'
    else:
        inner = legs + upper + head
    return f'<g transform="{move}"><g transform="translate(0 {-lift})">{inner}</g></g>'


def _shadow(figure: Figure) -> str:
    return _ellipse(
        round(figure.x, 2),
        round(figure.y - 2, 2),
        round(44 * figure.scale, 2),
        round(9 * figure.scale, 2),
        'fill="#1a1030" opacity=".28"',
    )


# --------------------------------------------------------------------------- the places

SKY = {"day": ("#6cc0f0", "#d6f0fb"), "sunset": ("#f2705a", "#fcd28a"), "night": ("#141c4a", "#3a4a8c")}
TINT = {"day": 0.0, "sunset": 0.22, "night": 0.58}
TINT_COLOR = {"day": "#ffffff", "sunset": "#e8603c", "night": "#101840"}


class _Brush:
    """Colours of a place at a time of day."""

    def __init__(self, cell: Cell) -> None:
        self.time, self.weather = cell.time, cell.weather

    def __call__(self, color: str) -> str:
        if self.weather == "snow":
            color = mix(color, "#eef4ff", 0.28)
        if self.weather == "rain":
            color = mix(color, "#5a6a80", 0.25)
        return mix(color, TINT_COLOR[self.time], TINT[self.time])


def _sky(cell: Cell, rng: random.Random, w: float, h: float) -> str:
    top, low = SKY[cell.time]
    if cell.weather == "rain":
        top, low = mix(top, "#566074", 0.6), mix(low, "#7c8698", 0.6)
    elif cell.weather == "snow":
        top, low = mix(top, "#c3cede", 0.4), mix(low, "#eef3fa", 0.5)
    uid = f"sky{cell.seed}"
    sky = (
        f'<defs><linearGradient id="{uid}" x1="0" y1="0" x2="0" y2="1"><stop offset="0" stop-color="{top}"/>'
        f'<stop offset=".75" stop-color="{low}"/></linearGradient></defs><rect width="{w}" height="{h}" fill="url(#{uid})"/>'
    )
    side = rng.choice((0.17, 0.83)) * w
    if cell.weather == "clear":
        if cell.time == "day":
            sky += _ellipse(side, 40, 21, 21, 'fill="#ffe25c"')
        elif cell.time == "sunset":
            sky += _ellipse(side, 96, 26, 26, 'fill="#fff0a0"')
        else:
            sky += _ellipse(side, 42, 19, 19, 'fill="#fbf3c8"') + _ellipse(side + 9, 36, 16, 16, f'fill="{top}"')
    if cell.time == "night" and cell.weather != "rain":
        stars = random.Random("stars")  # one sky of stars, one shower: a place is as often seen as it can be
        for _ in range(14):
            sky += _ellipse(round(stars.uniform(0, SIZE)), round(stars.uniform(4, 110)), 1.7, 1.7, 'fill="#fff8d8"')
    cloud = {"clear": "#ffffff", "rain": "#6d7688", "snow": "#e4ebf4"}[cell.weather]
    cloud = mix(cloud, TINT_COLOR[cell.time], TINT[cell.time] * 0.7)
    spots = {"clear": 2, "rain": 5, "snow": 3}[cell.weather]
    if cell.time == "night" and cell.weather == "clear":
        spots = 0
    for i in range(spots):
        x, y = (i + rng.uniform(0.2, 0.8)) * w / spots, rng.uniform(18, 50)
        r = rng.uniform(13, 19) * (1.25 if cell.weather == "rain" else 1)
        sky += "".join(
            _ellipse(
                round(x + dx * r, 1), round(y + dy * r, 1), round(r * k, 1), round(r * k * 0.72, 1), f'fill="{cloud}"'
            )
            for dx, dy, k in ((-1, 0.15, 0.8), (0, -0.2, 1.0), (1, 0.15, 0.85))
        )
    return sky


def _hill(y: float, bump: float, w: float, h: float, color: str) -> str:
    return _path(f"M0 {h} V{y} Q{w * 0.25} {y - bump} {w * 0.5} {y} T{w} {y} V{h}Z", f'fill="{color}"')


def _ground(y: float, w: float, h: float, color: str) -> str:
    return f'<rect y="{y}" width="{w}" height="{h - y}" fill="{color}"/>'


def _outdoors(cell: Cell, rng: random.Random, w: float, h: float) -> str:
    x: float
    top: float
    r: float
    k: float
    c = _Brush(cell)
    g = h * 0.68  # the horizon
    snowy = cell.weather == "snow"
    jitter = lambda a: rng.uniform(-a, a)
    out = ""
    if cell.place == "forest":
        out = _hill(g - 6, 16, w, h, c("#2f7a48"))
        n = max(3, round(w / 46))
        for i in range(n):
            x, t = (i + 0.5) * w / n + jitter(8), g + rng.uniform(-2, 14)
            leaf = c(mix("#1f6b3c", "#3b9a4c", rng.random()))
            out += f'<rect x="{x - 6:.0f}" y="{t - 40:.0f}" width="12" height="44" fill="{c("#6e4528")}"/>'
            for k, r in ((0, 30), (24, 25), (46, 18)):
                out += _path(
                    f"M{x - r:.0f} {t - 32 - k:.0f} L{x:.0f} {t - 86 - k:.0f} L{x + r:.0f} {t - 32 - k:.0f}Z",
                    f'fill="{leaf}"',
                )
        out += _ground(g + 12, w, h, c("#4f9a4a"))
    elif cell.place == "beach":
        out = f'<rect y="{g - 44}" width="{w}" height="70" fill="{c("#2396c4")}"/>'
        for i in range(3):
            out += _path(
                f"M0 {g - 32 + i * 15} " + "q10 -6 20 0 t20 0 " * 8,
                f'fill="none" stroke="{c("#9fe0ee")}" stroke-width="3"',
            )
        out += _path(f"M0 {h} V{g + 6} Q{w / 2} {g + 20} {w} {g + 2} V{h}Z", f'fill="{c("#f4d58c")}"')
        x = rng.choice((0.12, 0.88)) * w
        out += _path(
            f"M{x} {g + 24} Q{x + 8} {g - 40} {x - 2} {g - 84}", f'fill="none" stroke="{c("#8a5a32")}" stroke-width="9"'
        )
        for dx, dy in ((-40, 8), (-26, -22), (14, -28), (40, 2)):
            out += _path(
                f"M{x - 2} {g - 84} Q{x + dx * 0.5} {g - 100 + dy * 0.4} {x + dx} {g - 78 + dy}",
                f'fill="none" stroke="{c("#2f9a50")}" stroke-width="9" stroke-linecap="round"',
            )
    elif cell.place == "city":
        n = max(3, round(w / 42))
        lit = "#ffe27a" if cell.time != "day" else "#cfe6f5"
        for i in range(n):
            x, top = i * w / n, g - rng.uniform(60, 120)
            out += f'<rect x="{x:.0f}" y="{top:.0f}" width="{w / n - 3:.0f}" height="{h}" fill="{c(rng.choice(("#8d93a8", "#a4796c", "#6f86a6", "#b09a7a")))}"/>'
            for wy in range(int(top) + 9, int(g) - 4, 19):
                for wx in (0.18, 0.58):
                    out += (
                        f'<rect x="{x + wx * w / n:.0f}" y="{wy}" width="{w / n * 0.22:.0f}" height="10" fill="{lit}"/>'
                    )
        out += _ground(g, w, h, c("#b8b6b8")) + _ground(g + 16, w, h, c("#5e6068"))
        out += _path(f"M0 {g + 46} H{w}", 'fill="none" stroke="#e8e0c8" stroke-width="4" stroke-dasharray="20 16"')
    elif cell.place == "mountains":
        for x, top, r in ((0.2, 100, 0.42), (0.8, 86, 0.45), (0.5, 128, 0.42)):
            x, top, r = (x + jitter(0.05)) * w, g - top - jitter(8), r * w
            out += _path(f"M{x - r:.0f} {g + 8} L{x:.0f} {top:.0f} L{x + r:.0f} {g + 8}Z", f'fill="{c("#76809a")}"')
            k = 0.3
            out += _path(
                f"M{x - r * k:.0f} {top + (g + 8 - top) * k:.0f} L{x:.0f} {top:.0f} L{x + r * k:.0f} {top + (g + 8 - top) * k:.0f} "
                f"L{x + r * 0.12:.0f} {top + (g - top) * 0.24:.0f} L{x:.0f} {top + (g - top) * 0.34:.0f} L{x - r * 0.12:.0f} {top + (g - top) * 0.24:.0f}Z",
                f'fill="{c("#f6f8fc")}"',
            )
        out += _hill(g + 8, 10, w, h, c("#6a9a58"))
    elif cell.place == "desert":
        out = _hill(g - 14, 30, w, h, c("#eab765")) + _hill(g + 12, -14, w, h, c("#f2cb80"))
        for fx in (rng.uniform(0.06, 0.2), rng.uniform(0.8, 0.94)):
            x, y = fx * w, g + 14 + jitter(5)
            d = f"M{x:.0f} {y:.0f} V{y - 62:.0f} M{x:.0f} {y - 22:.0f} H{x - 16:.0f} V{y - 42:.0f} M{x:.0f} {y - 32:.0f} H{x + 16:.0f} V{y - 54:.0f}"
            out += _path(
                d,
                f'fill="none" stroke="{c("#3d8a52")}" stroke-width="11" stroke-linecap="round" stroke-linejoin="round"',
            )
    elif cell.place == "meadow":
        out = _hill(g - 8, 34, w, h, c("#7cc25c")) + _hill(g + 12, -18, w, h, c("#96d468"))
        for _ in range(26):
            x, y = rng.uniform(4, w - 4), rng.uniform(g + 18, h - 6)
            out += _ellipse(
                round(x), round(y), 4.2, 4.2, f'fill="{c(rng.choice(("#ff6fa0", "#ffffff", "#ffd83c", "#c080f0")))}"'
            ) + _ellipse(round(x), round(y), 1.6, 1.6, f'fill="{c("#e09020")}"')
    elif cell.place == "castle":
        out = _hill(g, 14, w, h, c("#7fae5e"))
        x, k = w / 2 + jitter(0.04 * w), w / 256
        stone, roof = c("#a9a4b4"), c("#b0405a")
        for dx, top in ((-84, 96), (84, 96), (-44, 62), (44, 62)):
            tx = x + dx * k
            out += f'<rect x="{tx - 17 * k:.0f}" y="{g - top:.0f}" width="{34 * k:.0f}" height="{top + 14}" fill="{stone}" stroke="{c("#7d788a")}" stroke-width="2"/>'
            if abs(dx) == 84:
                out += _path(
                    f"M{tx - 24 * k:.0f} {g - top:.0f} L{tx:.0f} {g - top - 46:.0f} L{tx + 24 * k:.0f} {g - top:.0f}Z",
                    f'fill="{roof}"',
                )
        out += f'<rect x="{x - 40 * k:.0f}" y="{g - 82:.0f}" width="{80 * k:.0f}" height="98" fill="{stone}" stroke="{c("#7d788a")}" stroke-width="2"/>'
        out += _path(
            f"M{x - 14 * k:.0f} {g + 16} V{g - 24} Q{x:.0f} {g - 52} {x + 14 * k:.0f} {g - 24} V{g + 16}Z",
            f'fill="{c("#5a4038")}"',
        )
        out += _path(
            f"M{x:.0f} {g - 82:.0f} V{g - 128:.0f} L{x + 28 * k:.0f} {g - 117:.0f} L{x:.0f} {g - 106:.0f}",
            f'fill="{roof}" stroke="{c("#5a4038")}" stroke-width="3"',
        )
        out += _ground(g + 14, w, h, c("#8cbc66"))
    else:  # farm
        out = _hill(g - 6, 18, w, h, c("#a4c45a"))
        x, k = rng.choice((0.26, 0.74)) * w, w / 256
        out += f'<rect x="{x - 44 * k:.0f}" y="{g - 62}" width="{88 * k:.0f}" height="70" fill="{c("#c23b30")}"/>'
        out += _path(
            f"M{x - 54 * k:.0f} {g - 60} L{x - 34 * k:.0f} {g - 100} H{x + 34 * k:.0f} L{x + 54 * k:.0f} {g - 60}Z",
            f'fill="{c("#7d4436")}"',
        )
        out += f'<rect x="{x - 18 * k:.0f}" y="{g - 36}" width="{36 * k:.0f}" height="44" fill="{c("#fff3e0")}"/>'
        out += _path(
            f"M{x - 18 * k:.0f} {g - 36} l{36 * k:.0f} 44 M{x + 18 * k:.0f} {g - 36} l{-36 * k:.0f} 44",
            f'fill="none" stroke="{c("#c23b30")}" stroke-width="4"',
        )
        out += _ground(g + 6, w, h, c("#cfb35e"))
        for i in range(round(w / 26) + 1):
            out += f'<rect x="{i * 26}" y="{g - 8}" width="8" height="36" fill="{c("#f4ead2")}"/>'
        out += f'<rect y="{g}" width="{w}" height="7" fill="{c("#f4ead2")}"/><rect y="{g + 14}" width="{w}" height="7" fill="{c("#f4ead2")}"/>'
    if snowy:
        out += _path(f"M0 {h} V{g + 26} Q{w / 2} {g + 14} {w} {g + 28} V{h}Z", f'fill="{c("#f4f8ff")}" opacity=".85"')
    return out


def _indoors(cell: Cell, rng: random.Random, w: float, h: float) -> str:
    c = _Brush(dataclasses.replace(cell, weather="clear"))
    g, k = h * 0.72, w / 256
    top, low = SKY[cell.time]
    glow = {"day": "#fffbe8", "sunset": "#fff0a0", "night": "#fbf3c8"}[cell.time]
    left = rng.random() < 0.5
    wx = (0.2 if left else 0.8) * w
    window = (
        f'<rect x="{wx - 30 * k:.0f}" y="34" width="{60 * k:.0f}" height="66" fill="{mix(top, low, 0.4)}" stroke="{c("#fff6e4")}" stroke-width="7"/>'
        + _ellipse(round(wx + 10 * k), 56, round(9 * k), round(9 * k), f'fill="{glow}"')
        + _path(
            f"M{wx:.0f} 34 v66 M{wx - 30 * k:.0f} 67 h{60 * k:.0f}",
            f'fill="none" stroke="{c("#fff6e4")}" stroke-width="5"',
        )
    )
    if cell.place == "bedroom":
        out = f'<rect width="{w}" height="{h}" fill="{c("#f2b8b4")}"/>' + "".join(
            f'<rect x="{x}" width="9" height="{g:.0f}" fill="{c("#f7cbc6")}"/>' for x in range(6, int(w), 26)
        )
        out += (
            window
            + _ground(g, w, h, c("#b98252"))
            + f'<rect y="{g - 7:.0f}" width="{w}" height="9" fill="{c("#fff2e2")}"/>'
        )
        bx = 0.74 * w if left else 0.26 * w
        out += f'<rect x="{bx - 62 * k:.0f}" y="{g - 62:.0f}" width="12" height="84" fill="{c("#8a5a3a")}"/>'
        out += f'<rect x="{bx - 56 * k:.0f}" y="{g - 26:.0f}" width="{116 * k:.0f}" height="36" rx="8" fill="{c("#5f9ad0")}"/>'
        out += f'<rect x="{bx - 52 * k:.0f}" y="{g - 38:.0f}" width="{34 * k:.0f}" height="20" rx="8" fill="{c("#ffffff")}"/>'
    else:
        out = f'<rect width="{w}" height="{h}" fill="{c("#8c5e3c")}"/>'
        for row in range(4):
            y = 14 + row * 44
            out += f'<rect y="{y}" width="{w}" height="36" fill="{c("#5a3a26")}"/>'
            x = 3.0
            while x < w:
                bw = rng.uniform(8, 15)
                bh = rng.uniform(24, 33)
                out += f'<rect x="{x:.0f}" y="{y + 36 - bh:.0f}" width="{bw:.0f}" height="{bh:.0f}" fill="{c(rng.choice(("#b8443c", "#3c6ca8", "#d8a83c", "#4c8c58", "#8a5ca0")))}"/>'
                x += bw + 1.5
        out += (
            window
            + _ground(g, w, h, c("#7a3f46"))
            + f'<rect y="{g:.0f}" width="{w}" height="6" fill="{c("#4a2c20")}"/>'
        )
    return out


def _weather(cell: Cell) -> str:
    if cell.place in INDOORS or cell.weather == "clear":
        return ""
    rng = random.Random(cell.weather)
    if cell.weather == "rain":
        d = "".join(f"M{rng.uniform(0, SIZE):.0f} {rng.uniform(0, SIZE):.0f}l-6 20" for _ in range(40))
        return _path(d, 'fill="none" stroke="#dcecfa" stroke-width="2.4" opacity=".75" stroke-linecap="round"')
    return "".join(
        _ellipse(round(rng.uniform(0, SIZE)), round(rng.uniform(0, SIZE)), 4, 4, 'fill="#ffffff"') for _ in range(40)
    )


def cell_svg(cell: Cell, w: float, h: float, layout: str = "single") -> str:
    """A cell drawn on a canvas of w x h pixels."""
    rng = random.Random(cell.seed % STAGINGS)
    if layout == "sheet":
        out = f'<rect width="{w}" height="{h}" fill="#fbf7ec"/>' + _path(
            f"M0 216 H{w}", 'fill="none" stroke="#d8cfb8" stroke-width="3"'
        )
    elif cell.place in INDOORS:
        out = _indoors(cell, rng, w, h)
    else:
        out = _sky(cell, rng, w, h) + _outdoors(cell, rng, w, h)
    if layout == "mirror":
        out += (
            '<rect x="134" y="26" width="108" height="222" rx="14" fill="#cfe2ec" stroke="#c89a3c" stroke-width="9"/>'
            '<path d="M150 90 L190 40 M152 120 L222 40" stroke="#ffffff" stroke-width="6" opacity=".6"/>'
        )
    if layout != "sheet":  # behind the figures: they stay readable
        out += _weather(cell)
    defs = ""
    for i, figure in enumerate(cell.figures):
        paint = Paint(figure.character, f"p{cell.seed}_{i}")
        defs += paint.defs
        out += _shadow(figure) + figure_svg(figure, paint)
    return f"<defs>{defs}</defs>{out}"


def _document(body: str, size: int, view: View = WHOLE) -> str:
    side = SIZE / view.zoom
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size}" height="{size}" '
        f'viewBox="{view.left:.3f} {view.top:.3f} {side:.3f} {side:.3f}">{body}</svg>'
    )


def svg(scene: Scene, size: int = SIZE, view: View = WHOLE) -> str:
    """The scene as an SVG document of `size` pixels a side."""
    if len(scene.cells) == 1:
        return _document(cell_svg(scene.cells[0], SIZE, SIZE, scene.layout), size, view)
    columns, rows = 2, math.ceil(len(scene.cells) / 2)
    w, h = SIZE / columns, SIZE / rows
    body = f'<rect width="{SIZE}" height="{SIZE}" fill="#fffdf6"/>'
    return _document(body + _grid([cell_svg(cell, w, h) for cell in scene.cells], w, h), size, view)


def _grid(cells: Sequence[str], w: float, h: float) -> str:
    """The cells of a comic strip, two in a row, gutters between them."""
    return "".join(
        f'<svg x="{i % 2 * w + 2}" y="{i // 2 * h + 2}" width="{w - 4}" height="{h - 4}" '
        f'viewBox="2 2 {w - 4} {h - 4}">{cell}</svg>'
        for i, cell in enumerate(cells)
    )


def rasterize(document: str) -> NDArray[np.uint8]:
    """An SVG document drawn by resvg: (height, width, 3) RGB."""
    png = resvg_py.svg_to_bytes(svg_string=document, skip_system_fonts=True)
    bgr = cv2.imdecode(np.frombuffer(bytes(png), np.uint8), cv2.IMREAD_COLOR)
    assert bgr is not None
    return np.ascontiguousarray(bgr[..., ::-1])


def draw(scene: Scene, size: int = SIZE, view: View = WHOLE) -> NDArray[np.uint8]:
    """The scene as pixels: (size, size, 3) RGB."""
    return rasterize(svg(scene, size, view))


def figures(scene: Scene) -> list[tuple[Figure, float, float]]:
    """All figures of a picture, in the order they are drawn, with their cell's left and top edges."""
    columns, rows = (1, 1) if len(scene.cells) == 1 else (2, math.ceil(len(scene.cells) / 2))
    return [
        (figure, i % columns * SIZE / columns, i // columns * SIZE / rows)
        for i, cell in enumerate(scene.cells)
        for figure in cell.figures
    ]


def silhouettes(scene: Scene, size: int = SIZE, view: View = WHOLE) -> NDArray[np.uint8]:
    """Who is seen where: (size, size), 0 for the scenery, n for the nth of `figures(scene)`."""
    step, n, cells = 20, 0, []
    for cell in scene.cells:
        body = ""
        for figure in cell.figures:
            n += 1
            body += figure_svg(figure, SilhouettePaint(figure.character, step * n))
        cells.append(body)
    drawn = cells[0] if len(cells) == 1 else _grid(cells, SIZE / 2, SIZE / math.ceil(len(cells) / 2))
    background = f'<rect width="{SIZE}" height="{SIZE}" fill="#000000"/>'
    shades = rasterize(_document(f'{background}<g shape-rendering="crispEdges">{drawn}</g>', size, view))[..., 0]
    return np.asarray(shades // step, np.uint8)


def part_mask(scene: Scene, part: Part, size: int = SIZE) -> NDArray[np.bool_]:
    """Where `part` of the first figure of a one-cell scene is seen: (size, size) bool."""
    figure = scene.cells[0].figures[0]
    body = f'<rect width="{SIZE}" height="{SIZE}" fill="#000000"/>'
    body += figure_svg(figure, MaskPaint(figure.character, "mask", part))
    mask: NDArray[np.bool_] = rasterize(_document(body, size))[..., 0] > 127
    return mask
