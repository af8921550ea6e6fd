"""What a camera's move alone explains.

Where the second picture is the first one seen from elsewhere, nothing between them has to be invented: the frames
are both pictures, panned and zoomed to where the camera is by then, as sharp as they were painted.

The move is found by matched features (SIFT, Lowe 2004) and a similarity fitted to them by RANSAC, which may hardly
turn; it counts only where it explains the pictures much better than standing still does, and where the two show all
that lies between. Somebody who walks past a camera that stands is no camera move, whatever the features on them say.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from storydiffusion.references import Picture

Floats = NDArray[np.float32]

#: Features that have to agree on a move; by how much of the picture's side the two views have to differ, and of its
#: area to overlap; how much of that may be otherwise than the move says, and how much less than standing still.
MATCHES, LEAST, OVERLAP, UNEXPLAINED, BETTER = 5, 0.02, 0.2, 0.035, 0.25
#: Pixels that differ by more than this (8-bit levels, both blurred by so many pixels: one may be a magnified view)
#: show something else.
TOLERANCE, BLUR = 16.0, 1.5
#: Radians; a camera that rolls is none that is known here. Pixels over which one picture fades into the other. How much
#: of the view half way has to be in one of the pictures.
MOST_TURN, SEAM, SHOWN = 0.02, 6.0, 0.99
#: Features a picture gives at most, and how much better than the second best a match has to be (Lowe's ratio test).
FEATURES, RATIO = 800, 0.8


def grid(shape: tuple[int, ...]) -> Floats:
    """Where each pixel of a picture is: (height, width, 2), x and y."""
    rows, columns = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    return np.stack([columns, rows], -1)


def warp(picture: Picture | Floats, places: Floats) -> Floats:
    """A picture's pixels at `places` (height, width, 2); what lies beyond it are its edges."""
    warped = cv2.remap(picture, places, None, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)  # type: ignore[call-overload]
    return np.asarray(warped, np.float32)


def inside(places: Floats) -> Floats:
    """1 where `places` are in the picture, 0 beyond: (height, width)."""
    height, width = places.shape[:2]
    x, y = places[..., 0], places[..., 1]
    return np.asarray((x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5), np.float32)


def way_of(zoom: float, progress: float) -> float:
    """How far the edges of a view have come, 0 to 1, while it gets `zoom` times nearer by the same factor every moment
    and the point that it leads to stays where it is."""
    return progress if abs(zoom - 1) < 1e-3 else (1 - zoom**-progress) / (1 - 1 / zoom)


@dataclass(frozen=True)
class Camera:
    """A move from the whole first picture to a part of it, or beyond it: its left and top edge, pixels of the first
    picture, and how many times nearer it is."""

    left: float
    top: float
    zoom: float

    def places(self, progress: float, shape: tuple[int, ...]) -> tuple[Floats, Floats]:
        """Where the pixels of the view at `progress` (0 to 1) are in the first and in the last picture.

        The zoom grows by the same factor every moment, and the point that it leads to stays where it is, as with a
        lens; without a zoom the view moves evenly."""
        edge = np.array([self.left, self.top], np.float32)
        first = grid(shape) / np.float32(self.zoom**progress) + edge * np.float32(way_of(self.zoom, progress))
        return first, (first - edge) * np.float32(self.zoom)

    def view(self, first: Picture, last: Picture, progress: float) -> Picture:
        """The frame at `progress`, (height, width, 3): both pictures where both are in sight, the nearer in time
        more."""
        places = self.places(progress, first.shape)
        total, mixed = np.zeros(first.shape[:2], np.float32), np.zeros(first.shape, np.float32)
        for picture, where, share in zip((first, last), places, (1 - progress, progress), strict=True):
            # fades out towards the picture's edges, so that they are not seen; alone, it counts up to them, and
            # where no picture shows anything, its edges go on
            sight = inside(where)
            weight = 1e-6 + sight * (1e-3 + share * np.clip(2 * cv2.GaussianBlur(sight, (0, 0), SEAM) - 1, 0, 1))
            total += weight
            mixed += weight[..., None] * warp(picture, where)
        return np.asarray(np.clip(np.rint(mixed / total[..., None]), 0, 255), np.uint8)


def camera_between(first: Picture, last: Picture) -> Camera | None:
    """The camera's move between two pictures of a size, (height, width, 3); None where there is none, or where
    more happens than that."""
    move = _matched(first, last)
    if move is None:
        return None
    height, width = first.shape[:2]
    near = max(move.zoom, 1 / move.zoom) - 1 < LEAST
    if near and abs(move.left) < LEAST * width and abs(move.top) < LEAST * height:
        return None
    places = move.places(1.0, first.shape)[0]
    sight = inside(places) > 0
    half = np.maximum(*(inside(one) for one in move.places(0.5, first.shape)))
    if sight.mean() < OVERLAP or half.mean() < SHOWN:
        return None
    moved, stood = (_otherwise(one, last)[sight].mean() for one in (warp(first, places), first.astype(np.float32)))
    return move if moved < min(UNEXPLAINED, BETTER * stood) else None


def _matched(first: Picture, last: Picture) -> Camera | None:
    """The move that the most features agree on."""
    sift = cv2.SIFT.create(FEATURES)
    found = [sift.detectAndCompute(cv2.cvtColor(one, cv2.COLOR_RGB2GRAY), None) for one in (first, last)]  # type: ignore[call-overload]
    (points, features), (others, more) = found
    if features is None or more is None or min(len(points), len(others)) < MATCHES:
        return None
    matches = [pair[0] for pair in cv2.BFMatcher().knnMatch(features, more, k=2)
               if len(pair) == 2 and pair[0].distance < RATIO * pair[1].distance]  # fmt: skip
    if len(matches) < MATCHES:
        return None
    here = np.array([points[one.queryIdx].pt for one in matches], np.float32)
    there = np.array([others[one.trainIdx].pt for one in matches], np.float32)
    matrix, agreed = cv2.estimateAffinePartial2D(there, here, ransacReprojThreshold=1.5)
    if matrix is None or agreed.sum() < MATCHES:
        return None
    scale, turn = float(np.hypot(matrix[0, 0], matrix[1, 0])), float(np.arctan2(matrix[1, 0], matrix[0, 0]))
    if abs(turn) > MOST_TURN:
        return None
    # fitted once more without the turn, which would move the edge
    inliers = agreed[:, 0] > 0
    left, top = here[inliers].mean(0) - scale * there[inliers].mean(0)
    return Camera(float(left), float(top), 1 / scale)


def _otherwise(a: Floats, b: Picture) -> NDArray[np.bool_]:
    """Where two pictures show something else: (height, width)."""
    off = cv2.GaussianBlur(a, (0, 0), BLUR) - cv2.GaussianBlur(b, (0, 0), BLUR).astype(np.float32)
    return np.asarray(np.abs(off).max(-1) > TOLERANCE)
