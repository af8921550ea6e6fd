"""The embedded model's motion stages, from drawn clips to parts that make frames: a few steps of each."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from storydiffusion.models import load_pipeline
from storydiffusion.motion.parts import open_motion
from storydiffusion.motion.transition import Stretch, between
from storydiffusion.resources import resources
from storydiffusion.run import Settings
from training import clips, fields, motion
from training.encode import CHANNELS, COLORS

MODEL = resources() / "models" / "storyworld"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty clips, in shards of ten."""
    folder = tmp_path_factory.mktemp("clips")
    before, motion.SHARD = motion.SHARD, 10
    for number in range(2):
        motion.draw_shard(folder, number)
    motion.SHARD = before
    return folder


def options(drawn: Path, out: Path, **more: object) -> argparse.Namespace:
    given = dict(data=drawn, out=out, model=MODEL, steps=2, minutes=0, batch=1, lr=1e-3, seed=0, start_from=None)
    return argparse.Namespace(**{**given, **more})


def test_clips_are_drawn_with_the_latents_they_are(drawn: Path) -> None:
    latents, pictures = motion.load(drawn, "latents"), motion.load(drawn, "pictures")
    assert latents.shape == (20, clips.LENGTH, CHANNELS, fields.GRID, fields.GRID)
    assert pictures.shape == (20, clips.LENGTH, 3, 128, 128)
    shown = clips.shown(clips.clip(13).frames[7])
    assert np.allclose(latents[13, 7, COLORS:], shown, atol=2e-3)
    means = pictures[13, 7].reshape(3, 16, 8, 16, 8).mean((2, 4)) / 127.5 - 1
    assert np.allclose(latents[13, 7, :COLORS], means, atol=0.02)


def test_parts_of_clips_stay_inside_them_and_go_both_ways() -> None:
    rng, seen = random.Random(0), set()
    for _ in range(60):
        some = motion.spans(20, 3, rng)
        assert some.frames.min() >= 0
        assert some.frames.max() < clips.LENGTH
        steps = some.frames.diff(dim=1)
        assert (steps == steps[:, :1]).all(), "time passes unevenly"
        seen |= set(steps.flatten().tolist())
        values = torch.arange(20 * clips.LENGTH).view(20, clips.LENGTH)
        assert torch.equal(some.of(values), some.clips[:, None] * clips.LENGTH + some.frames)
    assert seen == {-2, -1, 1, 2}


def test_a_fresh_motion_module_changes_nothing_and_saves_what_learned() -> None:
    adapter = motion.build_adapter()
    unet = motion.motion_unet(MODEL, adapter)
    learning = [name for name, p in unet.named_parameters() if p.requires_grad]
    assert learning
    assert all("motion_modules" in name for name in learning)
    plain = load_pipeline(MODEL).unet
    x, text = torch.randn(1, CHANNELS, 3, 16, 16), torch.randn(1, 8, 192)
    with torch.no_grad():
        made = unet(x, 500, text.repeat(3, 1, 1)).sample
        frames = [plain(x[:, :, i], 500, text).sample for i in range(3)]
    assert torch.allclose(made, torch.stack(frames, 2), atol=1e-4)
    saved = motion.adapter_of(unet, motion.build_adapter()).state_dict()
    assert saved.keys() == adapter.state_dict().keys()


def test_the_stages_leave_parts_that_make_frames(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "storyworld-motion"
    motion.train_predictor(options(drawn, out))
    motion.train_module(options(drawn, out))
    pipe = load_pipeline(MODEL)
    parts = open_motion(pipe, out, MODEL)
    clip = clips.clip(0)
    ends = {0: clips.draw(clip.frames[0]), 3: clips.draw(clip.frames[-1])}
    made = between(pipe, parts, Stretch("s", 4, ends), Settings(num_inference_steps=2, plan=None))
    assert np.array_equal(made[3], ends[3])
    assert made[1].shape == (256, 256, 3)


def test_no_configuration_names_a_folder_of_the_machine_it_was_made_on() -> None:
    for path in (resources() / "models").rglob("*.json"):
        assert '"_name_or_path": "/' not in path.read_text(encoding="utf-8"), path
