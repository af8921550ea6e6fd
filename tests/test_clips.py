"""The storyworld in motion: every frame known, as pixels and as what latents say."""

from __future__ import annotations

import numpy as np
import pytest

from training import clips, fields, world
from training.data import HELD_OUT


@pytest.mark.parametrize("motion", clips.MOTIONS)
def test_a_clip_is_the_same_whenever_it_is_drawn_and_moves(motion: str) -> None:
    clip = clips.clip(3, motion)
    assert clip == clips.clip(3, motion)
    assert len(clip.frames) == clips.LENGTH
    pictures = [clips.draw(frame).astype(int) for frame in (clip.frames[0], clip.frames[7], clip.frames[-1])]
    assert np.abs(pictures[0] - pictures[1]).mean() > 0.3, "nothing has happened by the middle"


@pytest.mark.parametrize("motion", clips.MOTIONS)
def test_latents_say_what_the_frames_show(motion: str) -> None:
    clip = clips.clip(11, motion)
    for frame in clip.frames[::5]:
        shown = clips.shown(frame)
        assert shown.shape == (fields.CHANNELS, fields.GRID, fields.GRID)
        figure = frame.scene.cells[0].figures[0]
        seen = fields.read(shown)
        for name in ("kind", "fur", "clothes", "clothes_color", "hat"):
            assert seen[name] == getattr(figure.character, name)
        mine = shown[fields.SLICES["figure"]][0] > 0
        assert mine.any(), "the character is out of sight"


def test_places_on_a_figure_follow_the_camera() -> None:
    for number in range(6):
        clip = clips.clip(number, "zoom")
        for frame in (clip.frames[0], clip.frames[-1]):
            shown, figure = clips.shown(frame), frame.scene.cells[0].figures[0]
            mine = shown[fields.SLICES["figure"]][0] > 0
            u = shown[fields.SLICES["u"]][0]
            both = mine[:, 1:] & mine[:, :-1]
            step = np.median(np.diff(u, axis=1)[both])
            assert step == pytest.approx(fields.PATCH / (60 * figure.scale * frame.view.zoom), rel=1e-3)


def test_a_view_is_the_part_of_the_picture_it_says() -> None:
    scene = clips.clip(5, "zoom").frames[0].scene
    near = world.draw(scene, 256, world.View(64, 96, 2.0)).astype(int)
    large = world.draw(scene, 512).astype(int)[192:448, 128:384]
    assert np.abs(near - large).mean() < 1


def test_night_falls_evenly() -> None:
    clip = clips.clip(2, "nightfall")
    light = [clips.draw(frame)[:40].mean() for frame in clip.frames]
    steps = np.abs(np.diff(light))
    assert steps.max() < 0.35 * abs(light[0] - light[-1])
    times = [clips.shown(frame)[fields.SLICES["time"]][0, 0, 0] for frame in clip.frames]
    assert sorted(times) == pytest.approx(times) or sorted(times, reverse=True) == pytest.approx(times)
    assert {abs(times[0]), abs(times[-1])} == {1.0}


def test_who_runs_gets_further_than_who_walks_and_stays_in_the_picture() -> None:
    runs = [clips.clip(number, "run") for number in range(20)]
    walks = [clips.clip(number, "walk") for number in range(20)]
    assert min(one.displacement for one in runs) >= max(one.displacement for one in walks) - 1e-6
    assert sum(one.displacement > 0.25 for one in runs) == 20, "large motions are over a quarter of the picture"
    for one in runs + walks:
        assert all(20 < x < world.SIZE - 20 for x, _ in clips.trajectory(one))


def test_who_jumps_is_in_the_air_in_between() -> None:
    for number in range(5):
        heights = [y for _, y in clips.trajectory(clips.clip(number, "jump"))]
        assert heights[0] == pytest.approx(heights[-1])
        assert min(heights) < heights[0] - 12


def test_held_out_clips_are_none_of_the_training_ones() -> None:
    held = clips.held_out(20)
    assert [one.motion for one in held[: len(clips.MOTIONS)]] == list(clips.MOTIONS)
    assert held[0] == clips.clip(HELD_OUT, clips.MOTIONS[0])
    assert not {one.frames[0] for one in held} & {clips.clip(i).frames[0] for i in range(200)}
