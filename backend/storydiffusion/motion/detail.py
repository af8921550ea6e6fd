"""What an autoencoder loses of the given pictures, carried along to the frames between.

A frame decoded from latents is as sharp as the decoder draws; the panels are as sharp as they were painted.
Where a decoded frame shows what a decoded panel shows, be it somewhere else, the panel's own pixels belong.
Where from is optical flow between the two decodings (DIS, Kroeger et al. 2016), which look alike; whether, is
how well they agree once one is warped to the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from storydiffusion.references import Picture

#: How far two decodings may differ and still show the same, 8-bit levels, after a blur of this many pixels.
TOLERANCE, BLUR = 14.0, 2.5

Floats = NDArray[np.float32]


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
    rows, columns = np.mgrid[: a.shape[0], : a.shape[1]].astype(np.float32)
    return np.stack([columns + flow[..., 0], rows + flow[..., 1]], -1)


def _warp(picture: Picture, places: Floats) -> Floats:
    warped = cv2.remap(picture, places, None, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)  # type: ignore[call-overload]
    return np.asarray(warped, np.float32)


def _agreement(a: Floats, b: Floats) -> Floats:
    """0 to 1 where two pictures show the same: (height, width)."""
    off = cv2.GaussianBlur(np.abs(a - b).max(-1), (0, 0), BLUR)
    return np.asarray(np.exp(-np.square(off / TOLERANCE)), np.float32)


def carried(frame: Picture, time: float, given: Sequence[tuple[float, Given]]) -> Picture:
    """A decoded frame with the given pictures' own pixels where it shows what they show.

    Args:
        frame: (height, width, 3), decoded.
        time: of the frame.
        given: pictures with their times; nearer ones count more.
    """
    plain = frame.astype(np.float32)
    rows, columns = np.mgrid[: frame.shape[0], : frame.shape[1]].astype(np.float32)
    here = np.stack([columns, rows], -1)
    out, sums = np.zeros(frame.shape, np.float32), np.full(frame.shape[:2], 1e-6, np.float32)
    still = most = np.zeros(frame.shape[:2], np.float32)
    # what stands still is found without flow, which bends near what moves; flow is for the rest
    for moving in (False, True):
        for when, one in given:
            places = _flow(frame, one.decoded) if moving else here
            sure = _agreement(plain, _warp(one.decoded, places)) * (1 - still if moving else 1)
            weight = sure**2 / (0.02 + abs(when - time))
            out += weight[..., None] * _warp(one.picture, places)
            sums += weight
            most = np.maximum(most, sure)
        still = most
    mixed = plain + most[..., None] * (out / sums[..., None] - plain)
    return np.asarray(np.clip(np.rint(mixed), 0, 255), np.uint8)
