"""What an autoencoder loses of the given pictures, carried along to the frames between.

A frame decoded from latents is as sharp as the decoder draws; the panels are as sharp as they were painted.
Where a decoded frame shows what the decoded panels show, the panels' own pixels belong: in the same place, or
somewhere else, which optical flow between the decodings tells (DIS, Kroeger et al. 2016); as they are, or as a mixture
of both in other light (a local linear model, as in the guided filter, He et al. 2010), while one place becomes another
or night falls. Whether it does show that, is how well the decodings agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from storydiffusion.motion.camera import Floats, grid, inside, warp
from storydiffusion.references import Picture

#: How far two decodings may differ and still show the same, 8-bit levels, after a blur of this many pixels.
TOLERANCE, BLUR = 26.0, 2.5
#: The mixture is the same over about so many pixels, is fitted on pictures so many times smaller, and is the one that
#: the time suggests unless the pictures speak against it as loud as this variance (8-bit levels squared).
REACH, SMALLER, DOUBT = 20.0, 4, 200.0
#: Light that is off from that on most of the picture by more levels than this is something else's colour.
TINT = 90.0
#: It is fitted so often, each time without what it does not explain by about so many levels.
ROUNDS, OUTLIER = 3, 25.0


@dataclass(frozen=True)
class Given:
    """A picture that is given, and what the autoencoder makes of it; both (height, width, 3)."""

    picture: Picture
    decoded: Picture


def _flow(a: Picture, b: Picture) -> Floats:
    """Where in `b` each pixel of `a` is: (height, width, 2), pixels x and y."""
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    gray = [cv2.cvtColor(one, cv2.COLOR_RGB2GRAY) for one in (a, b)]
    flow = np.asarray(dis.calc(gray[0], gray[1], None), np.float32)  # type: ignore[call-overload]
    return grid(a.shape) + flow


def _agreement(a: Floats, b: Floats) -> Floats:
    """0 to 1 where two pictures show the same: (height, width)."""
    off = cv2.GaussianBlur(np.abs(a - b).max(-1), (0, 0), BLUR)
    return np.asarray(np.exp(-np.square(off / TOLERANCE)), np.float32)


def _alike(a: Floats, b: Floats) -> float:
    """How far two pictures have the same shapes in them, 0 to 1, whatever the light: the correlation of what is
    smaller than `REACH`."""
    fine = [one - cv2.GaussianBlur(one, (0, 0), REACH) for one in (a, b)]
    energy = float(np.sqrt(np.square(fine[0]).mean() * np.square(fine[1]).mean()))
    # half of it is enough: a decoder draws many shapes of its own
    return float(np.clip(2 * (fine[0] * fine[1]).mean() / (energy + 1.0), 0, 1))


def _mixture(frame: Floats, shown: Sequence[Floats], sights: Sequence[Floats], prior: Sequence[float]) -> list[Floats]:
    """How a frame is locally mixed from pictures: frame ~ sum of share_i * shown_i + light.

    Args:
        frame, shown: (height, width, 3).
        sights: 1 where a picture has something to show, (height, width).
        prior: the shares where nothing speaks against them.

    Returns:
        The shares, (height, width, 1) each, then the light, (height, width, 3).
    """
    height, width = frame.shape[:2]
    size = max(1, width // SMALLER), max(1, height // SMALLER)
    y, *xs = (cv2.resize(one, size, interpolation=cv2.INTER_AREA) for one in (frame, *shown))
    sight = np.minimum.reduce([cv2.resize(one, size, interpolation=cv2.INTER_AREA) for one in sights])

    def around(values: Floats) -> Floats:
        return np.asarray(cv2.GaussianBlur(values, (0, 0), REACH / SMALLER, borderType=cv2.BORDER_REFLECT), np.float32)

    count, trust = len(xs), sight
    shares = np.empty(0)
    light = np.empty(0, np.float32)
    for _ in range(ROUNDS):
        weight = np.maximum(trust, 1e-3)[..., None].astype(np.float32)
        total = around(weight)[..., None] + 1e-6

        def mean(values: Floats, weight: Floats = weight, total: Floats = total) -> Floats:
            return np.asarray(around(values * weight) / total, np.float32)

        middles, middle = [mean(x) for x in xs], mean(y)
        squares = np.zeros((*y.shape[:2], count, count))
        products = np.zeros((*y.shape[:2], count, 1))
        for i in range(count):
            products[..., i, 0] = (mean(xs[i] * y) - middles[i] * middle).mean(-1) + DOUBT * prior[i]
            for j in range(count):
                squares[..., i, j] = (mean(xs[i] * xs[j]) - middles[i] * middles[j]).mean(-1) + DOUBT * (i == j)
        shares = np.clip(np.linalg.solve(squares, products)[..., 0], -0.2, 1.3).astype(np.float32)
        light = middle - sum(shares[..., i : i + 1] * middles[i] for i in range(count))
        made = light + sum(shares[..., i : i + 1] * xs[i] for i in range(count))
        trust = sight * np.exp(-np.square(np.abs(y - made).max(-1) / OUTLIER))
    full = [cv2.resize(shares[..., i], (width, height))[..., None] for i in range(count)]
    return [*full, cv2.resize(light, (width, height))]


def carried(frame: Picture, time: float, given: Sequence[tuple[float, Given]]) -> Picture:
    """A decoded frame with the given pictures' own pixels where it shows what they show.

    Args:
        frame: (height, width, 3), decoded.
        time: of the frame.
        given: pictures with their times; nearer ones count more.
    """
    plain = frame.astype(np.float32)
    near = np.array([1 / (0.02 + abs(when - time)) for when, _ in given])
    out, left = np.zeros_like(plain), np.ones(plain.shape[:2], np.float32)
    # what stands still is found without flow, which bends near what moves; flow is for the rest
    for moving in (False, True):
        places = [_flow(frame, one.decoded) if moving else grid(frame.shape) for _, one in given]
        shown = [warp(one.decoded, where) for (_, one), where in zip(given, places, strict=True)]
        own = [warp(one.picture, where) for (_, one), where in zip(given, places, strict=True)]
        sights = [inside(where) for where in places]
        offers = [
            (_agreement(plain, one) * sight, pixels, weight)
            for one, sight, pixels, weight in zip(shown, sights, own, near, strict=True)
        ]
        *shares, light = _mixture(plain, shown, sights, list(near / near.sum()))

        def mixed(pictures: Sequence[Floats], shares: Sequence[Floats] = shares, light: Floats = light) -> Floats:
            return light + sum(share * one for share, one in zip(shares, pictures, strict=True))

        off = np.abs(light - np.median(light, (0, 1))).max(-1)
        likely = np.exp(-np.square(off / TINT)) * np.minimum.reduce(sights) * _alike(plain, mixed(shown))
        offers.append((_agreement(plain, mixed(shown)) * likely, mixed(own), 1.0))
        total, sums = np.full(plain.shape[:2], 1e-6, np.float32), np.zeros_like(plain)
        for sure, pixels, weight in offers:
            share = np.float32(weight) * sure**2
            total += share
            sums += share[..., None] * pixels
        taken = left * np.maximum.reduce([sure for sure, _, _ in offers])
        out += (taken / total)[..., None] * sums
        left = left - taken
    out += left[..., None] * plain
    return np.asarray(np.clip(np.rint(out), 0, 255), np.uint8)
