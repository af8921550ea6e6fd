"""Frames between pictures: keyframes to the pixel, the same frames again, any length, and a way to stop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from storydiffusion.errors import Cancelled, ImageError, ModelError, PlanError
from storydiffusion.motion import transition
from storydiffusion.motion.detail import Given, carried
from storydiffusion.motion.parts import Motion, open_motion
from storydiffusion.motion.transition import Stretch, between, predicted_tokens, runs_of
from storydiffusion.references import Picture
from storydiffusion.run import Settings
from tiny import save_motion, tiny_motion, tiny_sd15

SETTINGS = Settings(width=16, height=16, num_inference_steps=2, guidance_scale=3.0, plan=None)


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Motion]:
    pipe = tiny_sd15()
    return pipe, tiny_motion(pipe)


def picture(seed: int, size: int = 16) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def stretch(frames: int = 5, **more: Any) -> Stretch:
    return Stretch("p1-p2", frames, {0: picture(0), frames - 1: picture(1)}, **more)


def test_given_frames_come_out_as_they_went_in_and_the_others_lie_between(parts: tuple[Any, Motion]) -> None:
    asked = replace(stretch(7), keyframes={0: picture(0), 3: picture(2), 6: picture(1)})
    made = between(*parts, asked, SETTINGS)
    assert len(made) == 7
    for frame, given in asked.keyframes.items():
        assert np.array_equal(made[frame], given), f"frame {frame} is not the picture that was given"
    assert not np.array_equal(made[1], made[2])
    assert all(one.shape == (16, 16, 3) and one.dtype == np.uint8 for one in made)


def test_the_same_request_gives_the_same_frames_and_another_seed_others(parts: tuple[Any, Motion]) -> None:
    first, again = (between(*parts, stretch(), SETTINGS) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    other = between(*parts, stretch(seed=1), SETTINGS)
    assert not np.array_equal(first[2], other[2])


def test_prompt_easing_and_way_each_change_what_is_made(parts: tuple[Any, Motion]) -> None:
    plain = between(*parts, stretch(), SETTINGS)[1]
    for more in ({"prompt": "she jumps"}, {"easing": "smooth"}, {"way": "linear"}, {"way": "none"}):
        assert not np.array_equal(plain, between(*parts, stretch(**more), SETTINGS)[1]), more


def test_predicted_tokens_are_the_panels_own_at_every_given_frame(parts: tuple[Any, Motion]) -> None:
    motion = parts[1]
    seen = {0: picture(0), 3: picture(2), 5: picture(1)}
    tokens = predicted_tokens(motion, range(6), seen, "linear", "predictor")
    assert tokens is not None
    assert tokens.shape[0] == 6
    for frame, given in seen.items():
        assert torch.allclose(tokens[frame], motion.tokens([given])[0], atol=1e-5)
    straight = predicted_tokens(motion, range(6), seen, "linear", "linear")
    assert straight is not None
    assert torch.allclose(straight[4], (straight[3] + straight[5]) / 2, atol=1e-5)
    assert not torch.allclose(tokens[4], straight[4], atol=1e-3)
    assert predicted_tokens(motion, range(6), seen, "linear", "none") is None


@pytest.mark.parametrize(
    ("given", "window"),
    [((0, 15), 16), ((0, 1), 16), ((0, 39), 16), ((0, 199), 16), ((0, 5, 63), 16), ((*range(0, 40, 2), 39), 16)],
)
def test_every_frame_is_made_once_and_between_known_ones(given: tuple[int, ...], window: int) -> None:
    known = set(given)
    for run in runs_of(given, window):
        assert len(run) <= window
        assert {run[0], run[-1]} <= known, "a run has to begin and end with what is known"
        assert list(run) == sorted(set(run))
        assert set(run) - known, "a run without anything to make"
        known |= set(run)
    assert known == set(range(given[0], given[-1] + 1))


def test_a_long_stretch_is_made_in_windows(parts: tuple[Any, Motion], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    whole = transition._denoise

    def counted(*args: Any) -> Any:
        calls.append(len(args[3]))
        return whole(*args)

    monkeypatch.setattr(transition, "_denoise", counted)
    asked = stretch(40)
    made = between(*parts, asked, replace(SETTINGS, num_inference_steps=1))
    assert len(made) == 40
    assert len(calls) > 2
    assert max(calls) <= transition.WINDOW
    assert np.array_equal(made[39], asked.keyframes[39])


def test_progress_is_told_every_step_and_cancel_stops_within_one(parts: tuple[Any, Motion]) -> None:
    told: list[tuple[int, int]] = []
    asked = stretch()
    between(*parts, asked, SETTINGS, lambda p: told.append((p.step, p.steps)))
    assert told == [(0, 2), (1, 2), (2, 2)]
    steps: list[int] = []
    with pytest.raises(Cancelled):
        between(*parts, asked, SETTINGS, lambda p: steps.append(p.step), lambda: len(steps) > 1)
    assert steps == [0, 1]


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"frames": 1}, PlanError, "1 frames"),
        ({"frames": 5000}, PlanError, "Use 2 to"),
        ({"keyframes": {0: picture(0)}}, ImageError, "first and last"),
        ({"keyframes": {0: picture(0), 4: picture(1), 9: picture(2)}}, ImageError, "Frame 9"),
        ({"keyframes": {0: picture(0), 4: picture(1)[..., 0]}}, ImageError, "Frame 4"),
        ({"easing": "bouncy"}, PlanError, "linear"),
    ],
)
def test_what_cannot_be_made_is_refused_with_a_remedy(
    parts: tuple[Any, Motion], wrong: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        between(*parts, replace(stretch(), **wrong), SETTINGS)


def test_a_size_that_the_grid_does_not_divide_is_refused(parts: tuple[Any, Motion]) -> None:
    with pytest.raises(PlanError, match="multiples of 4"):
        between(*parts, stretch(), replace(SETTINGS, width=18))


def test_the_parts_are_opened_from_a_folder_and_make_the_same(parts: tuple[Any, Motion], tmp_path: Path) -> None:
    pipe, motion = parts
    folder = save_motion(motion, tmp_path / "tiny-motion")
    again = open_motion(pipe, folder, tmp_path / "tiny")
    a, b = (between(pipe, one, stretch(), SETTINGS) for one in (motion, again))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    (folder / "predictor" / "config.json").unlink()
    with pytest.raises(ModelError, match="no films"):
        open_motion(pipe, folder, tmp_path / "tiny")


def test_a_pipelines_own_unet_is_not_changed(parts: tuple[Any, Motion]) -> None:
    pipe, motion = parts
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    between(pipe, motion, stretch(), SETTINGS)
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())


def test_the_embedded_motion_module_runs_in_stock_animatediff() -> None:
    from diffusers import AnimateDiffPipeline, MotionAdapter

    models = Path(__file__).resolve().parents[1] / "resources" / "models"
    adapter = MotionAdapter.from_pretrained(models / "storyworld-motion" / "motion_adapter", torch_dtype=torch.float32)
    frames = []
    for weight in (1.0, 0.0):
        pipe = AnimateDiffPipeline.from_pretrained(
            models / "storyworld", motion_adapter=adapter, torch_dtype=torch.float32
        )
        pipe.set_progress_bar_config(disable=True)
        for name, value in pipe.unet.named_parameters():
            if "motion_modules" in name and "proj_out" in name:
                value.data.mul_(weight)
        made = pipe(
            "a red cat in a meadow", num_frames=4, height=128, width=128, num_inference_steps=2, guidance_scale=1.0,
            output_type="np", generator=torch.Generator().manual_seed(0),
        ).frames[0]  # fmt: skip
        assert made.shape == (4, 128, 128, 3)
        assert np.isfinite(made).all()
        frames.append(made)
    assert np.abs(frames[0] - frames[1]).mean() > 0.01, "it is the motion module that is heard"


# --------------------------------------------------------------------------- detail


def scene(x: int) -> tuple[Picture, Picture]:
    """A ball at x before fine stripes; and the same as a decoder would blur it."""
    import cv2

    sharp = np.full((96, 96, 3), 120, np.uint8)
    sharp[:, ::3] = 160
    cv2.circle(sharp, (x, 48), 14, (220, 40, 30), -1)
    cv2.circle(sharp, (x, 48), 5, (20, 20, 20), 1)
    return sharp, np.asarray(cv2.GaussianBlur(sharp, (0, 0), 2.0), np.uint8)


def error(a: Picture, b: Picture) -> float:
    return float(np.abs(a.astype(float) - b).mean())


def test_detail_of_what_stands_still_and_of_what_moves_is_carried_along() -> None:
    given = [(0.0, Given(*scene(30))), (1.0, Given(*scene(60)))]
    sharp, blurred = scene(45)
    made = carried(blurred, 0.5, given)
    assert error(made, sharp) < 0.35 * error(blurred, sharp)
    ball = np.s_[38:58, 35:55]
    assert error(made[ball], sharp[ball]) < 0.6 * error(blurred[ball], sharp[ball])


def test_what_no_given_picture_shows_stays_as_it_was_decoded() -> None:
    given = [(0.0, Given(*scene(20)))]
    frame = np.full((96, 96, 3), (30, 200, 90), np.uint8)
    assert error(carried(frame, 0.5, given), frame) < 1


# --------------------------------------------------------------------------- full-size parts, small


def ip_adapter_state(unet: Any, width: int, channels: int) -> dict[str, torch.Tensor]:
    """Random weights of IP-Adapter Plus as its file names them, for a U-Net."""
    torch.manual_seed(4)
    inner = 64 * 12
    state = {
        "image_proj.latents": torch.randn(1, 4, inner),
        "image_proj.proj_in.weight": torch.randn(inner, width) * 0.1,
        "image_proj.proj_in.bias": torch.zeros(inner),
        "image_proj.proj_out.weight": torch.randn(channels, inner) * 0.1,
        "image_proj.proj_out.bias": torch.zeros(channels),
        "image_proj.norm_out.weight": torch.ones(channels),
        "image_proj.norm_out.bias": torch.zeros(channels),
    }
    for layer in range(4):
        block = f"image_proj.layers.{layer}"
        for name in ("norm1", "norm2"):
            state |= {f"{block}.0.{name}.weight": torch.ones(inner), f"{block}.0.{name}.bias": torch.zeros(inner)}
        state |= {f"{block}.0.to_q.weight": torch.randn(inner, inner) * 0.03}
        state |= {f"{block}.0.to_kv.weight": torch.randn(2 * inner, inner) * 0.03}
        state |= {f"{block}.0.to_out.weight": torch.randn(inner, inner) * 0.03}
        state |= {f"{block}.1.0.weight": torch.ones(inner), f"{block}.1.0.bias": torch.zeros(inner)}
        state |= {f"{block}.1.1.weight": torch.randn(4 * inner, inner) * 0.03}
        state |= {f"{block}.1.3.weight": torch.randn(inner, 4 * inner) * 0.03}
    cross = [name for name in unet.attn_processors if name.endswith("attn2.processor") and "motion" not in name]
    for i, name in enumerate(cross):
        hidden = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
        for kind in ("k", "v"):
            state[f"ip_adapter.{2 * i + 1}.to_{kind}_ip.weight"] = torch.randn(hidden, channels) * 0.3
    return state


def test_public_weights_read_the_encoders_tokens_through_ip_adapter(parts: tuple[Any, Motion], tmp_path: Path) -> None:
    from diffusers import DDIMScheduler
    from safetensors.torch import save_file

    pipe, motion = parts
    folder = save_motion(motion, tmp_path / "tiny-motion")
    save_file(ip_adapter_state(motion.unet, 12, 16), folder / "ip_adapter.safetensors")
    DDIMScheduler(beta_schedule="linear").save_pretrained(folder / "scheduler")
    bridged = open_motion(pipe, folder, tmp_path / "tiny")
    assert bridged.layer == -2
    assert bridged.scheduler.config.beta_schedule == "linear"
    made = between(pipe, bridged, stretch(), SETTINGS)
    assert np.array_equal(made[0], picture(0))
    other = between(pipe, bridged, replace(stretch(), keyframes={0: picture(5), 4: picture(1)}), SETTINGS)
    assert not np.array_equal(made[2], other[2])
    for way in ("linear", "none"):
        assert not np.array_equal(made[2], between(pipe, bridged, stretch(way=way), SETTINGS)[2])
    for file in (folder / "predictor").iterdir():
        file.unlink()
    (folder / "predictor").rmdir()
    untrained = open_motion(pipe, folder, tmp_path / "tiny")
    assert untrained.predictor is None
    a, b = (
        between(pipe, one, stretch(way=way), SETTINGS) for one, way in ((untrained, "predictor"), (bridged, "linear"))
    )
    assert np.array_equal(a[2], b[2]), "without a predictor frames are made from the interpolation"
