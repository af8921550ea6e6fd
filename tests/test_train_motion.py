"""Training on videos: the same weights whether it was killed or not, and a loss that goes down."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from storydiffusion import cli
from storydiffusion.errors import PlanError, StoryDiffusionError
from storydiffusion.motion.parts import open_motion
from storydiffusion.motion.training import Options, Run, cut, find_videos
from storydiffusion.video import write_film
from tiny import save_motion, tiny_motion, tiny_sd15


def ball(x: float, shade: int) -> np.ndarray:
    picture = np.full((32, 32, 3), shade, np.uint8)
    cv2.circle(picture, (round(x), 16), 6, (220, 40, 30), -1)
    return picture


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Balls that roll, slower and slower."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(3):
        way = 24 * np.sqrt(np.linspace(0, 1, 12)) + 4
        write_film(folder / f"{i}.mp4", (ball(x, 60 + 60 * i) for x in way), Fraction(8))
        (folder / f"{i}.txt").write_text("a ball rolls")
    return folder


def options(videos: Path, output: Path, **more: Any) -> Options:
    given = dict(frames=6, stride=2, width=16, height=16, held_out=1, lr=3e-3, warmup=2, ema=0.5, save_every=2)
    return Options(videos, output, **{**given, **more})  # type: ignore[arg-type]


def run(given: Options) -> Run:
    torch.manual_seed(5)
    pipe = tiny_sd15()
    return Run(pipe, tiny_motion(pipe), given)


def weights(one: Run) -> dict[str, torch.Tensor]:
    learner = one.accelerator.unwrap_model(one.learner)
    return {name: p.detach().clone() for name, p in learner.named_parameters() if p.requires_grad}


def test_killed_and_gone_on_with_it_gives_the_same_weights(videos: Path, tmp_path: Path) -> None:
    whole = run(options(videos, tmp_path / "whole", steps=6))
    whole.train()
    first = run(options(videos, tmp_path / "killed", steps=6))
    saved = first.save

    class Killed(Exception):
        pass

    def save_and_die() -> None:
        saved()
        if first.step == 4:
            raise Killed

    first.save = save_and_die  # type: ignore[method-assign]
    with pytest.raises(Killed):
        first.train()
    second = run(options(videos, tmp_path / "killed", steps=6))
    second.train()
    for name, value in weights(whole).items():
        assert torch.allclose(value, weights(second)[name], atol=1e-6), f"{name} is another"
    a, b = (torch.load(tmp_path / which / "checkpoint-6" / "state.pt")["ema"] for which in ("whole", "killed"))
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(a["shadow_params"], b["shadow_params"], strict=True))


def test_the_loss_goes_down_and_nothing_but_the_motion_learns(videos: Path, tmp_path: Path) -> None:
    going = run(options(videos, tmp_path, steps=40, lr=1e-2, save_every=100, alone=0.0))
    before = {name: value.clone() for name, value in going.motion.unet.state_dict().items()}
    first = going.validate()
    going.train()
    assert going.validate() < 0.9 * first
    after = going.motion.unet.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("motion_modules" in name for name in changed)


def test_held_out_videos_are_filmed_and_nothing_changes_by_it(videos: Path, tmp_path: Path) -> None:
    watched = run(options(videos, tmp_path / "watched", steps=4, validate_every=2, shown_steps=2))
    watched.train()
    for step in (2, 4):
        sheet = cv2.imread(str(tmp_path / "watched" / f"validation-{step}.png"))
        assert sheet is not None
        assert sheet.shape == (2 * 16, 6 * 16, 3), "the true frames, and below them those that were made"
        assert np.array_equal(sheet[:16, :16], sheet[16:, :16]), "both begin with the first frame"
    plain = run(options(videos, tmp_path / "plain", steps=4, validate_every=2, shown=0))
    plain.train()
    assert not list((tmp_path / "plain").glob("validation-*"))
    for name, value in weights(plain).items():
        assert torch.equal(value, weights(watched)[name]), f"{name} was changed by looking"


def test_the_predictor_can_be_trained_alone(videos: Path, tmp_path: Path) -> None:
    going = run(options(videos, tmp_path, steps=1, what="predictor"))
    assert all(name.startswith("predictor") or "motion.predictor" in name for name in weights(going))


def test_what_was_trained_is_opened_again(videos: Path, tmp_path: Path) -> None:
    going = run(options(videos, tmp_path / "out", steps=2))
    going.train()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"checkpoint-2", "curve.csv", "motion_adapter", "predictor"}
    save_motion(tiny_motion(tiny_sd15()), tmp_path / "tiny-motion")
    for part in ("image_encoder", "feature_extractor"):
        (tmp_path / "tiny-motion" / part).rename(tmp_path / "out" / part)
    opened = open_motion(tiny_sd15(), tmp_path / "out", tmp_path / "tiny")
    assert opened.predictor is not None


def test_old_checkpoints_are_let_go_and_none_is_half_there(videos: Path, tmp_path: Path) -> None:
    run(options(videos, tmp_path, steps=7)).train()
    assert [path.name for path in sorted(tmp_path.glob("*checkpoint*"))] == ["checkpoint-6", "checkpoint-7"]


def test_a_checkpoint_of_another_run_is_not_gone_on_from(videos: Path, tmp_path: Path) -> None:
    run(options(videos, tmp_path, steps=2)).train()
    with pytest.raises(StoryDiffusionError, match="another lr"):
        run(options(videos, tmp_path, steps=4, lr=1e-5)).train()


def test_videos_need_captions_and_enough_frames(tmp_path: Path) -> None:
    with pytest.raises(StoryDiffusionError, match="no videos"):
        find_videos(tmp_path)
    write_film(tmp_path / "a.mp4", (ball(x, 90) for x in (4, 8, 12)), Fraction(8))
    with pytest.raises(StoryDiffusionError, match="no caption"):
        find_videos(tmp_path)
    (tmp_path / "captions.json").write_text(json.dumps({"a.mp4": "a ball"}))
    video = find_videos(tmp_path)[0]
    assert video.caption == "a ball"
    import random

    with pytest.raises(StoryDiffusionError, match="3 frames"):
        cut(video.path, options(tmp_path, tmp_path), random.Random(0))
    short = replace(options(tmp_path, tmp_path), frames=3, stride=9)
    assert len(cut(video.path, short, random.Random(0))) == 3, "a short video is taken frame by frame"
    with pytest.raises(PlanError, match="held out"):
        run(options(tmp_path, tmp_path / "out"))


def test_from_the_shell(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tiny_sd15()
    pipe.save_pretrained(tmp_path / "tiny")
    save_motion(tiny_motion(pipe), tmp_path / "tiny-motion")
    words = ["train-motion", videos, "-o", tmp_path / "out", "--model", tmp_path / "tiny", "--steps", 2, "--frames", 6]
    more = ["--width", 16, "--height", 16, "--held-out", 1, "--validate-every", 2]
    assert cli.main([str(word) for word in (*words, *more)]) == 0
    assert "validation" in capsys.readouterr().out
    assert (tmp_path / "out" / "predictor" / "diffusion_pytorch_model.safetensors").is_file()
