"""What a camera's move alone explains is made from the pictures themselves; what it does not, is left alone."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from storydiffusion.motion.camera import Camera, camera_between
from storydiffusion.motion.transition import Stretch, between
from storydiffusion.references import Picture
from storydiffusion.run import Settings
from storydiffusion.sampling import Progress
from tiny import tiny_motion, tiny_sd15

SIDE = 256


def wall(width: int = 640, height: int = 400) -> Picture:
    """A wall of many unlike shapes."""
    rng = np.random.default_rng(3)
    drawn = np.full((height, width, 3), (180, 200, 210), np.uint8)
    for _ in range(90):
        colour = tuple(int(c) for c in rng.integers(30, 230, 3))
        x, y, size = (int(v) for v in (rng.integers(0, width), rng.integers(0, height), rng.integers(8, 40)))
        if rng.random() < 0.5:
            cv2.rectangle(drawn, (x, y), (x + size, y + size // 2), colour, -1, cv2.LINE_AA)
        else:
            cv2.circle(drawn, (x, y), size // 2, colour, -1, cv2.LINE_AA)
    return drawn


def seen(left: float, top: float, zoom: float = 1.0) -> Picture:
    """What a camera sees of the wall."""
    size = round(SIDE / zoom)
    part = wall()[round(top) : round(top) + size, round(left) : round(left) + size]
    return np.asarray(cv2.resize(part, (SIDE, SIDE), interpolation=cv2.INTER_AREA if zoom < 1 else cv2.INTER_CUBIC))


def error(a: Picture, b: Picture) -> float:
    return float(np.abs(a.astype(float) - b).mean())


@pytest.mark.parametrize(
    ("first", "last"),
    [
        ((20, 40, 1), (140, 40, 1)),
        ((200, 60, 1), (90, 20, 1)),
        ((40, 40, 1), (90, 80, 1.6)),
        ((90, 80, 1.6), (40, 40, 1)),
    ],
    ids=["right", "left and up", "nearer", "away"],
)
def test_a_pan_and_a_zoom_are_found_and_filmed(first: tuple[float, ...], last: tuple[float, ...]) -> None:
    start, end = seen(*first), seen(*last)
    camera = camera_between(start, end)
    assert camera is not None
    half = [a + 0.5 * (b - a) for a, b in zip(first[:2], last[:2], strict=True)]
    truth = seen(half[0], half[1], (first[2] * last[2]) ** 0.5)
    made = camera.view(start, end, 0.5)
    assert error(made, truth) < 0.2 * min(error(start, truth), error(end, truth))
    assert error(camera.view(start, end, 0.0), start) < 1
    assert error(camera.view(start, end, 1.0), end) < 2.5


def test_edges_move_evenly_and_the_zoom_by_the_same_factor() -> None:
    places = Camera(40, 20, 4.0).places(0.5, (SIDE, SIDE, 3))[0]
    assert places[0, 0].tolist() == [20, 10]
    assert np.allclose(places[0, 1] - places[0, 0], [0.5, 0])


def test_somebody_who_walks_past_is_no_move_of_the_camera() -> None:
    start, end = seen(60, 60), seen(60, 60)
    figure = seen(400, 100)[60:200, 80:160]
    start[80:220, 20:100], end[80:220, 150:230] = figure, figure
    assert camera_between(start, end) is None


def test_who_moves_while_the_camera_does_is_more_than_a_move_of_the_camera() -> None:
    start, end = seen(60, 60), seen(120, 60)
    start[80:220, 40:120], end[80:220, 170:250] = (240, 220, 40), (240, 220, 40)
    assert camera_between(start, end) is None


@pytest.mark.parametrize("last", [(60, 60), (330, 150)], ids=["the same", "elsewhere"])
def test_pictures_that_stand_or_have_nothing_in_common_are_no_move(last: tuple[float, float]) -> None:
    assert camera_between(seen(60, 60), seen(*last)) is None
    blank = np.full((SIDE, SIDE, 3), 200, np.uint8)
    assert camera_between(blank, seen(60, 60)) is None


def test_a_stretch_that_is_a_move_of_the_camera_is_filmed_and_not_invented() -> None:
    pipe = tiny_sd15()
    motion = tiny_motion(pipe)
    settings = Settings(width=SIDE, height=SIDE, num_inference_steps=1, plan=None)
    start, end = seen(20, 40), seen(120, 40)
    asked = Stretch("a-b", 5, {0: start, 4: end})
    told: list[Progress] = []
    made = between(pipe, motion, asked, settings, told.append)
    camera = camera_between(start, end)
    assert camera is not None
    for frame in (1, 2, 3):
        assert np.array_equal(made[frame], camera.view(start, end, (0, 0.15625, 0.5, 0.84375)[frame])), (
            "it starts and stops gently"
        )
    assert (told[-1].step, told[-1].steps) == (1, 1)
    small = replace(settings, width=32, height=32)
    asked = Stretch("a-b", 4, {0: start, 3: end}, prompt="she jumps")
    with_words = between(pipe, motion, asked, small, told.append)
    assert len(with_words) == 4
    assert told[-1].step == small.num_inference_steps
