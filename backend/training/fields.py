"""What a picture shows, as maps on the latent grid: the half of the latent code that is not colour.

A small model learns colours of whole figures in minutes and shapes of hats in days: what is constant
over many tokens shows through any noise, a contour does not. So the latent code says what is drawn
the way it says colours: every patch of a figure carries who it is (kind, hat, clothes, pattern,
action, colours, which way it faces) as a constant codeword, and where on the figure it lies as a
linear ramp; every patch says where and in what light the scene plays. The autoencoder's encoder
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


def _layout() -> dict[str, slice]:
    slices, start = {}, 0
    sizes = {name: words.shape[1] for name, words in (FIGURE_WORDS | SCENE_WORDS).items()}
    for name, size in (sizes | {"facing": 1, "u": 1, "v": 1, "figure": 1}).items():
        slices[name] = slice(start, start + size)
        start += size
    return slices


#: Where each field lies among the channels.
SLICES = _layout()
CHANNELS = max(part.stop for part in SLICES.values())


def owners(scene: world.Scene) -> NDArray[np.int64]:
    """Whose each patch is: (GRID, GRID), 0 for the scenery, n for the nth of `world.figures`."""
    fine = 4
    seen = world.silhouettes(scene, GRID * fine).reshape(GRID, fine, GRID, fine)
    count = len(world.figures(scene))
    shares = np.stack([(seen == n).mean((1, 3)) for n in range(1, count + 1)])
    return np.where(shares.max(0) >= LEAST_SHARE, shares.argmax(0) + 1, 0)


def draw(scene: world.Scene) -> Array:
    """The fields of a scene: (CHANNELS, GRID, GRID)."""
    out = np.zeros((CHANNELS, GRID, GRID), np.float32)
    out[SLICES["figure"]] = -1
    columns, rows = (1, 1) if len(scene.cells) == 1 else (2, -(-len(scene.cells) // 2))
    if scene.layout != "sheet":
        for i, cell in enumerate(scene.cells):
            top, left = i // columns * GRID // rows, i % columns * GRID // columns
            window = out[:, top : top + GRID // rows, left : left + GRID // columns]
            for name, words in SCENE_WORDS.items():
                if name != "weather" or cell.place not in world.INDOORS:
                    word: Array = words[world.ATTRIBUTES[name].index(getattr(cell, name))]
                    window[SLICES[name]] = word[:, None, None]
    seen = owners(scene)
    y, x = np.mgrid[0:GRID, 0:GRID] * PATCH + PATCH / 2
    for n, (figure, x0, y0) in enumerate(world.figures(scene), 1):
        here = seen == n
        traits = vars(figure.character) | {"action": figure.action}
        for name, words in FIGURE_WORDS.items():
            if name != "hat_color" or figure.character.hat != "none":
                word = words[world.ATTRIBUTES[name].index(traits[name])]
                out[SLICES[name], here] = word[:, None]
        out[SLICES["facing"], here] = figure.facing
        out[SLICES["u"], here] = ((x - x0 - figure.x) / (60 * figure.scale))[here]
        out[SLICES["v"], here] = ((y - y0 - figure.y) / (120 * figure.scale) + 1)[here]
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
