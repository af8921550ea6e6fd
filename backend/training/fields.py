"""What a picture shows, as maps on the latent grid: the half of the latent code that is not colour.

A small model learns colours of whole figures in minutes and shapes of hats in days: what is constant
over many tokens shows through any noise, a contour does not. So the latent code says what is drawn
the way it says colours: every patch of a figure carries who it is (kind, hat, clothes, pattern,
action, colours, which way it faces) as a constant codeword, and where on the figure it lies as a
linear ramp and as waves (a phase survives noise that would move a ramp by half a patch); every patch
says where and in what light the scene plays and which part of the scene it is. Together they are the
whole picture: it can be drawn from them. The autoencoder's encoder
learns to read these maps off pixels, its decoder to draw from them (`training.vae`), and the U-Net
has only smooth things left to make. The idea of latents that are taught what they show is that of
VA-VAE (Yao and Wang, CVPR 2025) and REPA, here with the world's own truth in place of a large
encoder's features.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from training import world

PATCH = 16
GRID = world.SIZE // PATCH
#: A patch belongs to the figure that fills most of it, if it fills at least this share.
LEAST_SHARE = 0.12

Array = NDArray[np.float32]


def _octahedron() -> Array:
    """Six words of three channels, any two at least 2.1 apart."""
    return 1.5 * np.concatenate([np.eye(3), -np.eye(3)]).astype(np.float32)


def _corners(channels: int, count: int) -> Array:
    """Corners of a cube, those with an even number of ones (which lie furthest apart) first."""
    words = sorted(itertools.product((-1.0, 1.0), repeat=channels), key=lambda word: np.prod(word) < 0)
    return np.array(words[:count], np.float32)


def _palette() -> Array:
    """RGB in [-1, 1]."""
    rows = [tuple(bytes.fromhex(shade[1:])) for shade in world.COLORS.values()]
    return np.array(rows, np.float32) / 127.5 - 1


#: attribute -> (values, channels): the codeword of each of its values, in `world.ATTRIBUTES`' order.
FIGURE_WORDS: dict[str, Array] = {
    "kind": _octahedron(),
    "clothes": _corners(2, 4),
    "pattern": 1.3 * np.array([(1, 0), (-0.5, 0.87), (-0.5, -0.87)], np.float32),
    "hat": _corners(3, 7),
    "action": _octahedron(),
    "fur": _palette(),
    "clothes_color": _palette(),
    "hat_color": _palette(),
}
SCENE_WORDS: dict[str, Array] = {
    "place": _corners(4, 10),
    "time": np.array([[1], [0], [-1]], np.float32),
    "weather": np.array([[0], [-1], [1]], np.float32),
}


#: Wave lengths: on a figure in its own units, in a scene in pixels.
FIGURE_WAVES = (72.0,)
SCENE_WAVES = (128.0, 64.0)
#: Channels that are no attribute's codeword: which way a figure faces; where on it a patch lies, from side to
#: side and from hat to feet; whether it is a figure's; the staging; whether there is a mirror; where in its
#: cell a patch lies.
PLACES_IN_PICTURE = {
    **{"facing": 1, "u": 1, "v": 1, "figure": 1},
    **{"u_waves": 2 * len(FIGURE_WAVES), "v_waves": 2 * len(FIGURE_WAVES)},
    **{"staging": 1, "mirror": 1, "x": 1, "y": 1},
    **{"x_waves": 2 * len(SCENE_WAVES), "y_waves": 2 * len(SCENE_WAVES)},
}


def _layout() -> dict[str, slice]:
    slices, start = {}, 0
    sizes = {name: words.shape[1] for name, words in (FIGURE_WORDS | SCENE_WORDS).items()}
    for name, size in (sizes | PLACES_IN_PICTURE).items():
        slices[name] = slice(start, start + size)
        start += size
    return slices


#: Where each field lies among the channels.
SLICES = _layout()
CHANNELS = max(part.stop for part in SLICES.values())


def owners(scene: world.Scene, view: world.View = world.WHOLE) -> NDArray[np.int64]:
    """Whose each patch is: (GRID, GRID), 0 for the scenery, n for the nth of `world.figures`."""
    fine = 4
    seen = world.silhouettes(scene, GRID * fine, view).reshape(GRID, fine, GRID, fine)
    count = len(world.figures(scene))
    shares = np.stack([(seen == n).mean((1, 3)) for n in range(1, count + 1)])
    return np.where(shares.max(0) >= LEAST_SHARE, shares.argmax(0) + 1, 0)


def waves(position: Array, lengths: tuple[float, ...]) -> Array:
    """Sine and cosine of `position` at each wave length: (2 * lengths, *position.shape)."""
    phases = [2 * np.pi * position / length for length in lengths]
    return np.stack([wave(phase) for phase in phases for wave in (np.sin, np.cos)]).astype(np.float32)


def _draw_cell(cell: world.Cell, layout: str, window: Array, view: world.View) -> None:
    """What the patches of one cell, (CHANNELS, rows, columns), say of their scene."""
    if layout != "sheet":
        for name, words in SCENE_WORDS.items():
            if name != "weather" or cell.place not in world.INDOORS:
                word: Array = words[world.ATTRIBUTES[name].index(getattr(cell, name))]
                window[SLICES[name]] = word[:, None, None]
        window[SLICES["staging"]] = 2 * (cell.seed % world.STAGINGS) / (world.STAGINGS - 1) - 1
    window[SLICES["mirror"]] = float(layout == "mirror")
    y, x = _places(window.shape[1], window.shape[2], view)
    for name, position in (("x", x), ("y", y)):
        extent = PATCH * window.shape[2 if name == "x" else 1]
        window[SLICES[name]] = 2 * position / extent - 1
        window[SLICES[f"{name}_waves"]] = waves(position, SCENE_WAVES)


def action_word(figure: world.Figure) -> Array:
    """The codeword of an action; on the way from one to another, the mixture the pose is."""
    words, names = FIGURE_WORDS["action"], world.ATTRIBUTES["action"]
    word: Array = words[names.index(figure.action)]
    return word + figure.phase * (words[names.index(figure.then)] - word) if figure.then else word


def _places(rows: int, columns: int, view: world.View) -> tuple[Array, Array]:
    """Where in the picture the patches' middles lie, y and x: (rows, columns) each, pixels."""
    y, x = (np.mgrid[0:rows, 0:columns].astype(np.float32) * PATCH + PATCH / 2) / view.zoom
    return y + view.top, x + view.left


def draw(scene: world.Scene, view: world.View = world.WHOLE) -> Array:
    """The fields of a scene, as far as `view` shows it: (CHANNELS, GRID, GRID)."""
    out = np.zeros((CHANNELS, GRID, GRID), np.float32)
    out[SLICES["figure"]] = -1
    columns, rows = (1, 1) if len(scene.cells) == 1 else (2, -(-len(scene.cells) // 2))
    for i, cell in enumerate(scene.cells):
        top, left = i // columns * GRID // rows, i % columns * GRID // columns
        _draw_cell(cell, scene.layout, out[:, top : top + GRID // rows, left : left + GRID // columns], view)
    seen = owners(scene, view)
    y, x = _places(GRID, GRID, view)
    for n, (figure, x0, y0) in enumerate(world.figures(scene), 1):
        here = seen == n
        traits = vars(figure.character)
        for name, words in FIGURE_WORDS.items():
            if name == "action":
                out[SLICES[name], here] = action_word(figure)[:, None]
            elif name != "hat_color" or figure.character.hat != "none":
                out[SLICES[name], here] = words[world.ATTRIBUTES[name].index(traits[name])][:, None]
        across, down = (x - x0 - figure.x)[here] / figure.scale, (y - y0 - figure.y)[here] / figure.scale
        out[SLICES["facing"], here] = figure.facing
        out[SLICES["u"], here] = across / 60
        out[SLICES["v"], here] = down / 120 + 1
        out[SLICES["u_waves"], here] = waves(across, FIGURE_WAVES)
        out[SLICES["v_waves"], here] = waves(down, FIGURE_WAVES)
        out[SLICES["figure"], here] = 1
    return out


def read(fields: Array) -> dict[str, str]:
    """What fields (CHANNELS, GRID, GRID) of one picture say of its figure and its scene: by the
    nearest codeword to the mean over the patches that are the figure's (the scenery's for the scene)."""
    mine = fields[SLICES["figure"]][0] > 0
    answer = {}
    for words_of, where in ((FIGURE_WORDS, mine), (SCENE_WORDS, ~mine)):
        where = where if where.any() else np.ones_like(where)
        for name, words in words_of.items():
            mean = np.median(fields[SLICES[name]][:, where], axis=1)
            answer[name] = world.ATTRIBUTES[name][int(np.square(words - mean).sum(1).argmin())]
    return answer
