"""What a camera's move alone explains is made from the pictures themselves; what it does not, is left alone."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from storydiffusion.errors import Cancelled
from storydiffusion.motion import transition
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
        ((200, 60, 1), (90, 52, 1)),
        ((40, 40, 1), (90, 80, 1.6)),
        ((90, 80, 1.6), (40, 40, 1)),
    ],
    ids=["right", "left and a little up", "nearer", "away"],
)
def test_a_pan_and_a_zoom_are_found_and_filmed(first: tuple[float, ...], last: tuple[float, ...]) -> None:
    start, end = seen(*first), seen(*last)
    camera = camera_between(start, end)
    assert camera is not None
    half = [a + 0.5 * (b - a) for a, b in zip(first[:2], last[:2], strict=True)]
    zoom = (first[2] * last[2]) ** 0.5
    if first[2] != last[2]:  # half way in zoom is not half way of the edge
        way = (1 - (first[2] / last[2]) ** 0.5) / (1 - first[2] / last[2])
        half = [a + way * (b - a) for a, b in zip(first[:2], last[:2], strict=True)]
    truth = seen(half[0], half[1], zoom)
    made = camera.view(start, end, 0.5)
    assert error(made, truth) < 0.2 * min(error(start, truth), error(end, truth))
    assert error(camera.view(start, end, 0.0), start) < 1
    assert error(camera.view(start, end, 1.0), end) < 2.5


def test_a_pan_is_even_and_a_zoom_keeps_the_point_it_leads_to() -> None:
    pan = Camera(40, 20, 1.0).places(0.25, (SIDE, SIDE, 3))[0]
    assert pan[0, 0].tolist() == [10, 5]
    middle = Camera(SIDE * 3 / 8, SIDE * 3 / 8, 4.0)  # on the middle of the picture
    for progress in (0.25, 0.5, 1.0):
        places = middle.places(progress, (SIDE, SIDE, 3))[0]
        assert np.allclose(places[SIDE // 2, SIDE // 2], [SIDE / 2] * 2, atol=0.01)
        assert np.allclose(places[0, 1] - places[0, 0], [4**-progress, 0], atol=1e-3)


def test_somebody_who_walks_past_is_no_move_of_the_camera() -> None:
    start, end = seen(60, 60), seen(60, 60)
    figure = seen(400, 100)[60:200, 80:160]
    start[80:220, 20:100], end[80:220, 150:230] = figure, figure
    assert camera_between(start, end) is None


def test_who_moves_while_the_camera_does_is_more_than_a_move_of_the_camera() -> None:
    start, end = seen(60, 60), seen(120, 60)
    start[80:220, 40:120], end[80:220, 170:250] = (240, 220, 40), (240, 220, 40)
    assert camera_between(start, end) is None


def test_a_move_past_what_no_picture_shows_is_not_filmed() -> None:
    assert camera_between(seen(20, 20), seen(150, 140)) is None, "two corners half way are in neither picture"


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
        assert np.array_equal(made[frame], camera.view(start, end, frame / 4))
    assert [(one.step, one.steps) for one in told] == [(1, 3), (2, 3), (3, 3)]
    eased = between(pipe, motion, replace(asked, easing="smooth"), settings)
    assert np.array_equal(eased[1], camera.view(start, end, 0.15625)), "time passes as it was asked to"
    with pytest.raises(Cancelled):
        between(pipe, motion, asked, settings, cancel=lambda: True)


def test_words_ask_for_more_than_a_move_of_the_camera(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_sd15()
    motion = tiny_motion(pipe)
    settings = Settings(width=32, height=32, num_inference_steps=2, plan=None)
    monkeypatch.setattr(transition, "camera_between", lambda first, last: Camera(8.0, 0.0, 1.0))
    asked = Stretch("a-b", 4, {0: seen(20, 40), 3: seen(120, 40)})
    for words, steps in (("", [(1, 2), (2, 2)]), ("she jumps", [(0, 2), (1, 2), (2, 2)])):
        told: list[Progress] = []
        between(pipe, motion, replace(asked, prompt=words), settings, told.append)
        assert [(one.step, one.steps) for one in told] == steps
