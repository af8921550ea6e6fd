"""What transitions are measured by: intervals, differences clip by clip, and the simple ways they are compared with."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from storydiffusion.references import Picture
from training import captions, clips, evaluate_motion
from training.evaluate_motion import MEASURES, Kept, Row, crossfade, differences, flow_warp, interval


def ball(x: int) -> Picture:
    drawn = np.full((64, 96, 3), 90, np.uint8)
    drawn[::8] = 110
    cv2.circle(drawn, (x, 32), 10, (230, 60, 40), -1)
    return drawn


def where(picture: Picture) -> float:
    """The middle of what is red."""
    return float(
        np.average(np.arange(96), weights=(picture[..., 0].astype(int) - picture[..., 1]).clip(0).sum(0) + 1e-9)
    )


@pytest.mark.parametrize("way", [crossfade, flow_warp])
def test_simple_ways_begin_and_end_with_the_pictures(way: evaluate_motion.Maker) -> None:
    made = way(ball(30), ball(44), 5, 0)
    assert len(made) == 5
    assert np.array_equal(made[0], ball(30))
    assert np.array_equal(made[-1], ball(44))
    assert where(made[2]) == pytest.approx(37, abs=1.5)


def test_a_warp_moves_what_a_cross_fade_doubles() -> None:
    truth = ball(37)
    off = [
        float(np.abs(way(ball(30), ball(44), 3, 0)[1].astype(float) - truth).mean()) for way in (crossfade, flow_warp)
    ]
    assert off[1] < 0.6 * off[0]


def test_an_interval_holds_the_mean_and_narrows_with_more_clips() -> None:
    rng = np.random.default_rng(1)
    few, many = rng.normal(3, 1, 12), rng.normal(3, 1, 1200)
    for values in (few, many):
        low, high = interval(list(values))
        assert low < values.mean() < high
    assert np.diff(interval(list(many))) < 0.3 * np.diff(interval(list(few)))


def row(name: str, trajectory: list[float]) -> Row:
    found = [dict.fromkeys(MEASURES, 0.0) | {"trajectory_error": value} for value in trajectory]
    return Row(name, len(found), 0.0, 0.0, {}, {}, found=found)


def test_rows_are_compared_clip_by_clip_where_both_have_a_figure() -> None:
    chosen = clips.held_out(len(clips.MOTIONS))
    hard = [float(10 * i) for i in range(len(chosen))]  # clips differ much more than the ways of making them
    better = [value - 1 for value in hard]
    better[3] = np.nan
    off = differences(row("b", better), row("a", hard), chosen)
    assert off["all"]["trajectory_error"] == (-1.0, -1.0, -1.0)
    large = sum(clip.displacement > evaluate_motion.LARGE for clip in chosen)
    assert 0 < large < len(chosen)
    assert off["large"]["trajectory_error"][0] == -1.0


def test_captions_of_a_clip_say_what_happens_in_it() -> None:
    import random

    jump = clips.clip(5, "jump")
    told = [clips.caption(jump.frames[8], random.Random(i)) for i in range(40)]
    assert any("jump" in one for one in told)
    assert not any("jump" in clips.caption(jump.frames[0], random.Random(i)) for i in range(40))
    run = clips.clip(5, "run")
    for frame in run.frames:  # with closed feet too
        assert not any("stand" in clips.caption(frame, random.Random(i)) for i in range(20))
    travel = clips.clip(5, "travel")
    later = travel.frames[-1].later
    assert later is not None
    place = captions.PLACE_WORDS[later.cells[0].place]
    assert any(word in clips.caption(travel.frames[-1], random.Random(i)) for i in range(40) for word in place)


def test_figures_of_clips_are_kept_and_not_gone_on_from_with_other_weights(tmp_path: Path) -> None:
    file = tmp_path / "kept.json"
    Kept(file, "these").put("rife", 3, {"corrupted": 0.5})
    assert Kept(file, "these").get("rife", 3) == {"corrupted": 0.5}
    assert Kept(file, "these").get("rife", 4) is None
    assert Kept(file, "others").get("rife", 3) is None
    assert Kept(None, "these").get("rife", 3) is None
